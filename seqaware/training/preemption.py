"""What asks a run to save, or to save and leave: signals, files in its folder, the clock.

A signal may reach one rank only, and only rank 0 looks at files and clocks. What this rank was asked goes into a vote
of all ranks (`Votes`), so that all of them act after the same step. Imports without torch.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from enum import IntFlag
from pathlib import Path
from types import FrameType, TracebackType
from typing import Self

from seqaware.config.output_config import FaultsConfig
from seqaware.distributed.launch_environment import LaunchEnvironment

LEFT = 85
"""Exit code of a run that saved and left because it was asked to; the same command goes on."""

# Not SIGUSR1: NCCL catches it.
_SIGNALS = (signal.SIGTERM, signal.SIGUSR2, signal.SIGINT)
_SECONDS_BETWEEN_LOOKS = 1.0
_LARGEST_SHARE_OF_LIMIT = 0.25
# A clock that is behind by no more does no harm: a run leaves minutes before its limit.
_SLACK_SECONDS = 60.0


class ShutdownRequest(IntFlag):
    """What a run is asked to do; the highest of all ranks' counts. Only rank 0 asks for less than to leave."""

    NOTHING = 0
    EVALUATE = 1
    SAVE = 2
    LEAVE = 4


class PreemptedExit(SystemExit):
    """The run was asked to leave and left; ends the command with `LEFT`.

    Args:
        together: all ranks leave, after the same step; else this rank had not begun to train.
    """

    def __init__(self, reason: str, *, together: bool) -> None:
        super().__init__(LEFT)
        self.reason = reason
        self.together = together


def _never() -> bool:
    return False


class Signals:
    """Catch SIGTERM, SIGUSR2 and SIGINT from the first moment of a process.

    Before the training there is nothing to save, and the process leaves at once. From `hold` on a signal is only noted,
    for the vote of all ranks. A second SIGINT ends the process in any case.

    Args:
        abandoned: whether another rank is gone: a launcher then sends SIGTERM to the rest, who cannot save any more.

    Attributes:
        caught: the signal that asks to leave, or None. A SIGTERM after Ctrl-C is the launcher's answer to it: deepspeed
            and torchrun send it, and it would hide what the user did.
    """

    def __init__(self, abandoned: Callable[[], bool] = _never) -> None:
        self.caught: signal.Signals | None = None
        self._abandoned = abandoned
        self._held = False
        self._former: dict[signal.Signals, signal._HANDLER] = {}

    def __enter__(self) -> Self:
        for number in _SIGNALS:
            self._former[number] = signal.signal(number, self._hear)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for number, handler in self._former.items():
            # A launcher that sends SIGTERM after Ctrl-C, or to the ranks that are left, shall not kill this one while
            # it tells the others how it ends.
            leaves = isinstance(error, PreemptedExit) and number != signal.SIGINT
            signal.signal(number, signal.SIG_IGN if leaves else handler)

    @property
    def reason(self) -> str | None:
        """What was caught, for a user; None if nothing was."""
        return None if self.caught is None else _words(self.caught)

    def hold(self) -> None:
        """The training begins: note signals, and leave it to the vote when to leave."""
        self._held = True

    def _hear(self, number: int, frame: FrameType | None) -> None:
        del frame
        if number == signal.SIGTERM and self._abandoned():
            return  # The watchdog ends this process and reports why; an exception from here could come up anywhere.
        before = self.caught
        if before == number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            raise KeyboardInterrupt
        if before != signal.SIGINT:
            self.caught = signal.Signals(number)
        if before is None and not self._held:
            raise PreemptedExit(_words(self.caught or number), together=False)


def _words(number: int) -> str:
    return "SIGINT (Ctrl-C)" if number == signal.SIGINT else signal.Signals(number).name


@dataclass(frozen=True)
class Minutes:
    """By rank 0's clock, how often to save and how often to look at the held-out rows; None: never for the time."""

    save: float | None = None
    evaluate: float | None = None


def _is_due(minutes: float | None, seconds: float) -> bool:
    return minutes is not None and seconds >= 60.0 * minutes


class PreemptionMonitor:
    """What this rank is asked to do now.

    Args:
        folder: the run's; a person may `touch` STOP or SAVE in it.
        first: whether this is rank 0, which alone looks at files and clocks.
        seconds_left: until the run shall leave; None: no limit.
        clock: seconds that only ever rise.
    """

    def __init__(
        self,
        signals: Signals,
        folder: Path,
        *,
        first: bool,
        seconds_left: float | None,
        minutes: Minutes,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.reason: str | None = None
        self._signals = signals
        self._stop, self._save = folder / "STOP", folder / "SAVE"
        self._first = first
        self._clock = clock
        self._deadline = None if seconds_left is None else clock() + seconds_left
        self._minutes = minutes
        self._saved = self._evaluated = clock()
        self._looked = float("-inf")
        self._seen = ShutdownRequest.NOTHING

    def asked(self) -> ShutdownRequest:
        """This rank's part of the vote; `reason` then says why."""
        if self._signals.reason is not None:
            self.reason = self._signals.reason
            return ShutdownRequest.LEAVE
        now = self._clock()
        if self._first and now - self._looked >= _SECONDS_BETWEEN_LOOKS:
            self._looked = now
            self._seen = self._look(now)
        return self._seen

    def _look(self, now: float) -> ShutdownRequest:
        if self._stop.exists():
            self.reason = f"the file {self._stop}"
            return ShutdownRequest.LEAVE
        if self._deadline is not None and now >= self._deadline:
            self.reason = "the time limit is near"
            return ShutdownRequest.LEAVE
        asked = ShutdownRequest.NOTHING
        if self._save.exists() or _is_due(self._minutes.save, now - self._saved):
            asked |= ShutdownRequest.SAVE
        if _is_due(self._minutes.evaluate, now - self._evaluated):
            asked |= ShutdownRequest.EVALUATE
        return asked

    def saved(self) -> None:
        """A checkpoint was written, or could not be: a file of request has done its duty, the minutes count anew."""
        self._saved = self._clock()
        self._seen, self._looked = ShutdownRequest.NOTHING, float("-inf")
        if self._first:
            with suppress(OSError):  # a folder that may only be read
                self._save.unlink(missing_ok=True)

    def evaluated(self) -> None:
        """The held-out rows were looked at, for whichever reason: the minutes count anew."""
        self._evaluated = self._clock()
        self._seen, self._looked = ShutdownRequest.NOTHING, float("-inf")

    def left(self) -> None:
        """The run leaves: the next one shall not find its request."""
        if self._first:
            self._stop.unlink(missing_ok=True)


def clock_ahead_of_job(address: LaunchEnvironment, *, now: float) -> float:
    """Seconds by which this host's clock is ahead of the batch system's, at least; less than 0: behind; 0: it agrees.

    The job runs now, so that a time before its begin or after its end is a clock that is wrong.

    Args:
        now: seconds since 1970, of this host's clock.
    """
    if address.job_ends is not None and now > address.job_ends:
        return now - address.job_ends
    if address.job_began is not None and now < address.job_began - _SLACK_SECONDS:
        return now - address.job_began
    return 0.0


def seconds_until_shutdown(faults: FaultsConfig, address: LaunchEnvironment, *, now: float) -> float | None:
    """How long the run may train before it saves and leaves; None without any limit.

    The end of a job counts only where the clock agrees with the batch system's. Else a run on a host whose clock is
    ahead would leave after its first step, and again whenever it is started; the batch system's signal is left to it.

    Args:
        now: seconds since 1970, of this host's clock.
    """
    limits = [] if faults.time_limit_minutes is None else [faults.time_limit_minutes * 60.0]
    if address.job_ends is not None and not clock_ahead_of_job(address, now=now):
        limits.append(address.job_ends - now)
    if not limits:
        return None
    limit = min(limits)
    return limit - min(faults.leave_minutes * 60.0, limit * _LARGEST_SHARE_OF_LIMIT)
