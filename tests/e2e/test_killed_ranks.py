"""Ranks that are killed at whatever moment: the launch ends at once and says who it was, and the rerun goes on.

After all kills the run is the one that was never interrupted: the same losses, the same weights, bitwise.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable, Iterator, Sequence
from itertools import chain, repeat
from typing import Any

import pytest
from safetensors.torch import load_file

from tests import launch, tiny
from tests.e2e.kills import Ending, Launch, Wanted, deepspeed, forked, mpirun, torchrun
from tests.patience import slowness, usual_slowness

STEPS = 30
# A launcher looks after its ranks once a second: on an idle machine it takes 2 to 4 s.
SOON = 30.0
Command = Callable[..., list[str]]


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> tiny.Workshop:
    return tiny.build(tmp_path_factory.mktemp("kills"))


class Run:
    """One run, in as many launches as it takes."""

    def __init__(self, workshop: tiny.Workshop, name: str, commands: Sequence[Command] = (forked,)) -> None:
        # Five rows a step: the thirteen rows make ragged epochs of three steps.
        schedule = {"num_epochs": 99, "max_steps": STEPS, "global_batch_size": 5, "scheduler_type": "cosine"}
        self.folder = workshop.folder / name
        output = {"dir": str(self.folder), "save_every": 2}
        store = str(workshop.folder / f"store-{name}")
        held_out = {"dataset": {"name": str(workshop.rows), "store_dir": store, "workers": 1}}
        config = workshop.config(
            training__schedule=schedule, output=output, dataset__store_dir=store, evaluation=held_out
        )
        zero3 = str(launch.DS_CONFIGS / "zero3.json")
        self._arguments = (str(workshop.write(name, config)), "--deepspeed", zero3)
        self._launches = workshop.folder / f"launches-{name}"
        self._commands = chain(commands, repeat(forked))
        self._count = 0

    def start(self) -> Launch:
        self._count += 1
        return Launch(next(self._commands)(*self._arguments), self._launches / str(self._count))

    def undisturbed(self) -> None:
        """From the beginning to the end."""
        done = launch.forked("launcher/train.py", *self._arguments, ranks=2)
        assert done.returncode == 0, done.stderr[-4000:]

    def finish(self) -> str:
        """Go on to the end; returns what was said."""
        last = self.start()
        assert last.finish() == 0, last.stderr.read_text()[-4000:]
        return last.stdout.read_text()

    def newest(self) -> int:
        latest = self.folder / "checkpoints" / "latest"
        return int(latest.read_text().strip().removeprefix("step-")) if latest.exists() else 0

    def steps(self) -> list[tuple[int, float, float]]:
        return [(line["step"], line["loss"], line["grad_norm"]) for line in self._lines("step")]

    def evaluations(self) -> list[tuple[int, float]]:
        return [(line["step"], line["loss"]) for line in self._lines("evaluation")]

    def _lines(self, kind: str) -> list[dict[str, Any]]:
        lines = [json.loads(line) for line in (self.folder / "metrics.jsonl").read_text().splitlines()]
        return [line for line in lines if line["kind"] == kind]


SLOW_WEIGHTS = """
import os, pathlib, time

def weigh(k, length):
    while os.environ["RANK"] == "1" and pathlib.Path(__file__).with_name("hang").exists():
        time.sleep(3600)
    return k * 0.0 + 1.0
"""
HANGING_LINE = 6


@pytest.fixture(scope="module")
def hanging(workshop: tiny.Workshop) -> Iterator[Launch]:
    """A launch whose rank 1 hangs after a few steps."""
    folder = workshop.folder / "hanging"
    folder.mkdir()
    (folder / "slow_weights.py").write_text(SLOW_WEIGHTS)
    config = workshop.config(output__dir=str(folder / "run"), training__schedule__num_epochs=9999)
    # Longer than any phase of the start takes, importing torch included.
    config["faults"] = {"hang_minutes": 0.75 * slowness()}
    config["training"]["sft"] = {"weighting": "slow_weights:weigh"}
    command = deepspeed(str(workshop.write("hanging-run", config)))
    started = Launch(command, folder / "launch", PYTHONPATH=f"{launch.ROOT}:{folder}")
    started.wait_for(1, _in("forward", 3))
    (folder / "hang").touch()
    yield started
    started.end()


@pytest.fixture(scope="module")
def whole(workshop: tiny.Workshop) -> Run:
    """The run that is never interrupted."""
    run = Run(workshop, "whole")
    run.undisturbed()
    assert [step for step, *_ in run.steps()] == list(range(1, STEPS + 1))
    return run


def _check_told(ending: Ending) -> None:
    """Who it was comes first, and nothing that might be taken for the cause comes after it."""
    card = ending.card
    assert ending.code != 0 and ending.seconds < SOON * usual_slowness()
    name = re.escape(f"rank {card.rank} of 2 on host {card.host} (pid {card.process.pid})")
    place = re.escape(ending.place.words())
    # A launcher that looks at its ranks more often may have taken the signal's number away.
    assert re.fullmatch(f"{name} (was killed by SIGKILL|is gone) {place}", ending.first_line), ending.screen
    # torchrun shows a traceback of its own afterwards.
    assert 'train.py", line' not in ending.screen, ending.screen


def _check_same(run: Run, whole: Run) -> None:
    assert run.steps() == whole.steps()
    assert run.evaluations() == whole.evaluations() and run.evaluations()[-1][0] == STEPS
    expected, got = (load_file(each.folder / "model" / "model.safetensors") for each in (whole, run))
    assert expected.keys() == got.keys()
    for name, tensor in expected.items():
        assert got[name].equal(tensor), name


STARTING = ("tokenising", "connecting", "loading the model")
TRAINING = ("batches", "forward", "backward", "optimizer step", "saving")


def _in(phase: str, step: int = -1) -> Wanted:
    return lambda place: place.phase == phase and place.step >= step


def _from(phase: str) -> Wanted:
    """In a phase of the start or after it: it may be over before anybody has looked."""
    return lambda place: place.phase in STARTING[STARTING.index(phase) :] or place.step >= 0


MOMENTS = [
    (1, _in("tokenising")),
    (1, _in("loading the model")),
    (0, _in("forward", 5)),
    (1, _in("backward", 9)),
    (1, _in("optimizer step", 13)),
    (1, _in("saving", 18)),
]


# It takes a minute of doing nothing until a hang is told: that minute passes in the meantime.
@pytest.mark.usefixtures("hanging")
def test_a_rank_killed_at_any_moment_is_named_and_the_rerun_goes_on(workshop: tiny.Workshop, whole: Run) -> None:
    run = Run(workshop, "parts", (forked, deepspeed, deepspeed))
    for rank, wanted in MOMENTS:
        started = run.start()
        ending = started.kill(rank, wanted)
        _check_told(ending)
        begun = run.newest()
        if "resumed" in started.stdout.read_text():
            assert f"goes on after step {begun}, the newest that is saved" in ending.screen
    assert run.newest() >= 16
    said = run.finish()
    assert f"resumed     after step {begun}" in said
    _check_same(run, whole)


def test_a_run_survives_kills_at_random_moments(workshop: tiny.Workshop, whole: Run) -> None:
    """Each launch starts the run in another way; the last one resumes without a launcher. test_soak.py kills more."""
    kills = 3
    choose = random.Random(kills)
    run = Run(workshop, "random", (torchrun, mpirun))
    seconds, places = [], []
    for left in range(kills, 0, -1):
        # As many steps at most as leave some for the kills to come; once in a while the start is hit, and where a busy
        # machine has let a run come to its last step before the kill, nothing else is left.
        step = run.newest() + choose.randint(1, max(1, (STEPS - run.newest()) // left))
        starting = choose.random() < 0.2 or step > STEPS
        wanted = _from(choose.choice(STARTING)) if starting else _in(choose.choice(TRAINING), step)
        ending = run.start().kill(choose.randrange(2), wanted, later=choose.uniform(0.0, 0.1))
        _check_told(ending)
        seconds.append(ending.seconds)
        places.append(ending.place.words())
    run.finish()
    _check_same(run, whole)
    print(f"{kills} kills: {places}; the launch ended after {min(seconds):.1f} to {max(seconds):.1f} s")


CONNECTED = """
from seqaware.distributed.process_group import connect, disconnect, find_address, prepare_environment

prepare_environment()
connect(find_address())
from deepspeed.comm import comm

print("operator:", comm.cdb.shm_comm_op)
disconnect()
"""


def test_no_rank_waits_for_a_killed_one_in_shared_memory(workshop: tiny.Workshop) -> None:
    """DeepSpeed's operator waits for all ranks where no other thread of a rank can run, the watchdog's neither."""
    script = workshop.folder / "connected.py"
    script.write_text(CONNECTED)
    done = launch.forked(str(script), ranks=2)
    assert done.returncode == 0 and done.stdout.count("operator: None") == 2, done.stdout + done.stderr


def test_a_rank_that_hangs_is_named_with_its_line(hanging: Launch) -> None:
    assert hanging.finish() != 0
    screen = hanging.stderr.read_text()
    (first,) = re.findall(r"rank . of 2 on host .* hangs since .*", screen)
    where = rf"\S+slow_weights\.py:{HANGING_LINE} in weigh"
    assert re.fullmatch(rf"rank 1 of 2 on host \S+ \(pid \d+\) hangs since \d+ s at step \d+, in \w+: {where}", first)
    # The other rank is seen to wait, in a real collective.
    assert re.search(r"rank 0 on host \S+ waits at step \d+, in .*/torch/distributed/.*", screen)
    assert 'train.py", line' not in screen
