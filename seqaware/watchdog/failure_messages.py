"""How a launch ended, in words: who, where, at which step, their last lines, what to do."""

from __future__ import annotations

import signal
import textwrap
from collections.abc import Sequence
from pathlib import Path

from seqaware.files import read_text
from seqaware.metrics.progress import duration
from seqaware.watchdog.hang_report import RankStanding
from seqaware.watchdog.host_process import ending
from seqaware.watchdog.peers import Peer
from seqaware.watchdog.rank_card import RankCard
from seqaware.watchdog.rank_log import last_lines

_LAST_LINES = 10
# A fatal signal writes a stack, and a failure its traceback: they shall be seen whole.
_LAST_LINES_OF_STACK = 40
_STACK_BEGINS = "Fatal Python error"
_MOST_RANKS_IN_FULL = 3


def dead_ranks_message(dead: Sequence[Peer], *, memory_kills: int, shared: Path | None) -> str:
    """What survivors say of ranks that are gone without a word.

    Args:
        memory_kills: how many processes the kernel has ended for want of memory since the launch began.
        shared: the attempt's folder, if the run's folder is claimed.
    """
    parts = [_of_one_dead(peer) for peer in dead[:_MOST_RANKS_IN_FULL]]
    if len(dead) > _MOST_RANKS_IN_FULL:
        rest = ", ".join(str(peer.card.rank) for peer in dead[_MOST_RANKS_IN_FULL:])
        parts.append(f"gone as well: ranks {rest}")
    hint = _why_dead(dead, memory_kills)
    return "\n".join([*parts, *([hint] if hint else []), resume_hint(shared)])


def _of_one_dead(peer: Peer) -> str:
    head = f"{peer.card.name()} {ending(peer.exit_status)} {peer.place.words()}"
    return f"{head}\n{_tail(peer.card)}"


def _why_dead(dead: Sequence[Peer], memory_kills: int) -> str | None:
    if memory_kills:
        times = "once" if memory_kills == 1 else f"{memory_kills} times"
        return (
            f"The kernel's out-of-memory killer has struck {times} on this host since the launch began (see dmesg): "
            "lower training.schedule.micro_batch_tokens, use fewer dataset.workers, or offload less to the CPU."
        )
    signals = {peer.exit_status & 0x7F if peer.exit_status is not None else signal.SIGKILL for peer in dead}
    if signals <= {signal.SIGKILL}:
        return (
            "The kernel's out-of-memory killer has ended nothing on this host meanwhile. SIGKILL also comes from a "
            "person, or from a batch system that enforces a memory limit (SLURM: sacct -j JOB -o JobID,State,MaxRSS)."
        )
    if signal.SIGBUS in signals:
        return "SIGBUS is what a process gets that writes to a full /dev/shm or to a file that was cut."
    return None


def lost_rank_message(card: RankCard, *, silent: Sequence[Peer], shared: Path | None) -> str:
    """What a rank says whose connections broke, when no rank of its host is missing.

    Args:
        card: with its message. silent: ranks of other hosts that show themselves no more.
    """
    lines = [f"{card.name()} lost its connection to another rank {card.place.words()}: {card.message}"]
    lines += [
        f"{peer.card.name()} answers no more; last seen {peer.place.words()}\n{_tail(peer.card)}" for peer in silent
    ]
    return "\n".join([*lines, f"its log: {card.log}", resume_hint(shared)])


def failed_rank_message(card: RankCard, trace: str, shared: Path | None) -> str:
    """What a rank says that failed by an error of its own, a bug or a device without memory.

    Args:
        card: with its message. trace: the traceback.
    """
    head = f"{card.name()} failed {card.place.words()}: {card.message}"
    return f"{head}\n{trace.rstrip()}\n{resume_hint(shared)}"


def hanging_ranks_message(
    awaited: Sequence[RankStanding], standings: Sequence[RankStanding], *, hang_seconds: float, shared: Path | None
) -> str:
    """What the ranks say that wait in vain.

    Args:
        awaited: whom they wait for. standings: all ranks, by rank.
    """
    waiting = [each for each in standings if each not in awaited and each.card and each.card.status != "ended"]
    ended = [str(each.rank) for each in standings if each.card and each.card.status == "ended"]
    lines = []
    if len(awaited) > 1 and not waiting:
        lines.append("all ranks stand still and nothing tells them apart: they wait for each other, or for the network")
    lines += [_of_one_hanging(each, hang_seconds) for each in awaited[:_MOST_RANKS_IN_FULL]]
    if rest := awaited[_MOST_RANKS_IN_FULL:]:
        lines.append("just so: ranks " + ", ".join(str(each.rank) for each in rest))
    for each in waiting[:_MOST_RANKS_IN_FULL]:
        assert each.card is not None
        where = f": {each.stuck.where}" if each.stuck else ""
        lines.append(f"rank {each.rank} on host {each.card.host} waits {each.place.words()}{where}")
    if len(waiting) > _MOST_RANKS_IN_FULL:
        lines.append(f"and {len(waiting) - _MOST_RANKS_IN_FULL} other ranks wait")
    if ended:
        lines.append("ended before: rank " + ", ".join(ended))
    lines.append("This comes after faults.hang_minutes without progress; raise it if so long a silence is usual here.")
    return "\n".join([*lines, resume_hint(shared)])


def _of_one_hanging(each: RankStanding, hang_seconds: float) -> str:
    card = each.card
    if card is None:
        return f"rank {each.rank} has never shown itself to the others"
    if each.stuck is None or not each.answers(hang_seconds):
        stopped = " (its process is stopped)" if each.stopped else ""
        return (
            f"{card.name()} does not answer since {duration(each.silent)}{stopped}; "
            f"last seen {each.place.words()}\n{_tail(card)}"
        )
    stack = textwrap.indent("\n".join(each.stuck.stack), "    ")
    return f"{card.name()} hangs since {duration(each.idle)} {each.place.words()}: {each.stuck.where}\n{stack}"


def resume_hint(shared: Path | None) -> str:
    """What the same command will do."""
    if shared is None:
        return "Once this is mended, the same command goes on from the newest checkpoint, if there is one."
    try:
        newest = read_text(shared.parent.parent / "checkpoints" / "latest", limit=2**10)
        step = int(newest.strip().removeprefix("step-"))
    except (OSError, ValueError):
        return "Nothing is saved yet: the same command begins anew."
    return f"The same command goes on after step {step}, the newest that is saved."


def _tail(card: RankCard) -> str:
    log = Path(card.log)
    lines = last_lines(log, _LAST_LINES_OF_STACK)
    fatal = any(_STACK_BEGINS in line for line in lines)
    lines = lines if fatal else lines[-_LAST_LINES:]
    if not lines:
        return f"    (its log cannot be read: {log})"
    return "\n".join([f"its last lines, from {log}:", *(f"    {line}" for line in lines)])


def first_line(text: str) -> str:
    return text.strip().split("\n", 1)[0]
