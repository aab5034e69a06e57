"""What a rank tells of itself while it works: its place, its log, and whether it ended as it should.

    heartbeat = start_heartbeat(address)          # before the slow imports and the tokenising
    heartbeat.watch_hangs(minutes)                # once the config is read
    heartbeat.phase("tokenising")                 # the main thread's place; `pulse` inside a long phase
    heartbeat.settle(run_folder, attempt=3)       # the log moves into the run's folder
    heartbeat.close()                             # a clean end, with whatever exit code

`Heartbeat` itself tells nobody: for tests, verification and whatever is not watched. Imports without torch.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from threading import Lock
from typing import Any

from seqaware.engine.address import RankAddress
from seqaware.training.watch.card import Card
from seqaware.training.watch.dial import Dial
from seqaware.training.watch.launch_folder import LaunchFolder, open_launch_folder
from seqaware.training.watch.process import Process, host_name
from seqaware.training.watch.rank_log import RankLog

# These change several times a step: they go to the dial, not to the log.
_QUICK = frozenset(("forward", "backward", "reduce", "optimizer step", "batches"))


class Heartbeat:
    """The interface, for a rank that nobody watches."""

    def phase(self, name: str, step: int | None = None) -> None:
        """The main thread begins something else. Cheap: called several times a step.

        Args:
            name: at most 48 bytes. step: the optimizer step (from 1); None leaves it as it was.
        """

    def pulse(self) -> None:
        """Progress inside a phase that may take longer than a rank may hang: rows, files, generated tokens."""

    def note(self, text: str) -> None:
        """A line for this rank's log file."""

    def watch_hangs(self, minutes: float | None) -> None:
        """From now on a rank that does not move for so long ends the launch; None: never."""

    def settle(self, run: Path, attempt: int) -> None:
        """The run's folder is claimed: the log moves to `run`/logs/attempt-NNN/rank-NNNN.log.

        Args:
            attempt: the same on every rank, and another one in every launch.
        """

    def sibling_is_dead(self) -> bool:
        """Whether another rank is gone or has failed, so that nothing collective can succeed. For signal handlers."""
        return False

    def close(self, code: int = 0) -> None:
        """A clean end: nobody shall miss this rank. Also for exit codes that say more than 0, such as 85."""


class WatchedHeartbeat(Heartbeat):
    """A rank of a launch, in `folder`."""

    def __init__(self, address: RankAddress, folder: LaunchFolder) -> None:
        self.address = address
        self.folder = folder
        self.dial = Dial(folder.dial(address.rank))
        self.log = RankLog(folder.log(address.rank))
        self.hang_seconds: float | None = None
        self.shared: Path | None = None
        self._lock = Lock()
        self._card = Card(
            rank=address.rank,
            size=address.size,
            host=host_name(),
            process=Process.of_myself(),
            log=str(self.log.path),
            place=self.dial.place(),
        )
        self.update()

    def phase(self, name: str, step: int | None = None) -> None:
        self.dial.turn_to(name, step)
        if name not in _QUICK:
            self.log.note(name if step is None else f"{name}, step {step}")

    def pulse(self) -> None:
        self.dial.move()

    def note(self, text: str) -> None:
        self.log.note(text)

    def watch_hangs(self, minutes: float | None) -> None:
        self.hang_seconds = None if minutes is None else minutes * 60.0

    def settle(self, run: Path, attempt: int) -> None:
        shared = run / "logs" / f"attempt-{attempt:03d}"
        self.log.move(shared / f"rank-{self.address.rank:04d}.log")
        self.update(log=str(self.log.path))
        self.shared = shared

    def close(self, code: int = 0) -> None:
        self.note(f"ended with exit code {code}")
        self.update(status="ended", code=code)
        self.folder.remove_if_all_ended(self.address.local_size)

    def update(self, **changes: Any) -> Card:
        """Change this rank's card and write it."""
        with self._lock:
            self._card = replace(self._card, place=self.dial.place(), **changes)
            self._card.write(self.folder.card(self.address.rank))
            return self._card


def start_heartbeat(address: RankAddress, base: Path | None = None) -> WatchedHeartbeat:
    """Begin to be watched, and to watch the others of this host.

    Args:
        base: where ranks of one host meet, instead of the folder for temporary files.

    Raises:
        ConfigError: that folder cannot be used.
    """
    heartbeat = WatchedHeartbeat(address, open_launch_folder(address, base))
    heartbeat.log.hear_the_process()
    heartbeat.note(f"rank {address.rank} of {address.size}, pid {Process.of_myself().pid}")
    return heartbeat
