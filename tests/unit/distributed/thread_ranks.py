"""Ranks as threads of one process: what a group of them exchanges, without processes or a process group."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch
from torch import Tensor

from tests.patience import LAUNCH_SECONDS

T = TypeVar("T")


class ThreadGroup:
    """A SequenceGroup among threads: each puts down its slices, all meet, each takes up its own."""

    def __init__(self, index: int, table: list[Tensor], barrier: threading.Barrier) -> None:
        self.index = index
        self.size = len(table)
        self._table = table
        self._barrier = barrier

    def exchange(self, tensor: Tensor) -> Tensor:
        self._table[self.index] = tensor.detach().clone()
        self._barrier.wait(timeout=LAUNCH_SECONDS)
        received = torch.stack([sent[self.index] for sent in self._table])
        self._barrier.wait(timeout=LAUNCH_SECONDS)
        return received

    def columns(self, tensor: Tensor) -> Tensor:
        return tensor.chunk(self.size, dim=1)[self.index]

    def join(self, tensor: Tensor) -> Tensor:
        return torch.cat(list(self.exchange(torch.stack([tensor] * self.size))), dim=1)


def on_ranks(ranks: int, work: Callable[[ThreadGroup], T]) -> list[T]:
    """What `work` returns on each of so many ranks."""
    table = [torch.empty(0)] * ranks
    barrier = threading.Barrier(ranks)
    with ThreadPoolExecutor(ranks) as threads:
        futures = [threads.submit(work, ThreadGroup(index, table, barrier)) for index in range(ranks)]
        return [future.result() for future in futures]
