"""Launches of fake ranks: real processes with a common parent, a common folder and a common screen."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from tests.launch import ROOT, environment
from tests.patience import wait


@dataclass
class Launch:
    """Some fake ranks.

    Attributes:
        screen: what all of them write on standard error.
    """

    folder: Path
    screen_path: Path
    ranks: list[subprocess.Popen[str]] = field(default_factory=list)

    @property
    def screen(self) -> str:
        return self.screen_path.read_text()

    def tell(self, rank: int, *lines: str) -> str:
        """Let a rank act, and wait until it has; returns its last answer."""
        answer = ""
        for line in lines:
            self.order(rank, line)
            answer = self.answer(rank)
        return answer

    def order(self, rank: int, line: str) -> None:
        """Let a rank act, without waiting: it will not answer."""
        process = self.ranks[rank]
        assert process.stdin is not None
        process.stdin.write(line + "\n")
        process.stdin.flush()

    def ask(self, rank: int, line: str) -> str:
        self.order(rank, line)
        answer = self.answer(rank)
        assert self.answer(rank) == "done"
        return answer

    def answer(self, rank: int) -> str:
        stdout = self.ranks[rank].stdout
        assert stdout is not None
        return stdout.readline().strip()

    def send(self, rank: int, number: signal.Signals) -> None:
        os.kill(self.ranks[rank].pid, number)

    def codes(self, *ranks: int) -> list[int]:
        """Exit codes of these ranks, all of them by default, once they have ended."""
        chosen = ranks or tuple(range(len(self.ranks)))
        return [wait(self.ranks[rank]) for rank in chosen]

    def seconds_until_end(self, *ranks: int) -> float:
        begun = time.monotonic()
        self.codes(*ranks)
        return time.monotonic() - begun


@contextmanager
def launch(
    folder: Path,
    size: int,
    *,
    port: int = 29500,
    options: list[dict[str, object]] | None = None,
    stderr: int | None = None,
    only: Sequence[int] | None = None,
) -> Iterator[Launch]:
    """Start `size` ranks that meet in `folder`; whatever still runs at the end is killed.

    Args:
        port: another one makes another launch of the same parent. options: of each rank, see fake_rank.py.
        stderr: their standard error, instead of a file. only: these of the ranks.
    """
    folder.mkdir(exist_ok=True)
    screen = folder / f"screen-{port}.txt"
    started = Launch(folder, screen)
    each = options or [{} for _ in range(size)]
    with screen.open("a") as file:
        for rank in range(size) if only is None else only:
            arguments = [str(rank), str(size), str(port), str(folder), json.dumps(each[rank])]
            process = subprocess.Popen(
                [sys.executable, "-m", "tests.unit.watchdog.fake_rank", *arguments],
                cwd=ROOT,
                env=environment(),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=file if stderr is None else stderr,
                text=True,
            )
            started.ranks.append(process)
    try:
        for rank in range(len(started.ranks)):
            assert started.answer(rank) == "ready", started.screen
        yield started
    finally:
        for process in started.ranks:
            process.kill()
            process.wait()
            for pipe in (process.stdin, process.stdout):
                if pipe is not None:
                    pipe.close()
