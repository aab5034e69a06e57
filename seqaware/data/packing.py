"""Arranging the documents of a step: into micro-batches, and those over the ranks.

Which documents a step holds is decided before (`order.py`); nothing here adds, drops or repeats one.

Letters: D documents, B micro-batches, C capacity in tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from seqaware.data.balance import costs, rank_totals, share
from seqaware.data.compiled import compiled
from seqaware.errors import ConfigError

_ONE = np.uint64(1)
_WORD = 64
# The place of the lowest set bit, by multiplication with a de Bruijn sequence (Leiserson, Prokop & Randall 1998).
_DE_BRUIJN = np.uint64(0x03F79D71B4CB0A89)
_DE_BRUIJN_SHIFT = np.uint64(58)
_LOWEST_BIT = np.empty(_WORD, dtype=np.int64)
for _bit in range(_WORD):
    _LOWEST_BIT[((int(_DE_BRUIJN) << _bit) & (2**64 - 1)) >> int(_DE_BRUIJN_SHIFT)] = _bit


@compiled
def _lowest_bit(word: np.uint64) -> int:
    lowest = word & (~word + _ONE)
    place: int = _LOWEST_BIT[(lowest * _DE_BRUIJN) >> _DE_BRUIJN_SHIFT]
    return place


@compiled
def _first_from(words: NDArray[np.uint64], start: int) -> int:
    """The first set bit at `start` or later; -1 where there is none."""
    index = start // _WORD
    if index >= len(words):
        return -1
    word = (words[index] >> np.uint64(start % _WORD)) << np.uint64(start % _WORD)
    while word == 0:
        index += 1
        if index == len(words):
            return -1
        word = words[index]
    return index * _WORD + _lowest_bit(word)


@compiled
def _tightest(low: NDArray[np.uint64], high: NDArray[np.uint64], length: int) -> int:
    """The smallest residual ≥ length that a bin has, by the two-level bit set; -1 where there is none."""
    word = length // _WORD
    inside = (low[word] >> np.uint64(length % _WORD)) << np.uint64(length % _WORD)
    if inside == 0:
        word = _first_from(high, word + 1)
        if word < 0:
            return -1
        inside = low[word]
    return word * _WORD + _lowest_bit(inside)


@compiled
def _descending(lengths: NDArray[np.int64], longest: int) -> NDArray[np.int64]:
    """Indices by falling length; equal lengths stay in their order (a counting sort)."""
    starts = np.zeros(longest + 2, dtype=np.int64)
    for length in lengths:
        starts[longest - length + 1] += 1
    for i in range(1, longest + 2):
        starts[i] += starts[i - 1]
    order = np.empty(len(lengths), dtype=np.int64)
    for i in range(len(lengths)):
        key = longest - lengths[i]
        order[starts[key]] = i
        starts[key] += 1
    return order


@compiled
def _best_fit(
    lengths: NDArray[np.int64], order: NDArray[np.int64], capacity: int, bin_of: NDArray[np.int32]
) -> int:
    """Put each document into the bin that it leaves with the least room, or into a new one; returns how many bins.

    Bins of the same residual form a queue: the one that has had it longest is taken first. `low` has a bit for every
    residual that some bin has, `high` a bit for every word of `low` that is not zero.
    """
    low = np.zeros(capacity // _WORD + 1, dtype=np.uint64)
    high = np.zeros(len(low) // _WORD + 1, dtype=np.uint64)
    first = np.full(capacity + 1, -1, dtype=np.int32)
    last = np.full(capacity + 1, -1, dtype=np.int32)
    behind = np.empty(len(lengths), dtype=np.int32)
    bins = 0
    for i in order:
        residual = _tightest(low, high, lengths[i])
        if residual < 0:
            chosen, residual = bins, capacity
            bins += 1
        else:
            chosen = first[residual]
            first[residual] = behind[chosen]
            if first[residual] < 0:
                word = residual // _WORD
                low[word] ^= _ONE << np.uint64(residual % _WORD)
                if low[word] == 0:
                    high[word // _WORD] ^= _ONE << np.uint64(word % _WORD)
        bin_of[i] = chosen
        residual -= lengths[i]
        behind[chosen] = -1
        if first[residual] >= 0:
            behind[last[residual]] = chosen
        else:
            first[residual] = chosen
            word = residual // _WORD
            low[word] |= _ONE << np.uint64(residual % _WORD)
            high[word // _WORD] |= _ONE << np.uint64(word % _WORD)
        last[residual] = chosen
    return bins


@compiled
def _rows_of_like_length(
    lengths: NDArray[np.int64], order: NDArray[np.int64], capacity: int, bin_of: NDArray[np.int32]
) -> int:
    """Cut the documents, longest first, into blocks of rows × longest ≤ capacity; returns how many blocks."""
    blocks, rows, longest = 0, 0, 0
    for i in order:
        if rows == 0 or (rows + 1) * longest > capacity:
            blocks, rows, longest = blocks + 1, 0, lengths[i]
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
    flat = _checked(lengths, capacity)
    bin_of = np.empty(len(flat), dtype=np.int32)
    if len(flat):
        _best_fit(flat, _descending(flat, int(flat.max())), capacity, bin_of)
    return bin_of


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
        efficiency: tokens / (micro-batches that hold any · capacity): how full they are.
        balance: the costliest rank / the mean of the ranks; 1 is perfect. Cost: tokens computed (padding too) and
            Σ length², each as a share of its total.
        token_balance, square_balance: the same of tokens computed alone, and of Σ length² alone.
    """

    ids: NDArray[np.int64]
    offsets: NDArray[np.int64]
    dealt: NDArray[np.int64]
    packed: bool
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
    flat = _checked(lengths, capacity)
    order = _descending(flat, int(flat.max()))
    bin_of = _fill_evenly(flat, order, capacity=capacity, ranks=ranks, packed=packed)
    # Inside a packed row the documents keep the step's order; blocks of rows keep the longest first.
    by_bin = np.argsort(bin_of, kind="stable") if packed else order[np.argsort(bin_of[order], kind="stable")]
    offsets = np.concatenate([[0], np.cumsum(np.bincount(bin_of))])
    tokens_B, squares_B = _work(flat[by_bin], offsets, packed)
    costs_B = costs(tokens_B, squares_B)
    dealt = share(costs_B, ranks)
    return StepLayout(
        ids=np.asarray(ids, dtype=np.int64)[by_bin],
        offsets=offsets,
        dealt=dealt,
        packed=packed,
        efficiency=float(flat.sum() / ((len(offsets) - 1) * capacity)),
        balance=_over_mean(costs_B, dealt),
        token_balance=_over_mean(tokens_B, dealt),
        square_balance=_over_mean(squares_B, dealt),
    )
