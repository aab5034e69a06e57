"""`metrics.jsonl`: one JSON object a line, written by rank 0, complete up to the last line even after a crash.

A line is read only if it is valid: a damaged one is skipped and counted. `LINES` says what the lines of each kind hold.
"""

from __future__ import annotations

import errno
import json
import math
import os
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any, BinaryIO, Literal

from pydantic import BaseModel, Field, TypeAdapter, ValidationError, model_validator

from seqaware.checkpoint.manifest import write_durably
from seqaware.data.file_records import Count, Text
from seqaware.errors import StorageError
from seqaware.files import MalformedError, parse_json

# A line has about 500 bytes; one of an evaluation with many buckets some thousands.
_LINE_BYTES = 2**20

Number = Annotated[float, Field(strict=True, ge=-1e100, le=1e100)] | Literal["nan", "inf", "-inf"]
"""A figure that may be no number, or infinite: JSON has neither, so they are written as text. Far beyond float32, and
sums of squares do not overflow."""
Amount = Annotated[float, Field(strict=True, ge=0, le=1e15)]
Share = Annotated[float, Field(strict=True, ge=0, le=1)]


class _Line(BaseModel):
    """Any line, of unknown kinds too."""

    kind: Text
    step: Count


class _StepLine(_Line):
    loss: Number
    unweighted_loss: Number
    grad_norm: Number = 0.0
    lr: Amount = 0.0
    epoch: Amount = 0.0
    tokens: Amount = 0.0
    supervised_tokens: Amount = 0.0
    sequences: Amount = 0.0
    accuracy: Number = 0.0
    weight_sum: Number = 0.0
    step_seconds: Amount = 0.0
    tokens_per_second: Amount = 0.0
    supervised_tokens_per_second: Amount = 0.0
    mfu: Amount | None = None
    wait_share: Amount | None = None
    padding_share: Amount | None = None
    peak_memory_gb: Amount | None = None


class _Bucket(BaseModel):
    """The held-out tokens of some positions."""

    first: Annotated[Count, Field(ge=1)] = Field(alias="from")
    last: Annotated[Count, Field(ge=1)] | None = Field(alias="to")
    loss: Number
    accuracy: Number
    weight: Number


SHARES = {
    "exact_match": "exact match",
    "f1": "F1",
    "choice_accuracy": "right choices",
    "choice_accuracy_normalised": "right choices, by length",
}
"""The shares that an evaluation may hold, each with its interval as _low and _high, and their titles."""


class EvaluationShares(BaseModel):
    """What an evaluation counts: the shares of SHARES, and of how many questions."""

    questions: Count | None = None

    @model_validator(mode="before")
    @classmethod
    def _known_shares(cls, values: Any) -> Any:
        names = [f"{name}{end}" for name in SHARES for end in ("", "_low", "_high")]
        for name in names if isinstance(values, dict) else ():
            try:
                _SHARE.validate_python(values.get(name))
            except ValidationError as error:
                raise ValueError(f"{name} is no share") from error
        return values


def shown_shares(found: Mapping[str, Any]) -> Iterator[tuple[str, str, str, str]]:
    """The title of each share of an evaluation that has an interval, the share, and the ends of the interval."""
    for name, title in SHARES.items():
        values = [found.get(f"{name}{end}") for end in ("", "_low", "_high")]
        if None not in values:
            share, low, high = (f"{value:.1%}" for value in values)
            yield title, share, low, high


_SHARE: TypeAdapter[float | None] = TypeAdapter(Share | None)


class _Evaluation(EvaluationShares, _Line):
    loss: Number = 0.0
    unweighted_loss: Number = 0.0
    accuracy: Number = 0.0
    by_position: list[_Bucket] = []


class _Pace(_Line):
    seconds: Annotated[list[Amount], Field(min_length=1)]
    hosts: list[Text]

    @model_validator(mode="after")
    def _one_host_each(self) -> _Pace:
        if len(self.hosts) != len(self.seconds):
            raise ValueError("seconds and hosts are of different ranks")
        return self


LINES: Mapping[str, type[_Line]] = {"step": _StepLine, "evaluation": _Evaluation, "pace": _Pace}


class MetricsWriter:
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
        self._waiting += json.dumps(_finite(dict(line))).encode() + b"\n"
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
    """The valid lines of a metrics file; figures that are no number or infinite are floats again.

    Args:
        lost: takes the numbers, from 1, of the lines that are not valid; without a last one that ends without a line
            break, as a crash or a look in mid-write finds it.

    Raises:
        OSError: the file cannot be read.
    """
    if path.exists() and not path.is_file():
        raise OSError(errno.EINVAL, "not a regular file", str(path))
    with path.open("rb") as file:
        for number, text in enumerate(_texts(file), start=1):
            line = _line(text)
            if line is not None:
                yield line
            elif text.endswith(b"\n") and lost is not None:
                lost.append(number)


def _texts(file: BinaryIO) -> Iterator[bytes]:
    """The lines of the file; of one that is too long only the end, which is not valid."""
    while text := file.readline(_LINE_BYTES):
        while not text.endswith(b"\n") and (more := file.readline(_LINE_BYTES)):
            text = b"too long " + more[-1:]
        yield text


def _line(text: bytes) -> dict[str, Any] | None:
    try:
        line: dict[str, Any] = parse_json(text)
        kind = _Line.model_validate(line).kind
        LINES.get(kind, _Line).model_validate(line)
    except (MalformedError, ValidationError):
        return None
    return {key: _with_numbers(value) for key, value in line.items()}


def _keep_until(path: Path, step: int, *, lost: list[int] | None = None) -> None:
    # A run that begins anew tells everything anew, also what comes before its first step.
    kept = [line for line in read_metrics(path, lost=lost) if line["step"] <= step] if step else []
    write_durably(path, "".join(json.dumps(_finite(line)) + "\n" for line in kept))


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


def _with_numbers(value: Any) -> Any:
    """The inverse of `_finite`."""
    match value:
        case "nan" | "inf" | "-inf":
            return float(value)
        case dict():
            return {key: _with_numbers(each) for key, each in value.items()}
        case list():
            return [_with_numbers(each) for each in value]
    return value
