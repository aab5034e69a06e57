"""What grows with the number of ranks, without the ranks: a step's layout, checkpoint listings, the watchdog's files.

    python -m benchmarks.worlds [--ranks 64 256 1024 4096] [--out FILE]

The work of one rank, or of one host of eight, is done for real in a world of N ranks whose files are made here. Counted
are CPU seconds, and opens, stats, directory listings and writes below a folder that stands for the shared file system.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import pickle
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks.machine import machine
from seqaware.checkpoint.manifest import (
    MANIFEST,
    Listing,
    first_wrong_hash,
    inspect,
    named_checkpoints,
    sealed,
)
from seqaware.data.packing import layout_step
from seqaware.data.sampler import StepSampler
from seqaware.distributed.launch_environment import LaunchEnvironment
from seqaware.watchdog.launch_directory import host_file, open_launch_directory
from seqaware.watchdog.monitor import Monitor
from seqaware.watchdog.own_rank import OwnRank
from seqaware.watchdog.rank_card import Stuck, write_cards

RANKS = (64, 256, 1024, 4096)
RANKS_OF_HOST = 8
DOCUMENTS_PER_RANK = 64
CAPACITY = 8192
REPEATS = 5
HANG_SECONDS = 600.0


class Requests(Counter[str]):
    """How often a process asked for what is below a folder: opens (for reading), writes, listings, stats.

    A file that is replaced by another one counts as two writes: its opening and its renaming.

    Attributes:
        paths: that were asked for, relative to the folder.
    """

    def __init__(self, folder: str) -> None:
        super().__init__()
        self.folder = folder
        self.paths: set[str] = set()

    def hear(self, kind: str, path: Any) -> None:
        name = os.fsdecode(path)
        if name.startswith(self.folder):
            self[kind] += 1
            self.paths.add(os.path.relpath(name, self.folder))


_heard: list[Requests] = []


def _hear(event: str, arguments: tuple[Any, ...]) -> None:
    """Count an event of Python's audit hooks for every folder that is being counted."""
    if not _heard or event not in ("open", "os.scandir", "os.listdir", "os.rename"):
        return
    path = arguments[0]
    if not isinstance(path, str | bytes | os.PathLike):
        return
    kind = {"open": "opens", "os.rename": "writes"}.get(event, "listings")
    if event == "open" and len(arguments) > 2 and isinstance(arguments[2], int) and arguments[2] & os.O_ACCMODE:
        kind = "writes"
    for requests in _heard:
        requests.hear(kind, path)


sys.addaudithook(_hear)


@contextmanager
def counted(folder: Path) -> Iterator[Requests]:
    """Count what Python code of this process asks for below `folder`."""
    requests = Requests(str(folder))

    def counting(function: Callable[..., os.stat_result]) -> Callable[..., os.stat_result]:
        def wrapped(path: Any, *arguments: Any, **keywords: Any) -> os.stat_result:
            if not isinstance(path, int):
                requests.hear("stats", path)
            return function(path, *arguments, **keywords)

        return wrapped

    _heard.append(requests)
    try:
        with mock.patch.object(os, "stat", counting(os.stat)), mock.patch.object(os, "lstat", counting(os.lstat)):
            yield requests
    finally:
        _heard.remove(requests)


def step_layout(ranks: int, *, packed: bool) -> dict[str, float]:
    """CPU seconds of one rank for a step: which documents it holds, and how they lie on all ranks."""
    documents = ranks * DOCUMENTS_PER_RANK
    draws = np.random.default_rng(0).lognormal(6.2, 1.0, 2 * documents)
    lengths = np.clip(draws, 8, CAPACITY).astype(np.int32)
    order = StepSampler(lengths, fingerprint="worlds", seed=0, global_batch_size=documents)

    def lay_out() -> None:
        ids = order.documents(0, 0)
        layout_step(ids, lengths[ids], capacity=CAPACITY, ranks=ranks, packed=packed).micro_batches(ranks - 1)

    lay_out()  # the first call compiles
    return {"cpu_seconds": round(min(_cpu_seconds(lay_out) for _ in range(REPEATS)), 4)}


def checkpoint_listing(ranks: int) -> dict[str, Any]:
    """What rank 0, and what another rank, ask for when a checkpoint of N ranks (ZeRO-3) is checked before loading."""
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = _make_checkpoint(Path(folder, "checkpoints", "step-00000004"), ranks)
        rows = {}
        with counted(checkpoint.parent) as first:
            started = time.process_time()
            (newest, *_) = named_checkpoints(checkpoint.parent)
            listing = inspect(newest)
            assert isinstance(listing, Listing), listing
            rows["rank_0"] = {**first, "cpu_seconds": round(time.process_time() - started, 4)}
        message = pickle.dumps(listing)
        with counted(checkpoint.parent) as other:
            started = time.process_time()
            assert first_wrong_hash(pickle.loads(message), rank=ranks - 1, size=ranks) is None
            rows["another_rank"] = {**other, "cpu_seconds": round(time.process_time() - started, 4)}
        rows["another_rank"]["message_mb"] = round(len(message) / 1e6, 3)
        return rows


def _make_checkpoint(checkpoint: Path, ranks: int) -> Path:
    """A valid checkpoint with the file names of ZeRO-3 and no tensors."""
    checkpoint.mkdir(parents=True)
    content = b"tensors"
    record = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    zero = "zero_pp_rank_{}_mp_rank_00_{}_states.pt"
    names = [name for rank in range(ranks) for name in (zero.format(rank, "model"), zero.format(rank, "optim"))]
    names += [f"rng-{rank}.pt" for rank in range(ranks)]
    for name in names:
        (checkpoint / name).write_bytes(content)
    manifest = {"step": 4, "epoch": 0, "passed_over": [], "data_fingerprint": "", "plan_hash": "", "mathematics": {}}
    manifest |= {"topology": {"ranks": ranks, "zero_stage": 3}, "files": dict.fromkeys(names, record)}
    (checkpoint / MANIFEST).write_text(json.dumps(sealed(manifest)), encoding="utf-8")
    return checkpoint


def watchdog(ranks: int, *, stuck: bool) -> dict[str, float]:
    """One period of the watchdogs of a host's eight ranks: what they ask of the shared file system.

    Args:
        stuck: no rank has moved for so long that the hosts look at each other.
    """
    with tempfile.TemporaryDirectory() as folder:
        base = Path(folder)
        shared = base / "shared" / "logs" / "attempt-001"
        shared.mkdir(parents=True)
        monitors = [_monitor(rank, ranks, base=base / "local", shared=shared) for rank in range(RANKS_OF_HOST)]
        _make_other_hosts(monitors[0], ranks, shared)
        for monitor in monitors:
            monitor._peers.look_around(1.0)
        for monitor in monitors if stuck else ():
            monitor._idle.see(monitor._own.dial.place().moves, 0.0)
            monitor._idle.see(monitor._own.dial.place().moves, HANG_SECONDS / 2)
        seconds = monitors[0]._own.share_seconds
        started = time.process_time()
        with counted(base / "shared") as counts:
            for monitor in monitors:
                monitor._look(seconds, woken=True)
        return {**counts, "seconds_between": seconds, "cpu_seconds": round(time.process_time() - started, 4)}


def _monitor(rank: int, ranks: int, *, base: Path, shared: Path) -> Monitor:
    base.mkdir(exist_ok=True)
    hosts = ranks // RANKS_OF_HOST
    address = LaunchEnvironment(rank, ranks, rank, RANKS_OF_HOST, hosts, "test", "127.0.0.1", 29500)
    own = OwnRank(address, open_launch_directory(address, base))
    own.hang_seconds = HANG_SECONDS
    own.settle(shared)
    return Monitor(own)


def _make_other_hosts(monitor: Monitor, ranks: int, shared: Path) -> None:
    """The files of the other hosts, whose ranks have been stuck in a collective for as long."""
    stuck = Stuck(HANG_SECONDS / 2, "in all_reduce", ["in all_reduce"] * 20, waits=True)
    for first in range(RANKS_OF_HOST, ranks, RANKS_OF_HOST):
        cards = [replace(monitor._own.card, rank=first + i, stuck=stuck) for i in range(RANKS_OF_HOST)]
        write_cards(host_file(shared, first), cards)


def _cpu_seconds(work: Callable[[], object]) -> float:
    started = time.process_time()
    work()
    return time.process_time() - started


def measure(ranks: int) -> dict[str, Any]:
    return {
        "ranks": ranks,
        "step_packed": step_layout(ranks, packed=True),
        "step_unpacked": step_layout(ranks, packed=False),
        "checkpoint": checkpoint_listing(ranks),
        "watchdog_host": watchdog(ranks, stuck=False),
        "watchdog_host_stuck": watchdog(ranks, stuck=True),
    }


def show(rows: list[dict[str, Any]], console: Console) -> None:
    table = Table("ranks", *(name for name in rows[0] if name != "ranks"), title="one rank, or one host of eight")
    for row in rows:
        table.add_row(str(row["ranks"]), *(_cell(row[name]) for name in row if name != "ranks"))
    console.print(table)


def _cell(figures: dict[str, Any]) -> str:
    return "\n".join(
        f"{key}: {_cell(value)}" if isinstance(value, dict) else f"{key} {value:g}" for key, value in figures.items()
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=RANKS)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "worlds.json")
    arguments = parser.parse_args()
    rows = [measure(ranks) for ranks in arguments.ranks]
    show(rows, Console(width=180))
    arguments.out.write_text(json.dumps({"machine": machine(), "worlds": rows}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
