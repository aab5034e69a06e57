"""Where the ranks of a restarted worker group meet, told through a store that still holds what dead ranks have left.

torchrun keeps one store for all its attempts. A rank of the second attempt that is quicker than the others finds there
what theirs of the first attempt have left, and waits for ranks that are dead. Nothing in the environment tells attempts
apart: TORCHELASTIC_RESTART_COUNT counts the failures of one host. So each rank asks, under a word that nobody has used
before, and only a living rank 0 answers it.
"""

from __future__ import annotations

import secrets
import time
from typing import Protocol

_PAUSE_SECONDS = 0.02


class Store(Protocol):
    """What is asked of torch's stores."""

    def set(self, key: str, value: str, /) -> object: ...

    def get(self, key: str, /) -> bytes:
        """Waits until the key is there."""

    def check(self, keys: list[str], /) -> bool: ...


def agree_on_port(store: Store, rank: int, *, size: int, port: int) -> int:
    """Rank 0's `port`, on all ranks of this attempt, whatever earlier ones have left in the store. Collective."""
    mine = secrets.token_hex(8)
    if rank == 0:
        _answer_all(store, range(1, size), f"{port} {mine}")
        return port
    store.set(_asks(rank), mine)
    answer = store.get(_answers(mine)).decode()
    store.set(_heard(rank, answer), "")
    return int(answer.split()[0])


def _answer_all(store: Store, ranks: range, answer: str) -> None:
    waiting = set(ranks)
    while waiting:
        for rank in waiting:
            # It may be the question of a dead rank: it is asked again until a living one has heard.
            if store.check([_asks(rank)]):
                store.set(_answers(store.get(_asks(rank)).decode()), answer)
        waiting = {rank for rank in waiting if not store.check([_heard(rank, answer)])}
        time.sleep(_PAUSE_SECONDS)


def _asks(rank: int) -> str:
    return f"seqaware/rank {rank} asks"


def _answers(word: str) -> str:
    return f"seqaware/answer to {word}"


def _heard(rank: int, answer: str) -> str:
    return f"seqaware/rank {rank} heard {answer}"
