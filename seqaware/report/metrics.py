"""`metrics.jsonl`: one JSON object a line, written by rank 0, complete up to the last line even after a crash."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from seqaware.engine.checkpoint.manifest import write_durably
from seqaware.errors import StorageError


class MetricsFile:
    """Appends lines to a run's `metrics.jsonl`, each flushed as it is written.

    A line that cannot be written (a full disk) is kept and written with a later one: training goes on without it.

    Args:
        path: the file. It is created with its folder.
        from_step: when a run resumes after step n, lines of later optimizer steps are dropped first, so that the file
            tells every step once.

    Attributes:
        lost: numbers of the lines before the last that could not be read then. A disk may lose blocks of a file when
            the power goes; that is no reason not to go on.
    """

    def __init__(self, path: Path, *, from_step: int = 0) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.lost: list[int] = []
        if path.exists():
            _keep_until(path, from_step, lost=self.lost)
        self._path = path
        self._file = path.open("ab", buffering=0)
        self._waiting = b""

    def write(self, line: Mapping[str, Any]) -> None:
        self._waiting += json.dumps({key: _finite(value) for key, value in line.items()}).encode() + b"\n"
        with suppress(OSError):
            self._write_waiting()

    def go_back(self, step: int) -> None:
        """Drop the lines of later steps: the run has gone back to `step`.

        Raises:
            OSError: the file cannot be written anew; it stays as it is.
        """
        self._write_waiting()
        _keep_until(self._path, step)
        self._file.close()
        self._file = self._path.open("ab", buffering=0)

    def close(self) -> None:
        """Write what waits, durably.

        Raises:
            StorageError: it cannot be written.
        """
        try:
            with self._file:
                self._write_waiting()
                os.fsync(self._file.fileno())
        except OSError as error:
            raise StorageError(f"the last lines of {self._path} cannot be written", got=error) from error

    def _write_waiting(self) -> None:
        while self._waiting:
            self._waiting = self._waiting[self._file.write(self._waiting) :]


def read_metrics(path: Path, *, lost: list[int] | None = None) -> Iterator[dict[str, Any]]:
    """The lines of a metrics file that can be read. A torn last line, as a crash leaves it, ends the reading.

    Args:
        lost: takes the numbers, from 1, of the lines before the last that cannot be read.
    """
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    for number, text in enumerate(lines, start=1):
        line = _line(text)
        if line is not None:
            yield line
        elif number < len(lines) and lost is not None:
            lost.append(number)


def _line(text: str) -> dict[str, Any] | None:
    try:
        line = json.loads(text)
    except ValueError:
        return None
    return line if isinstance(line, dict) else None


def _keep_until(path: Path, step: int, *, lost: list[int] | None = None) -> None:
    # A run that begins anew tells everything anew, also what comes before its first step.
    kept = [line for line in read_metrics(path, lost=lost) if line.get("step", 0) <= step] if step else []
    write_durably(path, "".join(json.dumps(line) + "\n" for line in kept))


def _finite(value: Any) -> Any:
    # JSON has no NaN and no infinity; a string keeps what happened readable.
    match value:
        case float() if not math.isfinite(value):
            return str(value)
        case list():
            return [_finite(each) for each in value]
        case dict():
            return {key: _finite(each) for key, each in value.items()}
    return value
