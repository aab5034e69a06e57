"""Ranks that stand still: where this one's main thread is, and which of all ranks the others wait for."""

from __future__ import annotations

import sys
import threading
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from types import FrameType

from seqaware.watchdog.rank_card import RankCard, Stuck
from seqaware.watchdog.shared_status import RankPosition

# Innermost frames of a thread that waits for other ranks, or for a device that does.
_WAITING_FILES = ("/torch/distributed/", "/deepspeed/comm/", "/torch/cuda/streams.py", "/compat/build_lock.py")
_WAITING_CALLS = ("wait", "wait_for_handle")
_LIBRARIES = ("/torch/", "/deepspeed/")
_COMMAND_LINE = "/site-packages/typer/"  # frames that say nothing
_BACKWARD = "_engine_run_backward"
# A monitor beats every second; a busy host may let it wait.
_SILENT_SECONDS = 5.0


@dataclass(frozen=True)
class RankStanding:
    """One rank, as seen when nothing moves.

    Attributes:
        card: None for a rank that has never shown itself.
        idle, silent: seconds since its main thread and its monitor have moved.
        stopped: whether its process is seen to be stopped, by SIGSTOP say.
    """

    rank: int
    card: RankCard | None
    place: RankPosition
    idle: float
    silent: float
    stopped: bool = False

    def answers(self, hang_seconds: float) -> bool:
        return self.card is not None and self.silent < max(hang_seconds / 2, _SILENT_SECONDS)

    @property
    def stuck(self) -> Stuck | None:
        return self.card.stuck if self.card is not None else None


def awaited(standings: Sequence[RankStanding], *, hang_seconds: float) -> list[RankStanding] | None:
    """The ranks that the others wait for, all of them if nothing tells them apart; None while any of them moves.

    First who does not answer at all; then who is outside of a collective while others are inside; of those, or of all,
    who is behind. Ranks that have ended as they should are left out.
    """
    there = [each for each in standings if each.card is None or each.card.status != "ended"]
    answering = [each for each in there if each.answers(hang_seconds)]
    # Each has counted by itself; what we have counted of it began later.
    if any(each.stuck is None or each.idle < hang_seconds / 2 for each in answering):
        return None
    mute = [each for each in there if not each.answers(hang_seconds)]
    if mute:
        return mute
    outside = [each for each in answering if each.stuck is not None and not each.stuck.waits]
    pool = outside or answering
    behind = min((each.place.step, each.place.turn) for each in pool)
    return [each for each in pool if (each.place.step, each.place.turn) == behind]


def inspect_main_thread(seconds: float) -> Stuck:
    """Where the main thread stands; touches no file, as a file system may be what it waits for.

    Args:
        seconds: since it last moved.
    """
    frames = sys._current_frames()
    main = frames.pop(threading.main_thread().ident or 0, None)
    frames.pop(threading.get_ident(), None)
    stack = _stack(main)
    if not stack:
        return Stuck(seconds, "nowhere in Python", [], waits=False)
    waits = _waits(stack[-1])
    if stack[-1].name == _BACKWARD:
        # On a GPU the gradients' hooks, with their collectives, run in a thread of autograd's.
        waits = any(other and _waits(other[-1]) for other in map(_stack, frames.values()))
    lines = [f"{frame.filename}:{frame.lineno} in {frame.name}" for frame in stack]
    return Stuck(seconds, lines[-1], lines, waits)


def _stack(frame: FrameType | None) -> list[traceback.FrameSummary]:
    if frame is None:
        return []
    stack = traceback.StackSummary.extract(traceback.walk_stack(frame), lookup_lines=False)
    return [each for each in reversed(stack) if _COMMAND_LINE not in each.filename]


def _waits(frame: traceback.FrameSummary) -> bool:
    if any(part in frame.filename for part in _WAITING_FILES):
        return True
    return frame.name in _WAITING_CALLS and any(part in frame.filename for part in _LIBRARIES)
