"""The micro-batches of this rank, step by step, made one step ahead of the engine."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from seqaware.data.batch import Batch, build_batch
from seqaware.data.order import StepOrder
from seqaware.data.packing import layout_step
from seqaware.data.store import TokenStore


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
    groups = size // rows.sequence
    layout = layout_step(ids, store.lengths[ids], capacity=rows.capacity, ranks=groups, packed=rows.packed)
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


class StepBatches:
    """Which documents a step holds comes from `order` alone; the ranks only share them.

    Args:
        rank, size: this rank among all ranks.
    """

    def __init__(self, store: TokenStore, order: StepOrder, *, rows: RowFormat, rank: int, size: int) -> None:
        self._store = store
        self._order = order
        self._rows = rows
        self._rank = rank
        self._size = size

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

    def steps(self, first: int, last: int) -> Iterator[tuple[int, list[Batch]]]:
        """Steps first … last with their micro-batches; the next step's are made while the engine works."""
        if first > last:
            return
        with ThreadPoolExecutor(max_workers=1, thread_name_prefix="batches") as worker:
            coming = worker.submit(self.of_step, first)
            for step in range(first, last + 1):
                batches = coming.result()
                if step < last:
                    coming = worker.submit(self.of_step, step + 1)
                yield step, batches
