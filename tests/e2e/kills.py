"""A launch of real ranks that a test kills at a moment of its choice: their dials say what each of them does."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from seqaware.watchdog.host_process import Life
from seqaware.watchdog.rank_card import RankCard, read_card
from seqaware.watchdog.shared_status import RankPosition, read_position
from tests import launch
from tests.patience import Patience, wait_for

_BETWEEN_LOOKS = 0.0005
# The first word of a command whose ranks are forked, without a launcher: they end by themselves.
_FORKED = "forked"

_LAUNCHERS_OWN = re.compile(r"[WE]\d{4} \d\d:\d\d:\d\d\.\d+ |\[\d{4}-\d\d-\d\d ")

Wanted = Callable[[RankPosition], bool]


@dataclass(frozen=True)
class Ending:
    """How a launch ended after a rank was killed.

    Attributes:
        place: where the killed rank was. seconds: from the kill to the end of the launcher.
        screen: what came on standard error from then on. card: of the killed rank.
    """

    card: RankCard
    place: RankPosition
    seconds: float
    code: int
    screen: str

    @property
    def first_line(self) -> str:
        """Of what the ranks say: a launcher may have a word of its own to say before."""
        lines = [line for line in self.screen.splitlines() if line.strip() and not _LAUNCHERS_OWN.match(line)]
        return lines[0] if lines else ""


class Launch:
    """Ranks of one launch, whose dials are watched.

    Attributes:
        stdout, stderr: files of what all of them say.
    """

    launcher: subprocess.Popen[bytes] | launch.Forked

    def __init__(self, command: list[str], folder: Path, **extra: str) -> None:
        folder.mkdir(parents=True)
        self.stdout, self.stderr = folder / "stdout.txt", folder / "stderr.txt"
        if command[0] == _FORKED:
            self.launcher = forked = launch.Forked(command[1:], ranks=2, folder=folder, **extra)
            self._dials = (Path(tempfile.gettempdir(), f"seqaware-{os.getuid()}"), f"*-{forked.port}")
            return
        temporary = folder / "tmp"
        self._dials = (temporary, "seqaware-*/*")
        temporary.mkdir()
        with self.stdout.open("w") as out, self.stderr.open("w") as err:
            env = launch.environment(TMPDIR=str(temporary), **extra)
            self.launcher = subprocess.Popen(command, cwd=launch.ROOT, env=env, stdout=out, stderr=err)

    def card(self, rank: int) -> RankCard | None:
        return next(map(read_card, self._files(f"rank-{rank:04d}.json")), None)

    def place(self, rank: int) -> RankPosition | None:
        return next(map(read_position, self._files(f"rank-{rank:04d}.dial")), None)

    def _files(self, name: str) -> Iterator[Path]:
        folder, launches = self._dials
        return folder.glob(f"{launches}/{name}")

    def kill(self, rank: int, wanted: Wanted, *, later: float = 0.0) -> Ending:
        """Send SIGKILL to a rank in a place that is wanted, and wait for the end of the launch.

        Args:
            later: seconds that it goes on from there, to wherever that is.
        """
        card = self._stop_in_place(rank, wanted)
        shown = self.stderr.stat().st_size
        if later:
            os.kill(card.process.pid, signal.SIGCONT)
            time.sleep(later)
        os.kill(card.process.pid, signal.SIGKILL)
        begun = time.monotonic()
        while card.process.life() is not Life.GONE:
            time.sleep(_BETWEEN_LOOKS)
        place = self.place(rank)
        assert place is not None
        code = self.finish()
        seconds = time.monotonic() - begun
        screen = self.stderr.read_bytes()[shown:].decode()
        return Ending(card, place, seconds, code, screen)

    def wait_for(self, rank: int, wanted: Wanted) -> None:
        """Wait until a rank has come to a place that is wanted."""
        wait_for("the place", lambda: (place := self.place(rank)) is not None and wanted(place), problem=self._ended)

    def _ended(self) -> str | None:
        code = self.launcher.poll()
        return None if code is None else f"exit code {code}: {self.stderr.read_text()[-3000:]}"

    def _stop_in_place(self, rank: int, wanted: Wanted) -> RankCard:
        patience = Patience()
        while not patience.is_over() and self.launcher.poll() is None:
            place, card = self.place(rank), self.card(rank)
            if place is None or card is None or not wanted(place):
                time.sleep(_BETWEEN_LOOKS)
                continue
            # It may have gone on since: stopped, it can be looked at in peace.
            os.kill(card.process.pid, signal.SIGSTOP)
            place = self.place(rank)
            assert place is not None
            if wanted(place):
                return card
            os.kill(card.process.pid, signal.SIGCONT)
        raise AssertionError(f"the moment never came: {self.stderr.read_text()[-3000:]}")

    def end(self) -> None:
        """End what still runs of it."""
        for rank in range(2):
            card = self.card(rank)
            if card is not None:
                card.process.kill()
        self.finish()

    def finish(self) -> int:
        """Wait for the end of the launch; returns its exit code."""
        wait_for("the end of the launch", lambda: self.launcher.poll() is not None, every=0.01)
        code = self.launcher.poll()
        assert code is not None
        return code


def forked(*arguments: str) -> list[str]:
    return [_FORKED, "launcher/train.py", *arguments]


def deepspeed(*arguments: str) -> list[str]:
    port = str(launch.free_port())
    return ["deepspeed", "--num_gpus", "2", "--master_port", port, "launcher/train.py", *arguments]


def mpirun(*arguments: str) -> list[str]:
    return ["mpirun", "-n", "2", sys.executable, "launcher/train.py", *arguments]


def torchrun(*arguments: str) -> list[str]:
    port = str(launch.free_port())
    return ["torchrun", "--nproc-per-node", "2", "--master-port", port, "launcher/train.py", *arguments]
