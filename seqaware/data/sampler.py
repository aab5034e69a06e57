"""Which documents are in which optimizer step: fixed by the data, the seed and the step, by nothing else.

An epoch is a permutation of its documents, computed entry by entry by a keyed Feistel network, so that any step can be
asked for at once, without memory and without replay, and a release of a library never changes it. A step is the
next `global_batch_size` entries, or the longest run of next entries that fits `global_batch_tokens`. Steps do not cross
epochs: the last step of an epoch is what is left.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
from numpy.typing import NDArray

from seqaware.data.jit import compiled
from seqaware.errors import ConfigError, DataError

# Written into every key: a change of the algorithm must change this, for it changes every run's order.
_ALGORITHM = "seqaware order 1"
_ROUNDS = 8
# With fewer bits the network reaches too few of the permutations of a small set; walking cycles costs little there.
_FEWEST_BITS = 8
_CHUNK = 1 << 20
# Epochs whose steps are counted one by one: 10^8 documents take seconds.
_MANY_EPOCHS, _MOST_LAID_OUT = 100, 10**8

_MULTIPLY_1 = np.uint64(0xBF58476D1CE4E5B9)
_MULTIPLY_2 = np.uint64(0x94D049BB133111EB)
_SHIFT_1, _SHIFT_2, _SHIFT_3 = np.uint64(30), np.uint64(27), np.uint64(31)
_ONE = np.uint64(1)


@compiled
def _mix(value: np.uint64) -> np.uint64:
    """SplitMix64's finaliser (Steele, Lea & Flood 2014): every bit of the input moves every bit of the output."""
    value = (value ^ (value >> _SHIFT_1)) * _MULTIPLY_1
    value = (value ^ (value >> _SHIFT_2)) * _MULTIPLY_2
    return value ^ (value >> _SHIFT_3)


@compiled
def _permute(
    indices: NDArray[np.int64], size: int, keys: NDArray[np.uint64], bits: tuple[int, int]
) -> NDArray[np.int64]:
    """Where a Feistel network over 2^(left + right) values, walked until it falls below `size`, takes each index."""
    right_bits = np.uint64(bits[1])
    left_mask = (_ONE << np.uint64(bits[0])) - _ONE
    right_mask = (_ONE << right_bits) - _ONE
    limit = np.uint64(size)
    out = np.empty(len(indices), dtype=np.int64)
    for i in range(len(indices)):
        value = np.uint64(indices[i])
        while True:
            left, right = value >> right_bits, value & right_mask
            for pair in range(len(keys) // 2):
                left ^= _mix(right ^ keys[2 * pair]) & left_mask
                right ^= _mix(left ^ keys[2 * pair + 1]) & right_mask
            value = (left << right_bits) | right
            if value < limit:
                break
        out[i] = np.int64(value)
    return out


@compiled
def _close_steps(lengths: NDArray[np.int32], budget: int, held: int, ends: NDArray[np.int64]) -> tuple[int, int]:
    """Cut a run of lengths greedily into steps of at most `budget` tokens, the open one holding `held` already.

    Writes the index before which each step ends into `ends`; returns how many ended and what the open one holds.
    """
    count = 0
    for i in range(len(lengths)):
        if held + lengths[i] > budget:
            ends[count] = i
            count += 1
            held = 0
        held += lengths[i]
    return count, held


@dataclass(frozen=True)
class Permutation:
    """A pseudo-random permutation of 0 … size - 1, entry by entry in O(1) memory (cycle walking: Black & Rogaway 2002).

    Attributes:
        keys: uint64 [rounds]. bits: widths of the two halves; 2^(their sum) is at least size.
    """

    size: int
    keys: NDArray[np.uint64]
    bits: tuple[int, int]

    @classmethod
    def keyed(cls, size: int, *labels: object) -> Permutation:
        """The permutation that the labels name: the same ones give the same permutation on every machine."""
        text = "\x1f".join([_ALGORITHM, *map(str, labels)])
        keys = np.frombuffer(hashlib.shake_256(text.encode()).digest(8 * _ROUNDS), dtype="<u8").astype(np.uint64)
        bits = max(_FEWEST_BITS, (size - 1).bit_length())
        return cls(size, keys, (bits // 2, bits - bits // 2))

    def at(self, indices: NDArray[np.int64]) -> NDArray[np.int64]:
        """Entries of the permutation: int64 [any] in 0 … size - 1 -> int64 of the same length."""
        return _permute(indices, self.size, self.keys, self.bits)


@dataclass(frozen=True)
class _Share:
    """A source's part of an epoch: `taken` of its `documents`, which begin at `first` in the store."""

    first: int
    documents: int
    taken: int


class StepSampler:
    """The documents of every optimizer step. Epochs and steps inside an epoch count from 0.

    Args:
        lengths: tokens of each document, int32 [D].
        fingerprint: of the data; with the seed and the epoch it keys the permutation.
        global_batch_size, global_batch_tokens: documents of a step, or tokens it may hold; exactly one of them.
        parts: (name, documents, proportion or None) of each source, in the store's order; empty for one source. With
            proportions, an epoch is the largest in which no document repeats: N = min(documents / proportion), of which
            a source gives round(proportion · N), halves up, chosen anew in every epoch.

    Raises:
        ConfigError: both or no batch definition; proportions that are not positive, incomplete, or leave a source out;
            a document longer than global_batch_tokens.
        DataError: no documents, or parts that do not add up to them.
    """

    def __init__(
        self,
        lengths: NDArray[np.int32],
        *,
        fingerprint: str,
        seed: int,
        global_batch_size: int | None = None,
        global_batch_tokens: int | None = None,
        parts: Sequence[tuple[str, int, float | None]] = (),
    ) -> None:
        self._lengths = np.asarray(lengths)
        self._key = (fingerprint, seed)
        self._batch_size = global_batch_size
        self._batch_tokens = global_batch_tokens
        self._shares = _shares(parts, len(self._lengths))
        self.documents_per_epoch = sum(share.taken for share in self._shares)
        self._ends: dict[int, NDArray[np.int64]] = {}
        self._check_batch()

    def steps_in_epoch(self, epoch: int) -> int:
        """Optimizer steps of an epoch. In tokens it differs between epochs; found once an epoch, O(documents)."""
        if self._batch_size is not None:
            return -(-self.documents_per_epoch // self._batch_size)
        return len(self._step_ends(epoch))

    def documents(self, epoch: int, step_in_epoch: int) -> NDArray[np.int64]:
        """The documents of a step: int64 ids into the store, in the permutation's order."""
        assert 0 <= step_in_epoch < self.steps_in_epoch(epoch), "a step beyond its epoch"
        if self._batch_size is not None:
            first = step_in_epoch * self._batch_size
            last = min(first + self._batch_size, self.documents_per_epoch)
        else:
            ends = self._step_ends(epoch)
            first = int(ends[step_in_epoch - 1]) if step_in_epoch else 0
            last = int(ends[step_in_epoch])
        return self._entries(epoch, first, last)

    def position(self, step: int) -> tuple[int, int]:
        """(epoch, step in the epoch) of the optimizer step `step`, which counts from 1."""
        assert step >= 1, "optimizer steps count from 1"
        if self._batch_size is not None:
            return divmod(step - 1, self.steps_in_epoch(0))
        epoch, left = 0, step - 1
        while left >= (steps := self.steps_in_epoch(epoch)):
            epoch, left = epoch + 1, left - steps
        return epoch, left

    def steps_per_epoch(self, num_epochs: float | None, max_steps: int | None = None) -> tuple[int, ...]:
        """Return the steps of each epoch that is begun, the last one whole; no epoch beyond `max_steps`.

        Args:
            num_epochs: None returns the first epoch's alone: `max_steps` ends the run, however many epochs it needs.
        """
        if num_epochs is None:
            return (self.steps_in_epoch(0),)
        steps: list[int] = []
        total = 0
        for epoch in range(math.ceil(_as_written(num_epochs))):
            if max_steps is not None and total >= max_steps:
                break
            self._check_countable(epoch)
            steps.append(self.steps_in_epoch(epoch))
            total += steps[-1]
        return tuple(steps)

    def _check_countable(self, epoch: int) -> None:
        if self._batch_size is None and epoch >= _MANY_EPOCHS and epoch * self.documents_per_epoch > _MOST_LAID_OUT:
            raise ConfigError(
                "training.schedule: the steps of so many epochs cannot be counted, each with other steps of "
                "global_batch_tokens",
                got=f"more than {epoch:,} epochs of {self.documents_per_epoch:,} documents",
                do="write a smaller num_epochs or max_steps",
            )

    def total_steps(self, num_epochs: float, max_steps: int | None = None) -> int:
        """Steps of the whole epochs and ⌈fraction · steps⌉ of the epoch begun last, but no more than `max_steps`."""
        steps = self.steps_per_epoch(num_epochs, max_steps)
        whole, fraction = divmod(_as_written(num_epochs), 1)
        total = sum(steps[: int(whole)])
        if fraction and len(steps) > whole:
            total += math.ceil(fraction * steps[int(whole)])
        return total if max_steps is None else min(total, max_steps)

    def _entries(self, epoch: int, first: int, last: int) -> NDArray[np.int64]:
        """Entries first … last - 1 of an epoch's permutation, as ids into the store."""
        slots = Permutation.keyed(self.documents_per_epoch, *self._key, epoch).at(np.arange(first, last))
        if all(share.taken == share.documents for share in self._shares):
            return slots
        ids = np.empty_like(slots)
        begin = 0
        for number, share in enumerate(self._shares):
            inside = (slots >= begin) & (slots < begin + share.taken)
            own = Permutation.keyed(share.documents, *self._key, epoch, "part", number)
            ids[inside] = share.first + own.at(slots[inside] - begin)
            begin += share.taken
        return ids

    def _step_ends(self, epoch: int) -> NDArray[np.int64]:
        """Where each step of an epoch ends in its permutation: int64 [steps]. Kept, 8 bytes a step."""
        if epoch not in self._ends:
            self._ends[epoch] = self._find_step_ends(epoch)
        return self._ends[epoch]

    def _find_step_ends(self, epoch: int) -> NDArray[np.int64]:
        assert self._batch_tokens is not None
        found: list[NDArray[np.int64]] = []
        held = 0
        buffer = np.empty(_CHUNK, dtype=np.int64)
        for first in range(0, self.documents_per_epoch, _CHUNK):
            ids = self._entries(epoch, first, min(first + _CHUNK, self.documents_per_epoch))
            count, held = _close_steps(self._lengths[ids], self._batch_tokens, held, buffer)
            found.append(buffer[:count] + first)
        found.append(np.array([self.documents_per_epoch]))
        return np.concatenate(found)

    def _check_batch(self) -> None:
        if (self._batch_size is None) == (self._batch_tokens is None):
            raise ConfigError(
                "a step is defined by exactly one of global_batch_size and global_batch_tokens",
                got=f"global_batch_size {self._batch_size}, global_batch_tokens {self._batch_tokens}",
                do="write one of them",
            )
        asked = self._batch_size if self._batch_size is not None else self._batch_tokens
        if asked is None or asked < 1:
            raise ConfigError("a step must hold at least one document", got=asked, do="write a positive number")
        if self._batch_tokens is not None and (longest := int(self._lengths.max())) > self._batch_tokens:
            raise ConfigError(
                "the longest document does not fit an optimizer step",
                got=f"{longest} tokens, global_batch_tokens {self._batch_tokens}",
                do=f"write a global_batch_tokens of at least {longest}, or a smaller max_seq_length",
            )


def _shares(parts: Sequence[tuple[str, int, float | None]], documents: int) -> tuple[_Share, ...]:
    if documents == 0:
        raise DataError("there is no document to train on")
    if parts and sum(count for _, count, _ in parts) != documents:
        got = f"{sum(count for _, count, _ in parts)} in {len(parts)} part(s), {documents} in the store"
        raise DataError("the parts of the data do not add up to its documents", got=got, do="prepare the data again")
    if all(proportion is None for _, _, proportion in parts):
        return (_Share(0, documents, documents),)
    taken = _taken(parts)
    firsts = np.cumsum([0, *(count for _, count, _ in parts)]).tolist()
    return tuple(_Share(first, part[1], n) for first, part, n in zip(firsts, parts, taken, strict=False))


def _taken(parts: Sequence[tuple[str, int, float | None]]) -> list[int]:
    """How many documents each source gives to an epoch: round(p · N), halves up, in exact arithmetic."""
    proportions: list[Fraction] = []
    for name, count, proportion in parts:
        if proportion is None or not math.isfinite(proportion) or proportion <= 0:
            raise ConfigError(
                f"dataset.mixture: {name} has no usable proportion",
                got=proportion,
                do="write a positive proportion for every source, or for none of them",
            )
        if count == 0:
            raise DataError(f"dataset.mixture: {name} has no documents", do="take it out of the mixture")
        proportions.append(_as_written(proportion))
    largest = min(Fraction(count) / p for (_, count, _), p in zip(parts, proportions, strict=True))
    taken = [math.floor(p * largest + Fraction(1, 2)) for p in proportions]
    for (name, _, proportion), n in zip(parts, taken, strict=True):
        if n == 0:
            raise ConfigError(
                f"dataset.mixture: {name} would give no document to an epoch of {sum(taken)}",
                got=f"proportion {proportion}",
                do="raise its proportion, or take it out of the mixture",
            )
    return taken


def _as_written(number: float) -> Fraction:
    """The number as a person wrote it: 0.1 is one tenth, not the nearest binary fraction."""
    return Fraction(str(number))
