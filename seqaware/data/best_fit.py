"""Best-fit decreasing, exactly, in a few dozen machine instructions a document.

The room left in the bins is kept as a set of bits, one for each residual that some bin has, with a second level of one
bit for each word of the first. The tightest bin for a document is then the next set bit, found in two or three words.

Letters: D documents, C capacity in tokens.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from seqaware.data.jit import compiled

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
def falling_order(lengths: NDArray[np.int64], longest: int) -> NDArray[np.int64]:
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
def _take(
    queues: NDArray[np.int32],
    behind: NDArray[np.int32],
    low: NDArray[np.uint64],
    high: NDArray[np.uint64],
    residual: int,
) -> int:
    """Take the bin that has had this residual longest."""
    chosen: int = queues[0, residual]
    queues[0, residual] = behind[chosen]
    if behind[chosen] < 0:
        word = residual // _WORD
        low[word] ^= _ONE << np.uint64(residual % _WORD)
        if low[word] == 0:
            high[word // _WORD] ^= _ONE << np.uint64(word % _WORD)
    return chosen


@compiled
def _put(
    queues: NDArray[np.int32],
    behind: NDArray[np.int32],
    low: NDArray[np.uint64],
    high: NDArray[np.uint64],
    residual: int,
    chosen: int,
) -> None:
    """Put a bin behind the others of this residual."""
    behind[chosen] = -1
    if queues[0, residual] >= 0:
        behind[queues[1, residual]] = chosen
    else:
        queues[0, residual] = chosen
        word = residual // _WORD
        low[word] |= _ONE << np.uint64(residual % _WORD)
        high[word // _WORD] |= _ONE << np.uint64(word % _WORD)
    queues[1, residual] = chosen


@compiled
def best_fit(falling: NDArray[np.int64], capacity: int, bin_of: NDArray[np.int32]) -> int:
    """Put each length into the bin that it leaves with the least room, or into a new one; returns how many bins.

    The bins of one residual form a queue. `low` has a bit for every residual that some bin has, `high` a bit for every
    word of `low` that is not zero.
    """
    low = np.zeros(capacity // _WORD + 1, dtype=np.uint64)
    high = np.zeros(len(low) // _WORD + 1, dtype=np.uint64)
    queues = np.full((2, capacity + 1), -1, dtype=np.int32)  # the first and the last bin of each residual
    behind = np.empty(len(falling), dtype=np.int32)  # the next bin in a bin's queue
    bins = 0
    for i in range(len(falling)):
        residual = _tightest(low, high, falling[i])
        if residual >= 0:
            chosen = _take(queues, behind, low, high, residual)
        else:
            chosen, residual = bins, capacity
            bins += 1
        bin_of[i] = chosen
        _put(queues, behind, low, high, residual - falling[i], chosen)
    return bins
