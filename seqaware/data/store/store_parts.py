"""A token store made in parts, by as many processes on as many machines, and put together again.

Part i of N holds the i-th of N runs of rows of every source. The parts' stores lie beside the goal:

    <store_dir>/<request key>.parts/
        rows.json       how many rows the sources have: counted once, by the part that comes first
        3-of-8/         a part, complete as soon as it bears this name
            part.json   what became of the rows of each source, and how they were made into tokens
            0/, 1/ …    a token store of the rows of each source; absent where none of them was kept

What the parts make together is, byte for byte, what one process makes of all rows: a store's bytes depend on its
sequence of documents alone, and the parts are read in that sequence.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from pydantic import BaseModel, TypeAdapter, ValidationError

from seqaware.data.file_records import Count, Text, first_problem
from seqaware.data.sources import RowSource, open_source
from seqaware.data.store.store_format import Tally, manifest_checksum
from seqaware.data.store.store_index import sources_of
from seqaware.data.store.store_writer import disk_errors, remove_unfinished, sync_to_disk, unfinished, write_durably
from seqaware.data.store.token_store import StoreWriter, TokenStore
from seqaware.data.tokenization import Job, Progress, empty_source
from seqaware.errors import DataError
from seqaware.files import MalformedError, read_json
from seqaware.locks import acquire

_FORMAT = "seqaware part of a token store"
_PART = "part.json"
_ROWS = "rows.json"
_TROUBLES_SHOWN = 20


@dataclass(frozen=True)
class PartNumber:
    """Part `index` of `count`, from 1."""

    index: int
    count: int

    @classmethod
    def parse(cls, text: str) -> PartNumber:
        """From `3/8`.

        Raises:
            DataError: it is not of this form, or there is no such part.
        """
        first, slash, last = text.partition("/")
        numbers = [int(each) for each in (first, last) if re.fullmatch("[0-9]{1,9}", each)]
        if not slash or len(numbers) != 2 or not 1 <= numbers[0] <= numbers[1]:
            raise DataError("a part is written I/N, with I from 1 to N", got=text, do="write for example 3/8")
        return cls(*numbers)

    def __str__(self) -> str:
        return f"{self.index}/{self.count}"

    def rows_of(self, total: int) -> tuple[int, int]:
        """Which of so many rows are this part's: [begin, end). Those of all parts are all rows, once."""
        return total * (self.index - 1) // self.count, total * self.index // self.count

    def folder(self, job: Job) -> Path:
        """Where the part lies when it is complete."""
        return parts_folder(job) / f"{self.index}-of-{self.count}"


class _RunContent(BaseModel):
    """What part.json says of the rows of one source."""

    total: Count
    documents: Count
    tally: Tally


class _PartContent(BaseModel):
    """What part.json holds."""

    part: Text
    identity: dict[str, Any]
    runs: list[_RunContent]
    checksum: Text


_COUNTS = TypeAdapter(list[list[Count]])


@dataclass(frozen=True)
class Run:
    """The rows of one source that a part holds.

    Attributes:
        total: rows of the source, of all parts, when they were counted.
        store: of their documents; None where none was kept.
    """

    total: int
    tally: Tally
    store: TokenStore | None


def parts_folder(job: Job) -> Path:
    """Where the parts of a store lie."""
    return job.path.with_name(f"{job.path.name}.parts")


def prepare_part(job: Job, part: PartNumber, *, progress: Progress | None = None) -> Path:
    """Tokenise one part, unless it is there already and as it was written; returns its folder.

    Raises:
        DataError: a source or a record that cannot be used; no space.
    """
    folder = part.folder(job)
    with disk_errors(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
    with _alone(folder):
        if _trouble(job, part) is None:
            return folder
        remove_unfinished(folder)
        shutil.rmtree(folder, ignore_errors=True)
        with _renamed_when_complete(folder) as partial:
            runs = list(_write_runs(job, part, partial, progress))
            content = {"format": _FORMAT, "part": str(part), "identity": job.identity, "runs": runs}
            content = json.loads(json.dumps(content))  # what a reader will see: its checksum is taken of that
            content["checksum"] = manifest_checksum(content)
            write_durably(partial / _PART, json.dumps(content, indent=1))
    return folder


def merge_parts(job: Job, count: int, *, command: str, progress: Progress | None = None) -> Path:
    """Put the N parts together and remove them; returns the store, which a run then finds.

    Args:
        command: what a person types before ` --part I/N`, for the message when a part is missing.

    Raises:
        DataError: parts are missing, torn, or of different data; nothing to train on; no space.
    """
    with job.locked():
        path = job.found()
        if path is None:
            parts = [PartNumber(index, count) for index in range(1, count + 1)]
            _check_complete(job, parts, command)
            remove_unfinished(job.path)
            with job.writer() as writer:
                _join(job, writer, [_read_part(job, part) for part in parts], progress)
                path = job.finish(writer)
        shutil.rmtree(parts_folder(job), ignore_errors=True)
    return path


def _write_runs(job: Job, part: PartNumber, folder: Path, progress: Progress | None) -> Iterator[dict[str, Any]]:
    """Tokenise the part's rows of every source; yields what part.json says of each."""
    sources = [open_source(each, streaming=job.dataset.streaming) for each in sources_of(job.dataset)]
    counts = _counted(job, sources)
    for number, (each, source) in enumerate(zip(sources_of(job.dataset), sources, strict=True)):
        total = source.total(counts[number])
        if total == 0:
            raise empty_source(source.name)
        begin, end = part.rows_of(total)
        records = source.records(begin, end, counts=counts[number])
        with job.writer(folder / str(number)) as writer:
            job.write(writer, columns=each.columns, records=records, progress=progress)
            _check_read(source, wanted=end - begin, read=writer.tally.records)
            if writer.documents > 0:
                writer.finish()
        yield {"total": total, "documents": writer.documents, "tally": asdict(writer.tally)}


def _check_read(source: RowSource, *, wanted: int, read: int) -> None:
    """A streamed dataset may be shorter than max_examples; the others were counted."""
    if read < wanted and not (source.streaming and source.located.kind == "hub"):
        raise DataError(
            f"{source.name} changed while it was read",
            got=f"{read} rows where {wanted} were counted",
            do="run this part again",
        )


def _counted(job: Job, sources: Sequence[RowSource]) -> list[list[int]]:
    """The rows of every file of every source. On a shared file system one process counts and the others wait for it."""
    note = parts_folder(job) / _ROWS
    with _alone(note):
        if note.is_file():
            return _read_counts(note, len(sources))
        counts = [source.counts() for source in sources]
        with disk_errors(note):
            write_durably(note, json.dumps(counts))
        return counts


def _read_counts(note: Path, sources: int) -> list[list[int]]:
    do = "delete it, and run this part again"
    try:
        counts = _COUNTS.validate_python(read_json(note))
    except (OSError, MalformedError, ValidationError) as error:
        problem = first_problem(error) if isinstance(error, ValidationError) else error
        raise DataError(f"{note} cannot be read", got=problem, do=do) from error
    if len(counts) != sources:
        raise DataError(f"{note} is of other sources", got=f"{len(counts)} instead of {sources}", do=do)
    return counts


def _check_complete(job: Job, parts: Sequence[PartNumber], command: str) -> None:
    found = ((part, trouble) for part in parts if (trouble := _trouble(job, part)) is not None)
    troubles = dict(islice(found, _TROUBLES_SHOWN))
    if not troubles:
        return
    first, *others = troubles
    more = ", and perhaps others" if next(found, None) else ""
    also = f", and the same for {', '.join(map(str, others))}{more}" if others else ""
    raise DataError(
        f"the {len(parts)} parts cannot be put together",
        got="; ".join(f"part {part} {trouble}" for part, trouble in troubles.items()),
        do=f"run: {command} --part {first}{also}",
    )


def _trouble(job: Job, part: PartNumber) -> str | None:
    """What is wrong with a part, as the end of a sentence about it; None if it is whole."""
    if not part.folder(job).is_dir():
        return "is missing"
    try:
        for run in _read_part(job, part):
            if run.store is not None:
                run.store.verify()
    except DataError as error:
        return f"is torn ({error.what})"
    except _OtherTokensError:
        return "was made by another tokenizer, format or version"
    return None


class _OtherTokensError(Exception):
    """The part does not fit what is asked for now."""


def _read_part(job: Job, part: PartNumber) -> list[Run]:
    """What a part holds of each source.

    Raises:
        DataError: it is torn. _OtherTokensError: it holds other tokens.
    """
    folder = part.folder(job)
    try:
        content = read_json(folder / _PART)
        written = _PartContent.model_validate(content)
    except (OSError, MalformedError) as error:
        raise DataError(f"{_PART} cannot be read", got=error) from error
    except ValidationError as error:
        raise DataError(f"{_PART} is invalid", got=first_problem(error)) from error
    if written.checksum != manifest_checksum(content):
        raise DataError(f"{_PART} was altered")
    if written.part != str(part):
        raise DataError(f"it is part {written.part}")
    if written.identity != job.identity:
        raise _OtherTokensError
    stores = [TokenStore.open(folder / str(n)) if run.documents else None for n, run in enumerate(written.runs)]
    return [Run(run.total, run.tally, store) for run, store in zip(written.runs, stores, strict=True)]


def _join(job: Job, writer: StoreWriter, parts: Sequence[Sequence[Run]], progress: Progress | None) -> None:
    """Write the documents of all parts, source by source, as one process would have written them."""
    for each, runs in zip(sources_of(job.dataset), zip(*parts, strict=True), strict=True):
        assert each.name is not None, "a mixture has no name of its own"
        _check_rows(each.name, runs)
        for run in runs:
            for block in run.store.blocks() if run.store else ():
                writer.append_block(block)
            writer.tally.add(run.tally)
            if progress is not None:
                progress(writer.tally.records)
        if not any(run.tally.records for run in runs):
            raise empty_source(each.name)
        writer.end_part(each.name, getattr(each, "proportion", None))


def _check_rows(name: str, runs: Sequence[Run]) -> None:
    """Hosts that saw different data would leave rows out, or have them twice."""
    totals = {run.total for run in runs}
    if len(totals) > 1:
        raise DataError(
            f"the parts were made of different data: the number of rows of {name} changed between them",
            got=f"{min(totals)} and {max(totals)} rows",
            do="see that every host reads the same data, delete the parts, and make them again",
        )


@contextmanager
def _alone(path: Path) -> Iterator[None]:
    """Inside, no other process on this file system makes `path`."""
    with disk_errors(path.parent):
        lock = acquire(path.with_name(f"{path.name}.lock"))
    try:
        yield
    finally:
        lock.release()


@contextmanager
def _renamed_when_complete(folder: Path) -> Iterator[Path]:
    """A folder to write into, which becomes `folder` at the end; nothing is left of it after an error."""
    partial = unfinished(folder)
    try:
        with disk_errors(partial):
            partial.mkdir()
        yield partial
        with disk_errors(partial):
            sync_to_disk(partial)
            partial.rename(folder)
            sync_to_disk(folder.parent)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
