"""What may fail on one rank is heard by all of them: none is left waiting for it."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from seqaware.distributed.process_group import Ranks
from seqaware.errors import SeqawareError, StorageError

# What a disk, a vanished folder or memory may do to a rank that writes; anything else is our own mistake.
FAILURES = (OSError, RuntimeError, MemoryError)

T = TypeVar("T")


def raise_collectively(
    ranks: Ranks, action: Callable[[], T], *, on_first_only: bool, error: Callable[[str], SeqawareError]
) -> T | None:
    """Do something that may fail on one rank, and let all ranks know. Collective.

    Args:
        action: may raise `FAILURES` or a `SeqawareError`. error: makes the error of the first problem.

    Returns:
        what `action` did on this rank; None where it was not done.

    Raises:
        SeqawareError: on every rank: `error` of what failed, or the error for people that a rank has met, as it is.
    """
    value: T | None = None
    problem: str | SeqawareError | None = None
    if ranks.is_first or not on_first_only:
        try:
            value = action()
        except FAILURES as failure:
            problem = f"rank {ranks.rank}: {failure or type(failure).__name__}"
        except SeqawareError as failure:
            problem = failure
    for first in ranks.gather(problem):
        if isinstance(first, SeqawareError):
            raise first
        if first is not None:
            raise error(first)
    return value


def not_written(what: str) -> Callable[[str], StorageError]:
    """Makes the error of something that could not be written."""
    return lambda problem: StorageError(f"{what} could not be written", got=problem)
