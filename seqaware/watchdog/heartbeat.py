"""What a rank tells of itself while it works, and how it ends.

    heartbeat = start_heartbeat(address)          # before the slow imports and the tokenising
    heartbeat.watch_hangs(minutes)                # once the config is read
    heartbeat.phase("tokenising")                 # the main thread's place; `pulse` inside a long phase
    heartbeat.settle(run_folder, attempt=3)       # the log moves into the run's folder
    heartbeat.close()                             # a clean end, with whatever exit code; or heartbeat.fail(error)

`Heartbeat` itself tells nobody: for tests, verification and whatever is not watched. Imports without torch.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from seqaware.compat.build_lock import BuildListener, listen
from seqaware.distributed.launch_environment import LaunchEnvironment
from seqaware.watchdog.exit_cause import fail
from seqaware.watchdog.first_error import keep_screen
from seqaware.watchdog.guard import is_needed, start_guard
from seqaware.watchdog.launch_directory import LaunchDirectory, open_launch_directory, unusable
from seqaware.watchdog.monitor import Monitor
from seqaware.watchdog.own_rank import OwnRank
from seqaware.watchdog.peers import missed_now

# These change several times a step: they go to the dial, not to the log.
_QUICK = frozenset(("forward", "backward", "reduce", "optimizer step", "batches"))
_SECONDS_BETWEEN_STEPS = 5.0


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

    def reported(self, lines: Sequence[Mapping[str, Any]]) -> None:
        """Lines of `metrics.jsonl` that this rank knows; the log gets one every few seconds."""

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

    def __init__(self, address: LaunchEnvironment, folder: LaunchDirectory, *, host: str | None = None) -> None:
        self.own = OwnRank(address, folder, host=host)
        self._monitor = Monitor(self.own)
        self._reported = float("-inf")

    def start(self) -> None:
        """Begin to watch and to be watched."""
        self.own.log.hear_the_process()
        self.note(f"{self.own.card.name()} starts")
        if is_needed(self.own.address):
            self.own.guarded = True
            if self.own.address.local_rank == 0:
                self.own.guard = start_guard(self.own.address, self.own.folder)
        listen(_Builds(self.own))
        self._monitor.start()

    def phase(self, name: str, step: int | None = None) -> None:
        self.own.dial.turn_to(name, step)
        if name not in _QUICK:
            self.own.log.note(name if step is None else f"{name}, step {step}")

    def pulse(self) -> None:
        self.own.dial.move()

    def note(self, text: str) -> None:
        self.own.log.note(text)

    def reported(self, lines: Sequence[Mapping[str, Any]]) -> None:
        now = time.monotonic()
        if lines and now - self._reported >= _SECONDS_BETWEEN_STEPS:
            self._reported = now
            figures = ("step", "loss", "grad_norm", "lr", "tokens_per_second")
            self.note("  ".join(f"{name} {lines[-1][name]:.6g}" for name in figures if name in lines[-1]))

    def watch_hangs(self, minutes: float | None) -> None:
        self.own.hang_seconds = None if minutes is None else minutes * 60.0

    def settle(self, run: Path, attempt: int) -> None:
        self.own.settle(run / "logs" / f"attempt-{attempt:03d}")

    def sibling_is_dead(self) -> bool:
        return self.own.told() or bool(missed_now(self.own))

    def fail(self, error: BaseException) -> int:
        """The rank ends with an exception. Shows what is to be shown, once in a launch; returns the exit code."""
        return fail(self.own, self._monitor, error)

    def close(self, code: int = 0) -> None:
        if self.own.card.status == "ended":
            return
        self._monitor.stop()
        self.note(f"ends with exit code {code}")
        self.own.update(status="ended", code=code)
        if self.own.address.nodes > 1:
            self.own.share()
        self.own.folder.remove_if_all_ended(self.own.address.local_size)


class _Builds(BuildListener):
    """An operator that is compiled, by this rank or by the process it waits for, is progress."""

    def __init__(self, own: OwnRank) -> None:
        super().__init__(quiet=own.address.local_rank != 0)
        self._own = own

    def moved(self) -> None:
        self._own.dial.move()

    def builds(self, text: str) -> None:
        self._own.log.note(text)
        super().builds(text)

    def waits(self, text: str) -> None:
        self._own.log.note(text)
        super().waits(text)


def start_heartbeat(
    address: LaunchEnvironment, base: Path | None = None, *, host: str | None = None
) -> WatchedHeartbeat:
    """Begin to be watched, and to watch the others of this host.

    Args:
        base: where ranks of one host meet, instead of the folder for temporary files. host: this host's name.

    Raises:
        ConfigError: that folder cannot be used, or another launch is using it.
    """
    keep_screen()
    folder = open_launch_directory(address, base)
    try:
        with folder.take_place(address.rank, size=address.size):
            heartbeat = WatchedHeartbeat(address, folder, host=host)
    except OSError as error:
        raise unusable(error) from error
    heartbeat.start()
    return heartbeat
