"""Rows of local files, each with its number: the line, or the row from 1 in parquet files."""

from __future__ import annotations

import csv
import gzip
import io
import json
import sys
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import IO, Any

from seqaware.data.locate import file_kind
from seqaware.errors import DataError

_PARQUET_ROWS_AT_ONCE = 1024
Row = tuple[dict[str, Any], int]


def read_file(path: Path) -> Iterator[Row]:
    """(fields, line or row number from 1) of every row of a jsonl, json, csv, parquet or text file.

    Raises:
        DataError: a line that is not what the file's kind demands, by file and number; an unreadable file.
    """
    readers = {"jsonl": _read_jsonl, "json": _read_json, "csv": _read_csv, "parquet": _read_parquet, "text": _read_text}
    try:
        yield from readers[file_kind(path)](path)
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


def _read_jsonl(path: Path) -> Iterator[Row]:
    with _open(path) as file:
        for number, line in enumerate(file, 1):
            if line.isspace():
                continue
            try:
                value = json.loads(line)
            except ValueError as error:
                raise DataError(
                    f"{path}, line {number}: not JSON", got=_shown(line), do=f"correct it ({error})"
                ) from error
            if not isinstance(value, dict):
                raise DataError(f"{path}, line {number}: a line must be an object with fields", got=_shown(line))
            yield value, number


def _read_json(path: Path) -> Iterator[Row]:
    """An array of objects, or (as many files named .json are) one object a line."""
    with _open(path) as file:
        first = next((line for line in file if not line.isspace()), "")
    if not first.lstrip().startswith("["):
        yield from _read_jsonl(path)
        return
    with _open(path) as file:
        try:
            rows = json.load(file)
        except ValueError as error:
            raise DataError(f"{path} is not JSON", got=error) from error
    for number, row in enumerate(rows, 1):
        if not isinstance(row, dict):
            raise DataError(f"{path}, element {number}: an element must be an object with fields", got=_shown(str(row)))
        yield row, number


def _read_csv(path: Path) -> Iterator[Row]:
    bare = path.with_suffix("") if path.suffix == ".gz" else path
    csv.field_size_limit(min(sys.maxsize, 2**31 - 1))
    with _open(path) as file:
        reader = csv.DictReader(file, delimiter="\t" if bare.suffix == ".tsv" else ",", strict=True)
        try:
            yield from (_csv_row(row, reader, path) for row in reader)
        except csv.Error as error:
            raise DataError(f"{path}, line {reader.line_num}: not CSV", got=error) from error


def _csv_row(row: dict[str | Any, str | Any], reader: csv.DictReader[str], path: Path) -> Row:
    if None in row or None in row.values():
        expected = len(reader.fieldnames or ())
        raise DataError(f"{path}, line {reader.line_num}: a row must have the header's {expected} columns")
    return dict(row), reader.line_num


def _read_parquet(path: Path) -> Iterator[Row]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            batches = file.iter_batches(batch_size=_PARQUET_ROWS_AT_ONCE)
            rows = chain.from_iterable(batch.to_pylist() for batch in batches)
            yield from ((row, number) for number, row in enumerate(rows, 1))
    except pyarrow.ArrowException as error:
        raise DataError(f"{path} is not a readable parquet file", got=error) from error


def _read_text(path: Path) -> Iterator[Row]:
    """A line is a document, as `datasets` reads text files."""
    with _open(path) as file:
        for number, line in enumerate(file, 1):
            yield {"text": line.rstrip("\r\n")}, number


def _shown(line: str) -> str:
    line = line.strip()
    return repr(line if len(line) <= 80 else line[:77] + "...")
