"""The micro-batches of this rank, step by step, made ahead of the engine."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from seqaware.data.collate import Batch, build_batch
from seqaware.data.packing import StepLayout, StepWork, layout_step
from seqaware.data.sampler import StepSampler
from seqaware.data.store.token_store import TokenStore

# Steps that are made ahead: a short step may follow a long one, and the other way round.
_AHEAD = 2


@dataclass(frozen=True)
class RowFormat:
    """How documents become rows.

    Attributes:
        capacity: tokens a micro-batch may hold. packed: several documents to a row, or one.
        positions, on_split: what k counts (`training.sft`). pad_id: any id of the vocabulary; padding never counts.
        sequence: ranks that share each row, by columns.
    """

    capacity: int
    packed: bool
    positions: str
    on_split: str
    pad_id: int
    sequence: int = 1


def rank_batches(store: TokenStore, ids: NDArray[np.int64], *, rows: RowFormat, rank: int, size: int) -> list[Batch]:
    """The share of one rank in a set of documents, as micro-batches; the same number for every rank.

    Args:
        rank, size: among all ranks; the rows.sequence neighbours that share their rows get the same, whole ones.
    """
    return _built(store, _laid_out(store, ids, rows=rows, size=size), rows=rows, rank=rank)


def _laid_out(store: TokenStore, ids: NDArray[np.int64], *, rows: RowFormat, size: int) -> StepLayout:
    groups = size // rows.sequence
    return layout_step(ids, store.lengths[ids], capacity=rows.capacity, ranks=groups, packed=rows.packed)


def _built(store: TokenStore, layout: StepLayout, *, rows: RowFormat, rank: int) -> list[Batch]:
    return [
        build_batch(
            store,
            each.rows,
            positions=rows.positions,
            on_split=rows.on_split,
            pad_id=rows.pad_id,
            columns_multiple_of=rows.sequence,
        )
        for each in layout.micro_batches(rank // rows.sequence)
    ]


@dataclass(frozen=True)
class StepComing:
    """A step whose micro-batches are made.

    Attributes:
        work: of all ranks. waited: seconds that the caller waited for it.
    """

    step: int
    micro_batches: list[Batch]
    work: StepWork
    waited: float


class StepBatches:
    """Which documents a step holds comes from `order` alone; the ranks only share them.

    Args:
        rank, size: this rank among all ranks.
        pinned: put the micro-batches into memory that a GPU copies from by itself.
    """

    def __init__(
        self, store: TokenStore, order: StepSampler, *, rows: RowFormat, rank: int, size: int, pinned: bool = False
    ) -> None:
        self._store = store
        self._order = order
        self._rows = rows
        self._rank = rank
        self._size = size
        self._pinned = pinned

    def of_step(self, step: int) -> list[Batch]:
        """This rank's micro-batches of optimizer step `step` (from 1); the same number on every rank."""
        ids = self._order.documents(*self._order.position(step))
        return rank_batches(self._store, ids, rows=self._rows, rank=self._rank, size=self._size)

    def names_of_step(self, step: int) -> list[str]:
        """The documents of a step, by name, over all ranks."""
        ids = self._order.documents(*self._order.position(step))
        return [self._store.document(int(index)).name for index in ids]

    def alone(self, step: int, name: str) -> list[Batch]:
        """One document of a step by itself, the same on every rank."""
        ids = self._order.documents(*self._order.position(step))
        chosen = np.array([index for index in ids if self._store.name(int(index)) == name][:1], dtype=np.int64)
        return rank_batches(self._store, chosen, rows=self._rows, rank=0, size=self._rows.sequence)

    def epoch_after(self, step: int) -> float:
        """How many epochs are done after `step`, as a fraction."""
        epoch, step_in_epoch = self._order.position(step)
        return epoch + (step_in_epoch + 1) / self._order.steps_in_epoch(epoch)

    def steps(self, first: int, last: int) -> Iterator[StepComing]:
        """Steps first … last with their micro-batches; the next ones' are made while the engine works."""
        with ThreadPoolExecutor(max_workers=1, thread_name_prefix="batches") as worker:
            ahead = deque(worker.submit(self._made, step) for step in range(first, min(last, first + _AHEAD - 1) + 1))
            for step in range(first, last + 1):
                started = time.perf_counter()
                batches, work = ahead.popleft().result()
                waited = time.perf_counter() - started
                if step + _AHEAD <= last:
                    ahead.append(worker.submit(self._made, step + _AHEAD))
                yield StepComing(step, batches, work, waited)

    def _made(self, step: int) -> tuple[list[Batch], StepWork]:
        ids = self._order.documents(*self._order.position(step))
        layout = _laid_out(self._store, ids, rows=self._rows, size=self._size)
        batches = _built(self._store, layout, rows=self._rows, rank=self._rank)
        lengths = self._store.lengths[ids].astype(np.int64)
        work = StepWork(tokens=int(lengths.sum()), squares=int((lengths**2).sum()), places=layout.places)
        return [batch.pinned() for batch in batches] if self._pinned else batches, work
