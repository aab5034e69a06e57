"""Ranks of one attempt agree, whatever the dead ranks of earlier attempts have left in the store."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

from seqaware.engine.meeting import agree_on_port

SIZE = 4


class SharedStore:
    """torch's store, in one process."""

    def __init__(self) -> None:
        self._values: dict[str, bytes] = {}
        self._changed = threading.Condition()

    def set(self, key: str, value: str) -> None:
        with self._changed:
            self._values[key] = value.encode()
            self._changed.notify_all()

    def get(self, key: str) -> bytes:
        with self._changed:
            assert self._changed.wait_for(lambda: key in self._values, timeout=20)
            return self._values[key]

    def check(self, keys: list[str]) -> bool:
        with self._changed:
            return all(key in self._values for key in keys)


def _attempt(store: SharedStore, port: int, *, ranks: range) -> list[int]:
    """What the ranks agree on when they come in this order, each once the one before it has had its time to look."""
    with ThreadPoolExecutor(SIZE) as pool:
        agreed = []
        for rank in ranks:
            agreed.append(pool.submit(agree_on_port, store, rank, size=SIZE, port=port if rank == 0 else -1))
            threading.Event().wait(0.05)
        return [each.result(timeout=20) for each in agreed]


def test_every_attempt_agrees_on_the_port_of_its_own_rank_0() -> None:
    store = SharedStore()
    assert _attempt(store, 4001, ranks=range(SIZE)) == [4001] * SIZE
    # Rank 0 comes last, and every other rank could have taken the earlier answer for its own; then first again.
    assert _attempt(store, 4002, ranks=range(SIZE - 1, -1, -1)) == [4002] * SIZE
    assert _attempt(store, 4003, ranks=range(SIZE)) == [4003] * SIZE


def test_an_attempt_that_died_while_it_met_disturbs_nobody() -> None:
    """Rank 2 asked and was killed before rank 0 was there; rank 0 answers it in vain, and waits for the living one."""
    store = SharedStore()
    store.set("seqaware/rank 2 asks", "a word of the dead")
    assert _attempt(store, 4004, ranks=range(SIZE)) == [4004] * SIZE
