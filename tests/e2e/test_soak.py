"""Runs that are disturbed again and again at random moments end as the run that nothing has happened to, bit for bit.

`make test-soak` does it over ZeRO stages, background saving and adapters. Ranks are killed, stopped and asked to leave;
the disk is full or read-only for a while. SOAK_KILLS says how many SIGKILLs there are in all, SOAK_SEED which ones.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from seqaware.watchdog.shared_status import RankPosition, read_position
from tests import launch, tiny
from tests.e2e.interrupted_runs import fill
from tests.patience import Patience, usual_slowness, wait_for

STEPS = 40
KILLS = int(os.environ.get("SOAK_KILLS", "100"))
SEED = int(os.environ.get("SOAK_SEED", "0"))
# SIGSTOP is noticed after faults.hang_minutes.
HANG_MINUTES = 0.5

LORA = {"lora": {"rank": 4, "target_modules": "all-linear"}}
LAYOUTS: dict[str, tuple[str, dict[str, Any]]] = {
    "zero1": ("zero1", {}),
    "zero2": ("zero2", {}),
    "zero3": ("zero3", {}),
    "zero1-async": ("zero1", {"output__async_save": True}),
    "zero3-async": ("zero3", {"output__async_save": True}),
    "zero2-lora": ("zero2", LORA),
    "zero3-lora-async": ("zero3", {"output__async_save": True, **LORA}),
}
STARTING = ("tokenising", "connecting", "loading the model", "loading the checkpoint")
TRAINING = ("batches", "forward", "backward", "optimizer step", "saving", "evaluating")
ENDING = ("saving", "exporting", "evaluating")


class Ranks:
    """Two forked ranks of launcher/train.py, and where they are."""

    def __init__(self, arguments: Sequence[str], folder: Path) -> None:
        self._forked = launch.Forked(["launcher/train.py", *arguments], ranks=2, folder=folder)
        self.processes = self._forked.processes

    def place(self, rank: int) -> RankPosition | None:
        launches = Path(tempfile.gettempdir(), f"seqaware-{os.getuid()}")
        return next(
            (read_position(path) for path in launches.glob(f"*-{self._forked.port}/rank-{rank:04d}.dial")), None
        )

    def running(self) -> bool:
        return all(process.exitcode is None for process in self.processes)

    def wait_for(self, rank: int, phases: Sequence[str], step: int) -> RankPosition | None:
        """Wait until a rank is in one of the phases, at this step or later; None if the launch has ended before."""
        patience = Patience()
        while self.running():
            place = self.place(rank)
            if place is not None and place.phase in phases and place.step >= step:
                return place
            assert not patience.is_over(), f"rank {rank} never came to {phases} at step {step}: {self.said()}"
            time.sleep(0.001)
        return None

    def send(self, rank: int, number: signal.Signals) -> None:
        pid = self.processes[rank].pid
        assert pid is not None
        if self.processes[rank].exitcode is None:
            os.kill(pid, number)

    def finish(self) -> list[int]:
        """Wait until every rank has ended by itself: no launcher ends the others."""
        try:
            wait_for("the end of the launch", lambda: self._forked.poll() is not None)
        finally:
            codes = self._forked.codes()
            for process in self.processes:
                process.kill()
                process.join()
        return [code for code in codes if code is not None]

    def said(self) -> str:
        return self._forked.stderr.read_text()[-6000:]


@dataclass
class Layout:
    """The runs of a layout, one after the other, all in a small file system of their own."""

    name: str
    workshop: tiny.Workshop
    disk: Path
    log: list[str] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)
    launches: int = 0
    runs: int = 0

    @property
    def folder(self) -> Path:
        return self.disk / f"run-{self.runs}"

    def start(self, hang_minutes: float | None = None) -> Ranks:
        self.launches += 1
        zero, changes = LAYOUTS[self.name]
        schedule = {"num_epochs": 99, "max_steps": STEPS, "global_batch_size": 5, "scheduler_type": "cosine"}
        store = {"store_dir": str(self.workshop.folder / "stores"), "workers": 1}
        held_out = {"dataset": {"name": str(self.workshop.rows), **store}, "every_steps": 15}
        config = self.workshop.config(
            training__schedule=schedule,
            evaluation=held_out,
            output__dir=str(self.folder),
            output__save_every=3,
            **changes,
        )
        # Several micro-batches a step: ZeRO-3 follows its trace from the second one on.
        config["training"]["parameters"] = {"max_seq_length": 64}
        config["training"]["schedule"]["micro_batch_tokens"] = 64
        config["faults"] = {"hang_minutes": hang_minutes or HANG_MINUTES * usual_slowness()}
        path = self.workshop.write(f"{self.name}-{self.runs}", config)
        arguments = (str(path), "--deepspeed", str(launch.DS_CONFIGS / f"{zero}.json"))
        return Ranks(arguments, self.workshop.folder / "launches" / f"{self.name}-{self.launches}")

    def newest(self) -> int:
        latest = self.folder / "checkpoints" / "latest"
        return int(latest.read_text().strip().removeprefix("step-")) if latest.exists() else 0

    @property
    def finished(self) -> bool:
        manifest = self.folder / "manifest.json"
        return manifest.exists() and json.loads(manifest.read_text()).get("finished_steps") == STEPS

    def outcome(self) -> dict[str, Any]:
        """All that must be the same, without the weights."""
        lines = [json.loads(line) for line in (self.folder / "metrics.jsonl").read_text().splitlines()]
        steps = [(line["step"], line["loss"], line["grad_norm"]) for line in lines if line["kind"] == "step"]
        evaluations = [(line["step"], line["loss"]) for line in lines if line["kind"] == "evaluation"]
        return {"steps": steps, "evaluations": evaluations}

    def disturb(self, choose: random.Random) -> bool:
        """One launch with one signal, perhaps after trouble with the disk; returns whether it was SIGKILL."""
        rank, newest = choose.randrange(2), self.newest()
        step = min(newest + choose.randint(1, 6), STEPS)
        phases = (choose.choice(TRAINING),) if newest < STEPS else ENDING
        if choose.random() < 0.15:
            phases, step = STARTING[choose.randrange(len(STARTING)) :], -1
        trouble = choose.choice((fill_up, lock)) if os.geteuid() == 0 and choose.random() < 0.2 else None
        sent = choose.choices((signal.SIGKILL, signal.SIGSTOP, signal.SIGTERM), (0.75, 0.08, 0.17))[0]
        ranks = self.start()
        try:
            place = ranks.wait_for(rank, phases, step)
            if place is not None and trouble is not None:
                with trouble(self.disk):
                    time.sleep(choose.uniform(0.0, 1.0))
                self.counts[trouble.__name__] += 1
                place = ranks.wait_for(rank, (*TRAINING, *ENDING), -1)
            if place is not None:
                time.sleep(choose.uniform(0.0, 0.05))
                ranks.send(rank, sent)
                self.counts[sent.name] += 1
        finally:
            codes = ranks.finish()
        where = "already over" if place is None else place.words()
        self.log.append(f"{sent.name if place else 'nothing'} {where} {codes} {trouble.__name__ if trouble else ''}")
        print(f"{self.name}: {self.log[-1]}", flush=True)
        return place is not None and sent is signal.SIGKILL

    def complete(self) -> None:
        """Resume to the end, undisturbed."""
        ranks = self.start(hang_minutes=30.0)
        assert ranks.finish() == [0, 0], ranks.said()


@contextmanager
def fill_up(disk: Path) -> Iterator[None]:
    """No byte can be written on this disk."""
    filler = disk / "filler"
    fill(filler)
    try:
        yield
    finally:
        filler.unlink()


@contextmanager
def lock(disk: Path) -> Iterator[None]:
    """Nothing on this disk can be opened for writing."""
    subprocess.run(["mount", "--bind", "-o", "ro", str(disk), str(disk)], check=True)
    try:
        yield
    finally:
        # Lazily: a rank may have opened a file through it.
        subprocess.run(["umount", "--lazy", str(disk)], check=True)


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> tiny.Workshop:
    return tiny.build(tmp_path_factory.mktemp("soak"))


@pytest.mark.soak
@pytest.mark.parametrize("name", LAYOUTS)
def test_a_disturbed_run_ends_as_the_undisturbed_one(workshop: tiny.Workshop, name: str) -> None:
    number = list(LAYOUTS).index(name)
    wanted = (KILLS + number) // len(LAYOUTS)
    choose = random.Random(f"{SEED} {name}")
    disk = workshop.folder / f"disk-{name}"
    disk.mkdir()
    if os.geteuid() == 0:
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", str(disk)], check=True)
    try:
        layout = Layout(name, workshop, disk)
        layout.complete()
        expected, weights = layout.outcome(), load_file(layout.folder / "model" / "model.safetensors")
        assert [step for step, *_ in expected["steps"]] == list(range(1, STEPS + 1))
        assert [step for step, _ in expected["evaluations"]] == [0, 15, 30, STEPS]
        layout.runs, kills = 1, 0
        while kills < wanted:
            assert layout.launches < 20 * (wanted + 1), f"too few moments come: {layout.log}"
            kills += layout.disturb(choose)
            if layout.finished or kills == wanted:
                layout.complete()
                assert layout.outcome() == expected, layout.log
                found = load_file(layout.folder / "model" / "model.safetensors")
                assert found.keys() == weights.keys()
                assert all(found[key].equal(weight) for key, weight in weights.items()), layout.log
                layout.runs += 1
        print(f"{name}: {dict(layout.counts)} in {layout.launches} launches, {layout.runs - 1} runs, all bitwise equal")
    finally:
        if os.geteuid() == 0:
            subprocess.run(["umount", "--lazy", str(disk)], check=True)
