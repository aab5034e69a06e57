"""Rows of local files, each with its number: the line, or the row from 1 in parquet files."""

from __future__ import annotations

import csv
import gzip
import io
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain, islice
from pathlib import Path
from typing import IO, Any

from seqaware.data.locate import file_kind
from seqaware.errors import DataError

_PARQUET_ROWS_AT_ONCE = 1024
Row = tuple[dict[str, Any], int]


def read_file(path: Path, *, begin: int = 0, end: int | None = None) -> Iterator[Row]:
    """(fields, line or row number from 1) of the rows of a jsonl, json, csv, parquet or text file.

    Args:
        begin, end: only these rows, counted from 0 (blank lines are none). Those before `begin` are passed over, which
            is many times faster than reading them.

    Raises:
        DataError: a line that is not what the file's kind demands, by file and number; an unreadable file.
    """
    readers = {"jsonl": _read_jsonl, "json": _read_json, "csv": _read_csv, "parquet": _read_parquet, "text": _read_text}
    with _file_errors(path):
        yield from readers[file_kind(path)](path, begin, end)


def count_rows(path: Path) -> int:
    """How many rows `read_file` would give. Lines are counted, not read.

    Raises:
        DataError: the file is unreadable, or broken so that its rows cannot be told.
    """
    counters = {"jsonl": _count_jsonl, "json": _count_json, "csv": _count_csv, "parquet": _count_parquet}
    with _file_errors(path):
        return counters.get(file_kind(path), _count_lines)(path)


@contextmanager
def _file_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise DataError(f"{path} cannot be read", got=error.strerror or error) from error
    except EOFError as error:
        raise DataError(f"{path} is cut short", got=error) from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text", got=error) from error


def _open(path: Path) -> IO[str]:
    if path.suffix == ".gz":
        return io.TextIOWrapper(gzip.open(path, "rb"), encoding="utf-8-sig", newline="")
    return path.open(encoding="utf-8-sig", newline="")


def _read_jsonl(path: Path, begin: int, end: int | None) -> Iterator[Row]:
    with _open(path) as file:
        lines = ((line, number) for number, line in enumerate(file, 1) if not line.isspace())
        for line, number in islice(lines, begin, end):
            try:
                value = json.loads(line)
            except ValueError as error:
                raise DataError(
                    f"{path}, line {number}: not JSON", got=_shown(line), do=f"correct it ({error})"
                ) from error
            if not isinstance(value, dict):
                raise DataError(f"{path}, line {number}: a line must be an object with fields", got=_shown(line))
            yield value, number


def _count_jsonl(path: Path) -> int:
    with _open(path) as file:
        return sum(not line.isspace() for line in file)


def _read_json(path: Path, begin: int, end: int | None) -> Iterator[Row]:
    """An array of objects, or (as many files named .json are) one object a line."""
    if not _is_array(path):
        yield from _read_jsonl(path, begin, end)
        return
    for number, row in islice(enumerate(_json_array(path), 1), begin, end):
        if not isinstance(row, dict):
            raise DataError(f"{path}, element {number}: an element must be an object with fields", got=_shown(str(row)))
        yield row, number


def _count_json(path: Path) -> int:
    return len(_json_array(path)) if _is_array(path) else _count_jsonl(path)


def _is_array(path: Path) -> bool:
    with _open(path) as file:
        first = next((line for line in file if not line.isspace()), "")
    return first.lstrip().startswith("[")


def _json_array(path: Path) -> list[Any]:
    with _open(path) as file:
        try:
            rows: list[Any] = json.load(file)
        except ValueError as error:
            raise DataError(f"{path} is not JSON", got=error) from error
    return rows


def _read_csv(path: Path, begin: int, end: int | None) -> Iterator[Row]:
    with _open(path) as file:
        reader = _csv_reader(file, path)
        try:
            if reader.fieldnames is None:  # asked first: the reader takes the first row it sees for the header
                return
            for _ in islice(filter(None, reader.reader), begin):
                pass
            left = None if end is None else end - begin
            yield from (_csv_row(row, reader, path) for row in islice(reader, left))
        except csv.Error as error:
            raise DataError(f"{path}, line {reader.reader.line_num}: not CSV", got=error) from error


def _count_csv(path: Path) -> int:
    with _open(path) as file:
        reader = _csv_reader(file, path)
        try:
            return 0 if reader.fieldnames is None else sum(map(bool, reader.reader))
        except csv.Error as error:
            raise DataError(f"{path}, line {reader.reader.line_num}: not CSV", got=error) from error


def _csv_reader(file: IO[str], path: Path) -> csv.DictReader[str]:
    csv.field_size_limit(min(sys.maxsize, 2**31 - 1))
    bare = path.with_suffix("") if path.suffix == ".gz" else path
    return csv.DictReader(file, delimiter="\t" if bare.suffix == ".tsv" else ",", strict=True)


def _csv_row(row: dict[str | Any, str | Any], reader: csv.DictReader[str], path: Path) -> Row:
    if None in row or None in row.values():
        expected = len(reader.fieldnames or ())
        raise DataError(f"{path}, line {reader.line_num}: a row must have the header's {expected} columns")
    return dict(row), reader.line_num


def _read_parquet(path: Path, begin: int, end: int | None) -> Iterator[Row]:
    with _parquet(path) as file:
        batches = _batches_from(file, begin)
        rows = chain.from_iterable(batch.to_pylist() for batch in batches)
        left = None if end is None else end - begin
        yield from ((row, number) for number, row in enumerate(islice(rows, left), begin + 1))


def _batches_from(file: Any, begin: int) -> Iterator[Any]:
    """Batches of the rows from `begin` on; groups of rows before it are not read from the disk."""
    first = 0
    while first < file.num_row_groups and begin >= file.metadata.row_group(first).num_rows:
        begin -= file.metadata.row_group(first).num_rows
        first += 1
    groups = list(range(first, file.num_row_groups))
    for batch in file.iter_batches(batch_size=_PARQUET_ROWS_AT_ONCE, row_groups=groups):
        yield batch.slice(min(begin, batch.num_rows))
        begin = max(0, begin - batch.num_rows)


def _count_parquet(path: Path) -> int:
    with _parquet(path) as file:
        return int(file.metadata.num_rows)


@contextmanager
def _parquet(path: Path) -> Iterator[Any]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            yield file
    except pyarrow.ArrowException as error:
        raise DataError(f"{path} is not a readable parquet file", got=error) from error


def _read_text(path: Path, begin: int, end: int | None) -> Iterator[Row]:
    """A line is a document, as `datasets` reads text files."""
    with _open(path) as file:
        for number, line in islice(enumerate(file, 1), begin, end):
            yield {"text": line.rstrip("\r\n")}, number


def _count_lines(path: Path) -> int:
    with _open(path) as file:
        return sum(1 for _ in file)


def _shown(line: str) -> str:
    line = line.strip()
    return repr(line if len(line) <= 80 else line[:77] + "...")
