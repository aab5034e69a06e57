"""Who answers what, in which round: every question once, and on all ranks the same number of rounds.

The longest come first, so that memory runs out at once or not at all, and rounds take more rows as rows get shorter.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

import torch

from seqaware.engine.inference import AnsweringModel, can_allocate, free_bytes, in_halves
from seqaware.models.attention import standard_attention

_FIRST_SHARE = 0.5  # of the free memory, by an estimate from above
_LARGEST_SHARE = 0.9
_GROWTH = 1.25
# More rows at once make a round no faster on a CPU, only more padded; on a GPU many more do.
_MOST = {"cpu": 32, "cuda": 512}

T = TypeVar("T")
R = TypeVar("R")
Leaving = Callable[[], bool]
"""Collective: whether the run is asked to leave, which no long evaluation may hold up."""
BytesPerRow = Callable[[int], int]
"""An estimate of what a row takes, by its length in tokens."""


class BatchSize:
    """How many rows a rank takes at once: as many as memory allows on the fullest rank, the same on all.

    Args:
        cost: an estimate of a row's bytes. fixed: what a person wrote; None finds it.
    """

    def __init__(self, model: AnsweringModel, cost: BytesPerRow, *, fixed: int | None) -> None:
        self._ranks = ranks = model.ranks
        self._cost = cost
        self._fixed = fixed
        self._halved = False
        self._most = _MOST.get(ranks.device.type, 32)
        free = min(ranks.gather(self._free())) if fixed is None else 0
        self._budget, self._largest = _FIRST_SHARE * free, _LARGEST_SHARE * free

    def rows(self, longest: int, *, left: int) -> int:
        """For the next round, whose longest row is `longest`; at most `left`. Collective."""
        if self._fixed is not None:
            return min(self._fixed, left)
        halved, self._halved = any(self._ranks.gather(self._halved)), False
        self._budget = self._budget / 2 if halved else min(self._budget * _GROWTH, self._largest)
        while True:
            rows = max(1, min(left, self._most, int(self._budget // self._cost(longest))))
            fits = rows == 1 or self._fits(rows * self._cost(longest))
            if all(self._ranks.gather(fits)):
                return rows
            self._budget /= 2

    def too_large(self) -> None:
        """Memory ran out on this rank, which went on in halves: the next round is smaller on all of them."""
        self._halved = True

    def _free(self) -> int:
        return free_bytes(self._ranks.device, sharers=self._ranks.address.local_size)

    def _fits(self, size: int) -> bool:
        return can_allocate(size, self._ranks.device)


def in_rounds(
    work: Callable[[Sequence[T]], list[R]],
    rows: Sequence[T],
    lengths: Sequence[int],
    *,
    model: AnsweringModel,
    batch: BatchSize,
    leaving: Leaving,
) -> list[R] | None:
    """What `work` finds for each row, in their order, on every rank; each row is one rank's. Collective.

    Args:
        lengths: of the rows, in tokens.

    Returns:
        None where the run leaves before the end.
    """
    ranks = model.ranks
    shortest = rows[lengths.index(min(lengths))]
    found: dict[int, R] = {}
    with standard_attention(model.model):
        for mine in rounds(lengths, batch, rank=ranks.rank, size=ranks.size):
            if leaving():
                return None
            if not mine and not model.in_step:
                continue
            # A rank without rows does one that another rank does too, only to stay in step.
            together = [rows[index] for index in mine] or [shortest]
            done = in_halves(work, together, model=model, halved=batch.too_large)
            found.update(zip(mine, done, strict=False))
    return merged(ranks.gather(found), len(rows))


def rounds(lengths: Sequence[int], batch: BatchSize, *, rank: int, size: int) -> Iterator[list[int]]:
    """This rank's rows of each round, by their index; empty where it has none left. Collective.

    Args:
        lengths: of all rows, in tokens.
    """
    order = sorted(range(len(lengths)), key=lambda index: -lengths[index])
    done = 0
    while done < len(order):
        rows = batch.rows(lengths[order[done]], left=math.ceil((len(order) - done) / size))
        together = order[done : done + rows * size]
        # Dealt out in turn: rows of a like length on every rank, and little padding.
        yield together[rank::size]
        done += len(together)


def merged(parts: Sequence[dict[int, T]], count: int) -> list[T]:
    """What all ranks found, in the order of the rows.

    Raises:
        AssertionError: a row was done twice or never.
    """
    everything = [pair for part in parts for pair in part.items()]
    by_row = dict(everything)
    assert len(everything) == len(by_row) == count, "a row was done twice or never"
    return [by_row[index] for index in range(count)]


def left_padded(rows: Sequence[Sequence[int]], pad: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and mask [R, T], int64: padded on the left, so that every row ends in the last column."""
    longest = max(map(len, rows))
    ids = [[pad] * (longest - len(row)) + list(row) for row in rows]
    mask = [[0] * (longest - len(row)) + [1] * len(row) for row in rows]
    return torch.tensor(ids, device=device), torch.tensor(mask, device=device)
