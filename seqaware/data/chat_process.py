"""Chat templates in a process of their own, with limits on CPU time and memory.

A chat template comes with a model, so anybody may have written it. jinja2's sandbox keeps it from files and from
Python's internals, but not from loops without end or from strings of terabytes. Only the kernel bounds every such
template: it ends a process that has used up its CPU time, even within one call of C.
"""

from __future__ import annotations

import multiprocessing
import os
import resource
import signal
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, Any

from seqaware.errors import DataError

if TYPE_CHECKING:
    from multiprocessing.context import ForkProcess

    from seqaware.data.chat import ChatRenderer
    from seqaware.data.templates import Example

Row = tuple[Mapping[str, Any], str]
"""The fields of a record, and its name."""

MEMORY_BYTES = 2**30
_PATIENCE_SECONDS = 600.0
_LEAVE_SECONDS = 5.0
_DO = "correct format.chat_template, or the tokenizer's chat template"


class ChatProcess:
    """A `ChatRenderer` in a forked process. It ends with this object, and with this process."""

    def __init__(self, renderer: ChatRenderer) -> None:
        # Forked, as an import of transformers in another process would take seconds. The child runs Python code only.
        context = multiprocessing.get_context("fork")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(renderer, theirs, self._connection), daemon=True)
        self._process.start()
        theirs.close()
        weakref.finalize(self, _end, self._connection, self._process)

    def examples(self, rows: Sequence[Row]) -> list[Example]:
        """The examples of rows, as `ChatRenderer.example` makes them.

        Raises:
            DataError: as there; or the template uses too much time or memory.
        """
        examples: list[Example] = []
        try:
            self._connection.send(rows)
            for _ in rows:
                answer = self._answer()
                if isinstance(answer, DataError):
                    raise answer
                examples.append(answer)
        except (EOFError, OSError) as error:
            self._process.join(_LEAVE_SECONDS)
            _, name = rows[len(examples)]
            raise DataError(f"{name}: the chat template {_cause(self._process.exitcode)}", do=_DO) from error
        return examples

    def _answer(self) -> Any:
        # A limit of CPU time ends templates; this ends what stands still, on a machine that is not suspended.
        if not self._connection.poll(_PATIENCE_SECONDS):
            self._process.kill()
        return self._connection.recv()


def _cause(code: int | None) -> str:
    if code == -signal.SIGPROF:
        return "did not end: it used up the CPU time for one conversation (an endless loop?)"
    return f"ended the process that rendered it (exit code {code}), perhaps for want of memory"


def _serve(renderer: ChatRenderer, connection: Connection, parents: Connection) -> None:
    """The work of the process: one answer for each row, until the other end is closed."""
    parents.close()
    # The terminal's Ctrl-C and a scheduler's SIGTERM are the parent's to handle; this process ends with it.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    limit = _address_space() + MEMORY_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    while True:
        try:
            rows: Sequence[Row] = connection.recv()
        except EOFError:
            return
        with suppress(BrokenPipeError):  # the parent ends, and the next `recv` says so
            for answer in _answers(renderer, rows):
                connection.send(answer)


def _answers(renderer: ChatRenderer, rows: Sequence[Row]) -> Iterator[Example | DataError]:
    """The examples up to the first row that cannot be used, and its error."""
    try:
        for fields, name in rows:
            yield renderer.example(fields, name)
    except DataError as error:
        yield error


def _address_space() -> int:
    """Bytes that are mapped now: those of the parent's libraries and devices count as well."""
    return int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")


def _end(connection: Connection, process: ForkProcess) -> None:
    connection.close()
    # It has nothing to save, and may not see the connection closed: processes forked later hold it open.
    process.kill()
    process.join()
