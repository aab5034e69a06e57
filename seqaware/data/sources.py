"""Where rows come from: local files, datasets saved by `datasets`, and the Hugging Face hub."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any, NamedTuple

from seqaware.data.locate import Located, SourceSpec, SplitSlice, locate
from seqaware.data.read_files import read_file
from seqaware.errors import DataError

_ROWS_AT_ONCE = 512


class Record(NamedTuple):
    """One row: its fields, and where a person finds it.

    prefix is the source's name (`gsm8k/train`, `rows.jsonl`), number the row in it: from 0 for datasets, as they are
    indexed; the line from 1 for files.
    """

    fields: dict[str, Any]
    prefix: str
    number: int

    @property
    def name(self) -> str:
        return f"{self.prefix}:{self.number}"


@dataclass(frozen=True)
class Source:
    """A source that was found. `records` may be called again; it starts from the front."""

    name: str
    located: Located
    max_examples: int | None
    streaming: bool

    def records(self) -> Iterator[Record]:
        """The rows in their order, at most max_examples.

        Raises:
            DataError: a broken row, or the hub cannot be read.
        """
        match self.located.kind:
            case "files":
                rows = _rows_of(self._file_records(), self.located.rows)
            case "saved":
                rows = _rows_of(self._saved_records(), self.located.rows)
            case "hub":
                rows = self._hub_records()
            case "store":
                raise AssertionError("a prepared store has no records")
        return islice(rows, self.max_examples)

    def _file_records(self) -> Iterator[Record]:
        for path in self.located.files:
            for fields, number in read_file(path):
                yield Record(fields, path.name, number)

    def _saved_records(self) -> Iterator[Record]:
        import datasets

        try:
            dataset = datasets.load_from_disk(str(self.located.path))
        except (OSError, ValueError) as error:
            raise DataError(f"{self.located.path} is not a readable dataset folder", got=error) from error
        return _numbered(dataset, self.located.path.name)

    def _hub_records(self) -> Iterator[Record]:
        from seqaware.data.hub import hub_rows

        rows = self.located.rows
        prefix = f"{self.name}/{rows.split}"
        yield from _numbered(hub_rows(self.located.hub, rows.split, streaming=self.streaming), prefix)


def open_source(source: SourceSpec, *, streaming: bool | None = None) -> Source:
    """Find a source by what is written about it.

    Args:
        streaming: read a hub dataset without downloading the whole; None: when max_examples is written.

    Raises:
        DataError: there is no such source.
    """
    located = locate(source)
    if streaming is None:
        # The hub slices only what was downloaded (`train[:10%]`), so a slice decides against streaming.
        streaming = source.max_examples is not None and "[" not in source.split
    if located.kind == "hub":
        located = Located("hub", hub=located.hub, rows=SplitSlice(source.split))
    assert source.name is not None, "a mixture has no name of its own"
    return Source(source.name, located, source.max_examples, streaming)


def _numbered(dataset: Iterable[dict[str, Any]], prefix: str) -> Iterator[Record]:
    for number, fields in enumerate(dataset):
        yield Record(fields, prefix, number)


def _rows_of(records: Iterator[Record], rows: SplitSlice) -> Iterator[Record]:
    return islice(records, rows.begin, rows.end)
