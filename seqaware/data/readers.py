"""Rows of local files, each with its number: the line, or the row from 1 in parquet files.

Files are read in pieces of bounded size, whatever a line or a compressed file expands to.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import re
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain, islice
from pathlib import Path
from typing import IO, Any

from seqaware.data.resolve_source import file_kind
from seqaware.errors import DataError
from seqaware.files import MalformedError, checked_json, parse_json

_PARQUET_ROWS_AT_ONCE = 256
_PARQUET_BYTES_AT_ONCE = 32 * 2**20
ROW_CHARACTERS = 32 * 2**20
"""A row may be this long. The densest JSON of this length takes 0.7 GB in memory."""
_CHUNK = 2**20
_BLANK_LINES = 100_000
_SPACE = re.compile(r"[ \t\n\r]*")
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
    except (EOFError, zlib.error) as error:
        raise DataError(f"{path} is truncated or corrupted", got=error) from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text", got=error) from error


def _open(path: Path) -> IO[str]:
    if path.suffix == ".gz":
        return io.TextIOWrapper(gzip.open(path, "rb"), encoding="utf-8-sig", newline="")
    return path.open(encoding="utf-8-sig", newline="")


class _Lines:
    """The lines of a file, none longer than a row may be. A compressed file of 6 MB may hold a line of 6 GB.

    Attributes:
        number: of the line that was read last, from 1.
    """

    def __init__(self, file: IO[str], path: Path) -> None:
        self._file = file
        self._path = path
        self._left = ROW_CHARACTERS
        self._blank = 0
        self.number = 0

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        line = self._file.readline(self._left + 1)
        if not line:
            raise StopIteration
        self.number += 1
        self._left -= len(line)
        if self._left < 0:
            raise DataError(
                f"{self._path}, line {self.number}: a row is longer than {ROW_CHARACTERS // 2**20} Mi characters",
                do="split it into several rows",
            )
        self._blank = self._blank + 1 if line.isspace() else 0
        if self._blank > _BLANK_LINES:
            raise DataError(f"{self._path}, line {self.number}: {_BLANK_LINES:,} blank lines in succession")
        return line

    def end_row(self) -> None:
        """The lines so far are done with: the next ones belong to another row (of CSV, which may have several)."""
        self._left = ROW_CHARACTERS

    def filled(self) -> Iterator[tuple[str, int]]:
        """(line, number) of those that are not blank, each a row."""
        for line in self:
            self.end_row()
            if not line.isspace():
                yield line, self.number


def _read_jsonl(path: Path, begin: int, end: int | None) -> Iterator[Row]:
    with _open(path) as file:
        for line, number in islice(_Lines(file, path).filled(), begin, end):
            try:
                value = parse_json(line, large_integers=True)
            except MalformedError as error:
                raise DataError(
                    f"{path}, line {number}: not JSON", got=_shown(line), do=f"correct it ({error})"
                ) from error
            if not isinstance(value, dict):
                raise DataError(f"{path}, line {number}: a line must be an object with fields", got=_shown(line))
            yield value, number


def _count_jsonl(path: Path) -> int:
    with _open(path) as file:
        return sum(1 for _ in _Lines(file, path).filled())


def _read_json(path: Path, begin: int, end: int | None) -> Iterator[Row]:
    """An array of objects, or (as many files named .json are) one object a line."""
    if not _is_array(path):
        yield from _read_jsonl(path, begin, end)
        return
    with _open(path) as file:
        for number, row in islice(enumerate(_Elements(file, path), 1), begin, end):
            if not isinstance(row, dict):
                what = f"{path}, element {number}: an element must be an object with fields"
                raise DataError(what, got=f"a {type(row).__name__}")
            yield row, number


def _count_json(path: Path) -> int:
    if not _is_array(path):
        return _count_jsonl(path)
    with _open(path) as file:
        return sum(1 for _ in _Elements(file, path))


def _is_array(path: Path) -> bool:
    with _open(path) as file:
        # One that begins with more white space than this is refused by whoever reads its lines.
        chunks = (file.read(_CHUNK) for _ in range(ROW_CHARACTERS // _CHUNK + 1))
        first = next((chunk for chunk in chunks if not chunk.isspace()), "")
    return first.lstrip().startswith("[")


class _Elements:
    """The elements of a file that is one JSON array, one by one: the array itself may be larger than memory."""

    def __init__(self, file: IO[str], path: Path) -> None:
        self._file = file
        self._path = path
        self._text = ""
        self._at = 0
        self._number = 0
        self._decoder = json.JSONDecoder()

    def __iter__(self) -> Iterator[Any]:
        self._expect("[")
        if self._peek() == "]":
            self._expect("]")
        else:
            yield self._element()
            while self._peek() == ",":
                self._expect(",")
                yield self._element()
            self._expect("]")
        if self._peek():
            raise self._not_json("text after the array")

    def _peek(self) -> str:
        """The next character that is no white space; empty at the end."""
        blank = 0
        while blank <= ROW_CHARACTERS:
            found = _SPACE.match(self._text, self._at)
            assert found is not None, "white space may be empty"
            blank += found.end() - self._at
            self._at = found.end()
            if self._at < len(self._text) or not self._fill():
                return self._text[self._at : self._at + 1]
        raise self._not_json(f"more than {ROW_CHARACTERS // 2**20} Mi characters of white space")

    def _expect(self, character: str) -> None:
        found = self._peek()
        if found != character:
            raise self._not_json(f"expected {character!r}, got {found!r}" if found else "it ends too early")
        self._at += 1

    def _fill(self) -> bool:
        """Read on, twice as much each time within one element; whether there was anything left."""
        more = self._file.read(max(_CHUNK, len(self._text) - self._at))
        self._text, self._at = self._text[self._at :] + more, 0
        return more != ""

    def _element(self) -> Any:
        self._number += 1
        self._peek()
        while True:
            try:
                value, end = self._decoder.raw_decode(self._text, self._at)
            except RecursionError as error:
                raise self._not_json("nested too deeply") from error
            except ValueError as error:
                problem = str(error)
            else:
                # A number that ends where the text does may go on behind it.
                if end < len(self._text) or not self._fill():
                    written, self._at = self._text[self._at : end], end
                    return self._checked(value, written)
                continue
            if len(self._text) - self._at > ROW_CHARACTERS:
                raise self._not_json(f"longer than {ROW_CHARACTERS // 2**20} Mi characters, or {problem}")
            if not self._fill():
                raise self._not_json(problem)

    def _checked(self, value: Any, written: str) -> Any:
        try:
            return checked_json(value, written)
        except MalformedError as error:
            raise self._not_json(str(error)) from error

    def _not_json(self, problem: str) -> DataError:
        where = f", element {self._number}" if self._number else ""
        return DataError(f"{self._path}{where}: not JSON", got=problem)


def _read_csv(path: Path, begin: int, end: int | None) -> Iterator[Row]:
    with _open(path) as file:
        lines = _Lines(file, path)
        reader = _csv_reader(lines, path)
        try:
            if reader.fieldnames is None:  # asked first: the reader takes the first row it sees for the header
                return
            for _ in islice(_rows_of(reader.reader, lines), begin):
                pass
            left = None if end is None else end - begin
            for row in islice(reader, left):
                lines.end_row()
                yield _csv_row(row, reader, path)
        except csv.Error as error:
            raise DataError(f"{path}, line {reader.reader.line_num}: not CSV", got=error) from error


def _rows_of(rows: Iterator[list[str]], lines: _Lines) -> Iterator[list[str]]:
    """Those that are not blank."""
    for row in rows:
        lines.end_row()
        if row:
            yield row


def _count_csv(path: Path) -> int:
    with _open(path) as file:
        lines = _Lines(file, path)
        reader = _csv_reader(lines, path)
        try:
            return 0 if reader.fieldnames is None else sum(1 for _ in _rows_of(reader.reader, lines))
        except csv.Error as error:
            raise DataError(f"{path}, line {reader.reader.line_num}: not CSV", got=error) from error


def _csv_reader(lines: _Lines, path: Path) -> csv.DictReader[str]:
    csv.field_size_limit(ROW_CHARACTERS)
    bare = path.with_suffix("") if path.suffix == ".gz" else path
    return csv.DictReader(lines, delimiter="\t" if bare.suffix == ".tsv" else ",", strict=True)


def _csv_row(row: dict[str | Any, str | Any], reader: csv.DictReader[str], path: Path) -> Row:
    if None in row or None in row.values():
        expected = len(reader.fieldnames or ())
        raise DataError(f"{path}, line {reader.line_num}: a row must have the header's {expected} columns")
    return dict(row), reader.line_num


def _read_parquet(path: Path, begin: int, end: int | None) -> Iterator[Row]:
    with _parquet(path) as file:
        batches = _batches_from(file, begin, path)
        rows = chain.from_iterable(batch.to_pylist() for batch in batches)
        left = None if end is None else end - begin
        yield from ((row, number) for number, row in enumerate(islice(rows, left), begin + 1))


def _batches_from(file: Any, begin: int, path: Path) -> Iterator[Any]:
    """Batches of the rows from `begin` on; groups of rows before it are not read from the disk."""
    for index in range(file.num_row_groups):
        group = file.metadata.row_group(index)
        if begin >= group.num_rows:
            begin -= group.num_rows
            continue
        # A compressed file of 6 MB may hold rows of 6 GB.
        row_bytes = group.total_byte_size // max(1, group.num_rows)
        if row_bytes > ROW_CHARACTERS:
            what = f"{path}: its rows are longer than {ROW_CHARACTERS // 2**20} MiB"
            raise DataError(what, got=f"{row_bytes:,} bytes on average", do="split them into several rows")
        at_once = max(1, min(_PARQUET_ROWS_AT_ONCE, _PARQUET_BYTES_AT_ONCE // max(1, row_bytes)))
        for batch in file.iter_batches(batch_size=at_once, row_groups=[index]):
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
        lines = _Lines(file, path)
        for line in islice(lines, begin, end):
            lines.end_row()
            yield {"text": line.rstrip("\r\n")}, lines.number


def _count_lines(path: Path) -> int:
    with _open(path) as file:
        lines = _Lines(file, path)
        for _ in lines:
            lines.end_row()
        return lines.number


def _shown(line: str) -> str:
    line = line.strip()
    return repr(line if len(line) <= 80 else line[:77] + "...")
