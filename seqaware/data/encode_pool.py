"""Chunks of records through several tokenising processes, results in the order of the records."""

from __future__ import annotations

import multiprocessing
import os
import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from itertools import chain
from multiprocessing.connection import wait
from typing import Any

from seqaware.data.encode import TEXT_BYTES, ExampleEncoder, Outcome, Recipe
from seqaware.data.sources import Record
from seqaware.errors import DataError

CHUNK_RECORDS = 512
# Starting processes takes seconds, and the tokenizer library has threads of its own: only what lasts longer gains.
_SECONDS_ALONE = 15.0
_CHUNKS_WAITING_PER_WORKER = 3

_encoder: ExampleEncoder | None = None


def encode_records(recipe: Recipe, records: Iterable[Record], *, workers: int) -> Iterator[tuple[int, Outcome]]:
    """(number of records, what became of them) chunk by chunk. Memory holds a few chunks, whatever the data's size.

    Raises:
        DataError: a record that cannot be used; a process that was killed.
    """
    chunks = _chunks(records)
    encoder = ExampleEncoder(recipe)
    begun = time.monotonic()
    for chunk in chunks:
        if workers > 1 and time.monotonic() - begun >= _SECONDS_ALONE:
            break
        yield len(chunk), encoder.encode(chunk)
    else:
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=context, initializer=_start, initargs=(recipe,)) as pool:
        try:
            yield from _through(pool, chain([chunk], chunks), waiting_at_most=workers * _CHUNKS_WAITING_PER_WORKER)
        except BrokenProcessPool as error:
            do = "lower dataset.workers if memory ran out"
            raise DataError("a tokenising process was killed", do=do) from error
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _through(
    pool: ProcessPoolExecutor, chunks: Iterable[list[Record]], *, waiting_at_most: int
) -> Iterator[tuple[int, Outcome]]:
    waiting: deque[tuple[int, Future[Outcome]]] = deque()
    for chunk in chunks:
        waiting.append((len(chunk), pool.submit(_encode, chunk)))
        if len(waiting) == waiting_at_most:
            count, future = waiting.popleft()
            yield count, future.result()
    for count, future in waiting:
        yield count, future.result()


def _chunks(records: Iterable[Record]) -> Iterator[list[Record]]:
    """Records of one prefix, at most CHUNK_RECORDS together, and fewer where they are long."""
    chunk: list[Record] = []
    characters = 0
    for record in records:
        full = len(chunk) == CHUNK_RECORDS or characters > TEXT_BYTES
        if chunk and (full or chunk[0].prefix != record.prefix):
            yield chunk
            chunk, characters = [], 0
        chunk.append(record)
        characters += _characters(record.fields)
    if chunk:
        yield chunk


def _characters(value: Any) -> int:
    match value:
        case str() | bytes():
            return len(value)
        case dict():
            return sum(map(_characters, value.values()))
        case list():
            return sum(map(_characters, value))
        case _:
            return 1


def _start(recipe: Recipe) -> None:
    """Set up a tokenising process."""
    global _encoder
    # One thread each: the processes are the parallelism. The library reads this when it encodes.
    os.putenv("TOKENIZERS_PARALLELISM", "false")
    parent = multiprocessing.parent_process()
    assert parent is not None, "only started by a pool"
    threading.Thread(target=_leave_with, args=(parent.sentinel,), daemon=True).start()
    _encoder = ExampleEncoder(recipe)


def _leave_with(sentinel: int) -> None:
    """A killed parent would leave its pool waiting for work for ever."""
    wait([sentinel])
    os._exit(1)


def _encode(chunk: list[Record]) -> Outcome:
    assert _encoder is not None, "the process was not set up"
    return _encoder.encode(chunk)
