"""Where rows come from: local files, datasets saved by `datasets`, and the Hugging Face hub."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from seqaware.data.arrow_rows import stored_rows
from seqaware.data.file_records import inside
from seqaware.data.readers import count_rows, read_file
from seqaware.data.resolve_source import Located, SourceSpec, SplitSlice, locate
from seqaware.errors import DataError
from seqaware.files import read_json


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
class RowSource:
    """A source that was found. `records` may be called again."""

    name: str
    located: Located
    max_examples: int | None
    streaming: bool

    def records(self, begin: int = 0, end: int | None = None, *, counts: Sequence[int] = ()) -> Iterator[Record]:
        """The rows in their order, at most max_examples.

        Args:
            begin, end: of these, only the rows [begin, end), counted from 0.
            counts: what `counts` returned, where it is known: files that end before `begin` are then not opened.

        Raises:
            DataError: a broken row, or the hub cannot be read.
        """
        rows = self._chosen().within(begin, end)
        match self.located.kind:
            case "files":
                return self._file_records(rows, counts)
            case "saved":
                return self._saved_records(rows)
            case "hub":
                return self._hub_records(rows)
            case "store":
                raise AssertionError("a prepared store has no records")

    def counts(self) -> list[int]:
        """The rows of each file, as far as `records` reads them, or of the dataset: counted, not read.

        Raises:
            DataError: they cannot be read, or their number cannot be known.
        """
        match self.located.kind:
            case "files":
                return self._file_counts(self._chosen().end)
            case "saved":
                return [len(self._saved())]
            case "hub" if not self.streaming:
                from seqaware.data.hub import count_hub_rows

                return [count_hub_rows(self.located.hub, self.located.rows.split)]
        if self.max_examples is None:
            what = f"how many rows {self.name} has is not known before all are read, because it is streamed"
            raise DataError(what, do="write max_examples, or dataset.streaming: false")
        return [self.max_examples]

    def total(self, counts: Sequence[int]) -> int:
        """How many rows `records` gives, by these counts; of a streamed dataset, at most."""
        rows = self._chosen()
        found = sum(counts)
        return max(0, (found if rows.end is None else min(found, rows.end)) - rows.begin)

    def _chosen(self) -> SplitSlice:
        return self.located.rows.within(0, self.max_examples)

    def _file_records(self, rows: SplitSlice, counts: Sequence[int]) -> Iterator[Record]:
        before, left = rows.begin, None if rows.end is None else max(0, rows.end - rows.begin)
        for index, path in enumerate(self.located.files):
            if left == 0:
                return
            if before > 0:
                found = counts[index] if index < len(counts) else count_rows(path)
                if found <= before:
                    before -= found
                    continue
            for fields, number in read_file(path, begin=before, end=None if left is None else before + left):
                yield Record(fields, path.name, number)
                left = None if left is None else left - 1
            before = 0

    def _file_counts(self, end: int | None) -> list[int]:
        counts: list[int] = []
        for path in self.located.files:
            if end is not None and sum(counts) >= end:
                break
            counts.append(count_rows(path))
        return counts

    def _saved_records(self, rows: SplitSlice) -> Iterator[Record]:
        dataset = self._saved()
        end = len(dataset) if rows.end is None else min(rows.end, len(dataset))
        if rows.begin < end:  # `datasets` selects no empty range
            chosen = stored_rows(dataset.select(range(rows.begin, end)))
            yield from _numbered(chosen, self.located.path.name, rows.begin)

    def _saved(self) -> Any:
        import datasets

        path = self.located.path
        try:
            for file in read_json(inside(path, "state.json"))["_data_files"]:
                inside(path, file["filename"])
            return datasets.load_from_disk(str(path))
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise DataError(f"{path} is not a readable dataset folder", got=error) from error

    def _hub_records(self, rows: SplitSlice) -> Iterator[Record]:
        from seqaware.data.hub import hub_rows

        found = hub_rows(self.located.hub, rows.split, streaming=self.streaming, begin=rows.begin, end=rows.end)
        yield from _numbered(found, f"{self.name}/{rows.split}", rows.begin)


def open_source(source: SourceSpec, *, streaming: bool | None = None) -> RowSource:
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
    return RowSource(source.name, located, source.max_examples, streaming)


def _numbered(rows: Iterable[dict[str, Any]], prefix: str, first: int) -> Iterator[Record]:
    for number, fields in enumerate(rows, first):
        yield Record(fields, prefix, number)
