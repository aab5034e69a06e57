"""The log file of one rank: every line is in the kernel's hands before `note` returns, so that SIGKILL loses none.

A rank writes before its run's folder is known; the file then moves there, and the same descriptor goes on.
"""

from __future__ import annotations

import faulthandler
import logging
import os
import time
import warnings
from contextlib import suppress
from pathlib import Path
from typing import Any

from seqaware.masking import escaped

_MOST_BYTES_OF_TAIL = 64 * 1024


class RankLog:
    """A file that only grows. Needs no lock, so that a signal's handler may write as well.

    Attributes:
        path: where it lies now.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._descriptor = _open(path)

    def note(self, text: str) -> None:
        """Add a line, or several that belong together, with the time before them."""
        stamp = time.strftime("%Y-%m-%d %H:%M:%S")
        self.raw(f"{stamp} {text.rstrip()}\n")

    def raw(self, text: str) -> None:
        """Add text as it is. A disk that is full ends no training: what does not fit is lost."""
        with suppress(OSError):
            os.write(self._descriptor, text.encode(errors="replace"))

    def fileno(self) -> int:
        return self._descriptor

    def move(self, path: Path) -> None:
        """Go on in another file, which begins with what this one holds."""
        path.parent.mkdir(parents=True, exist_ok=True)
        following = _open(path)
        content = self.path.read_bytes()
        os.write(following, content)
        # The descriptor's number stays: faulthandler holds it.
        os.dup2(following, self._descriptor, inheritable=False)
        os.close(following)
        late = self.path.read_bytes()[len(content) :]
        os.write(self._descriptor, late)
        self.path.unlink()
        self.path = path

    def hear_the_process(self) -> None:
        """Take in what Python itself says: warnings, messages of libraries' loggers, the stack at a fatal signal."""
        faulthandler.enable(self._descriptor, all_threads=True)
        logging.getLogger().addHandler(_Handler(self))
        show = warnings.showwarning

        def show_and_note(message: Any, category: Any, filename: str, *more: Any, **named: Any) -> None:
            lineno = more[0] if more else named.get("lineno", 0)
            self.note(f"{category.__name__}: {message} ({filename}:{lineno})")
            show(message, category, filename, *more, **named)

        warnings.showwarning = show_and_note


class _Handler(logging.Handler):
    """Messages of loggers, from WARNING on."""

    def __init__(self, log: RankLog) -> None:
        super().__init__(logging.WARNING)
        self._log = log

    def emit(self, record: logging.LogRecord) -> None:
        self._log.note(f"{record.levelname} {record.name}: {record.getMessage()}")
        # A root logger with a handler no longer shows what nobody else handles: we do it in its place.
        if logging.getLogger().handlers == [self] and logging.lastResort is not None:
            logging.lastResort.handle(record)


def _open(path: Path) -> int:
    return os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o644)


def last_lines(path: Path, count: int) -> list[str]:
    """The newest lines of a log, as they may be shown; none where it cannot be read."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - _MOST_BYTES_OF_TAIL))
            content = file.read()
    except OSError:
        return []
    return [escaped(line) for line in content.decode(errors="replace").splitlines()[-count:]]
