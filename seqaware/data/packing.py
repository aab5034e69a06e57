"""Arranging the documents of a step: into micro-batches, and those over the ranks.

Which documents a step holds is decided before (`order.py`); nothing here adds, drops or repeats one.

Letters: D documents, B micro-batches, C capacity in tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from seqaware.data.balance import costs, deal, halve_fullest, imbalance, share, spread
from seqaware.data.best_fit import best_fit, falling_order
from seqaware.data.jit import compiled
from seqaware.errors import ConfigError

# Single documents are shared out where whole bins leave a rank this far above the mean, and documents · bins, the time
# it takes, are no more than this: with more bins the ranks even out by themselves.
_SPREAD_ABOVE = 1.005
_SPREAD_AT_MOST = 1 << 23


@compiled
def _rows_of_like_length(falling: NDArray[np.int64], capacity: int, bin_of: NDArray[np.int32]) -> int:
    """Cut falling lengths into blocks of rows × longest ≤ capacity; returns how many blocks."""
    blocks, rows, longest = 0, 0, 0
    for i in range(len(falling)):
        if rows == 0 or (rows + 1) * longest > capacity:
            blocks, rows, longest = blocks + 1, 0, falling[i]
        rows += 1
        bin_of[i] = blocks - 1
    return blocks


def pack(lengths: NDArray[np.integer], capacity: int) -> NDArray[np.int32]:
    """Best-fit decreasing, exactly (Johnson 1973): bin_of int32 [D], bins of at most `capacity` tokens from 0 on.

    Deterministic: it depends on the lengths and their order alone. O(D + C) for the sort, and a step of the two-level
    bit set for each document.

    Raises:
        ConfigError: a document is longer than the capacity.
    """
    bin_of = np.empty(len(lengths), dtype=np.int32)
    if len(lengths):
        flat, order = _sorted(lengths, capacity)
        in_order = np.empty_like(bin_of)
        best_fit(flat[order], capacity, in_order)
        bin_of[order] = in_order
    return bin_of


@dataclass(frozen=True)
class StepWork:
    """What a step computes, over all ranks.

    Attributes:
        tokens: of its documents. squares: Σ length² of them. places: computed, padding too.
    """

    tokens: int
    squares: int
    places: int

    @property
    def padding_share(self) -> float:
        """Places that hold no token, of those that are computed."""
        return round(1.0 - self.tokens / self.places, 6)


@dataclass(frozen=True)
class MicroBatch:
    """Document ids by row: one row of several documents when packed, else several rows of one. No rows: empty."""

    rows: list[list[int]]


@dataclass(frozen=True)
class StepLayout:
    """Where every document of a step lies.

    Attributes:
        ids: int64 [D], micro-batch by micro-batch. offsets: int64 [B + 1], where each micro-batch begins in them.
        dealt: int64 [M, ranks]: which micro-batch is the m-th of a rank; -1 for an empty one.
        places: computed in all micro-batches, padding too.
        efficiency: tokens / (micro-batches that hold any · capacity): how full they are.
        balance: the costliest rank / the mean of the ranks; 1 is perfect. Cost: tokens computed (padding too) and
            Σ length², each as a share of its total.
        token_balance, square_balance: the same of tokens computed alone, and of Σ length² alone.
    """

    ids: NDArray[np.int64]
    offsets: NDArray[np.int64]
    dealt: NDArray[np.int64]
    packed: bool
    places: int
    efficiency: float
    balance: float
    token_balance: float
    square_balance: float

    def micro_batches(self, rank: int) -> list[MicroBatch]:
        """The micro-batches of a rank, in the order it runs them: the same number on every rank, empty ones last."""
        return [self._micro_batch(int(number)) for number in self.dealt[:, rank]]

    def _micro_batch(self, number: int) -> MicroBatch:
        if number < 0:
            return MicroBatch([])
        ids: list[int] = self.ids[self.offsets[number] : self.offsets[number + 1]].tolist()
        return MicroBatch([ids] if self.packed else [[document] for document in ids])


def layout_step(
    ids: NDArray[np.int64], lengths: NDArray[np.integer], *, capacity: int, ranks: int, packed: bool
) -> StepLayout:
    """Arrange the documents of a step into micro-batches of at most `capacity` tokens, shared over the ranks.

    Packed: bins of best-fit decreasing, a row each. Otherwise rows of one document, blocks of like length together,
    rows × longest ≤ capacity. As many micro-batches a rank as the capacity asks for, filled evenly instead of to the
    brim; where there are as many documents as ranks, no rank goes without.

    Args:
        ids: int64 [D], the documents. lengths: [D], their tokens, in the same order.
        capacity: tokens that a micro-batch may hold, padding included.

    Raises:
        ConfigError: a document is longer than the capacity.
    """
    assert len(ids) == len(lengths) > 0, "a step holds at least one document"
    flat, order = _sorted(lengths, capacity)
    step = _StepDocuments(np.asarray(ids, dtype=np.int64), order, flat[order], capacity, ranks, packed)
    bin_of, bins = step.filled_evenly()
    layout = step.laid_out(bin_of)
    if not packed or layout.balance <= _SPREAD_ABOVE or len(ids) * bins > _SPREAD_AT_MOST:
        return layout
    bin_of = spread(step.lengths, costs(step.lengths, step.lengths**2), bins, ranks, capacity)
    if len(bin_of) == 0 or np.bincount(bin_of, minlength=bins).min() == 0:
        return layout
    other = step.laid_out(bin_of, np.arange(bins) % ranks)
    return other if other.balance < layout.balance else layout


@dataclass(frozen=True)
class _StepDocuments:
    """What is to be arranged: ids in the step's order; order: their places by falling length; lengths in that order.

    bin_of, wherever it appears below, goes by falling length too.
    """

    ids: NDArray[np.int64]
    order: NDArray[np.int64]
    lengths: NDArray[np.int64]
    capacity: int
    ranks: int
    packed: bool

    def filled_evenly(self) -> tuple[NDArray[np.int32], int]:
        """The micro-batch of each document, int32 [D], and how many: the fewest a rank, all about equally full.

        The capacity tells how many micro-batches there are; a multiple of the ranks is aimed at. The smallest capacity
        that does with as many leaves none of them nearly empty.
        """
        fill = best_fit if self.packed else _rows_of_like_length
        bin_of, trial = np.empty((2, len(self.ids)), dtype=np.int32)
        bins = fill(self.lengths, self.capacity, bin_of)
        wanted = min(-(-bins // self.ranks) * self.ranks, len(self.ids))
        least = max(int(self.lengths[0]), -(-int(self.lengths.sum()) // wanted))
        too_small, enough = least - 1, self.capacity
        while enough - too_small > 1:
            middle = (too_small + enough) // 2
            needed = fill(self.lengths, middle, trial)
            if needed <= wanted:
                enough, bins = middle, needed
                bin_of, trial = trial, bin_of
            else:
                too_small = middle
        halve_fullest(self.lengths, bin_of, bins, wanted, self.packed)
        return bin_of, wanted

    def laid_out(self, bin_of: NDArray[np.int32], rank_of: NDArray[np.int64] | None = None) -> StepLayout:
        """The layout with these micro-batches, on the ranks given for them, or shared out."""
        # Inside a packed row the documents keep the step's order; blocks of rows keep the longest first.
        by_bin = np.lexsort((self.order, bin_of)) if self.packed else np.argsort(bin_of, kind="stable")
        offsets = np.concatenate([[0], np.cumsum(np.bincount(bin_of))])
        tokens_B, squares_B = _work(self.lengths[by_bin], offsets, self.packed)
        costs_B = costs(tokens_B, squares_B)
        by_cost = np.argsort(-costs_B, kind="stable")
        if rank_of is None:
            rank_of = share(costs_B, by_cost, self.ranks)
        dealt = deal(rank_of, by_cost, self.ranks)
        return StepLayout(
            ids=self.ids[self.order[by_bin]],
            offsets=offsets,
            dealt=dealt,
            packed=self.packed,
            places=int(tokens_B.sum()),
            efficiency=int(self.lengths.sum()) / ((len(offsets) - 1) * self.capacity),
            balance=imbalance(costs_B, dealt),
            token_balance=imbalance(tokens_B, dealt),
            square_balance=imbalance(squares_B, dealt),
        )


def _work(
    lengths: NDArray[np.int64], offsets: NDArray[np.int64], packed: bool
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Tokens computed and Σ length² of each micro-batch, padding included: two int64 [B]; lengths by micro-batch."""
    tokens = np.add.reduceat(lengths, offsets[:-1])
    squares = np.add.reduceat(lengths**2, offsets[:-1])
    if packed:
        return tokens, squares
    longest = np.repeat(np.maximum.reduceat(lengths, offsets[:-1]), np.diff(offsets))
    padding = longest - lengths
    return tokens + np.add.reduceat(padding, offsets[:-1]), squares + np.add.reduceat(padding**2, offsets[:-1])


def _sorted(lengths: NDArray[np.integer], capacity: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The lengths as int64, and their places by falling length; D ≥ 1."""
    flat = np.ascontiguousarray(lengths, dtype=np.int64)
    longest = int(flat.max())
    if longest > capacity:
        raise ConfigError(
            "a document is longer than a micro-batch",
            got=f"{longest} tokens, micro_batch_tokens {capacity}",
            do=f"write training.schedule.micro_batch_tokens of at least {longest}, or a smaller max_seq_length",
        )
    assert int(flat.min()) >= 1, "an empty document"
    return flat, falling_order(flat, longest)
