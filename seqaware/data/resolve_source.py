"""What a dataset's name means: a prepared store, a saved dataset, local files, or a dataset of the hub.

Nothing is read here but folder listings, and neither torch nor `datasets` is imported: a dry run asks it too.
"""

from __future__ import annotations

import difflib
import fnmatch
import itertools
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

from seqaware.data.store.store_format import MANIFEST
from seqaware.errors import DataError
from seqaware.files import local_path

_MOST_ENTRIES = 200_000
_CORRECT = "correct dataset.name"
_GLOB = re.compile(r"[*?\[]")
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_SPLIT_SLICE = re.compile(r"(?P<split>[^\[\]]+)(\[(?P<begin>[0-9]{0,15}):(?P<end>[0-9]{0,15})\])?")
KINDS = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "json",
    ".csv": "csv",
    ".tsv": "csv",
    ".parquet": "parquet",
    ".txt": "text",
    ".text": "text",
}


@dataclass(frozen=True)
class HubId:
    """A dataset of the hub: owner/name, and the configuration and revision that are taken if none is written."""

    repository: str
    subset: str | None = None
    revision: str | None = None


SHORT_NAMES = {
    "gsm8k": HubId("openai/gsm8k", "main"),
    "squad": HubId("rajpurkar/squad"),
    "openbookqa": HubId("allenai/openbookqa", "main"),
    "c4": HubId("allenai/c4", "en"),
    "wikipedia": HubId("wikimedia/wikipedia", "20231101.en"),
    # The repository still has a loading script, which `datasets` no longer runs: the hub's own conversion is read.
    "bookcorpus": HubId("bookcorpus/bookcorpus", "plain_text", "refs/convert/parquet"),
    "openwebtext": HubId("Skylion007/openwebtext"),
}


class SourceSpec(Protocol):
    """What is written about a source: `DatasetConfig` and `MixturePart` have it."""

    @property
    def name(self) -> str | None: ...
    @property
    def split(self) -> str: ...
    @property
    def subset(self) -> str | None: ...
    @property
    def revision(self) -> str | None: ...
    @property
    def max_examples(self) -> int | None: ...
    @property
    def columns(self) -> dict[str, str]: ...


@dataclass(frozen=True)
class SplitSlice:
    """A split and the rows of it: [begin, end), end None for all the rest."""

    split: str
    begin: int = 0
    end: int | None = None

    def within(self, begin: int, end: int | None) -> SplitSlice:
        """The rows [begin, end) of these rows, counted from 0 there."""
        last = self.end
        if end is not None:
            last = self.begin + end if last is None else min(last, self.begin + end)
        return SplitSlice(self.split, self.begin + begin, last)


@dataclass(frozen=True)
class Located:
    """Where a source is. `path` for store and saved, `files` for files, `hub` for hub."""

    kind: Literal["store", "saved", "files", "hub"]
    path: Path = Path()
    files: tuple[Path, ...] = ()
    hub: HubId = HubId("")
    rows: SplitSlice = SplitSlice("train")

    def local_files(self) -> tuple[Path, ...]:
        """The files whose change makes it another source."""
        match self.kind:
            case "files":
                return self.files
            case "saved":
                return tuple(sorted(_files_below(self.path)))
            case "store":
                return (self.path / MANIFEST,)
            case "hub":
                return ()


def locate(source: SourceSpec) -> Located:
    """Find out what `source.name` is; what exists on the disk goes before short names and hub ids.

    Raises:
        DataError: nothing of that name, a split that is not there, a file of unknown kind.
    """
    name = source.name
    assert name is not None, "a mixture has no name of its own"
    path = local_path(name)
    if path.is_dir():
        return _locate_folder(path, source)
    if path.is_file():
        rows = _parse_split(source)
        if rows.split != "train" and not _is_of_split(path, path.parent, rows.split):
            raise DataError(f"{name} is one file and has no split {rows.split!r}", do="leave dataset.split out")
        return Located("files", files=(_checked(path),), rows=rows)
    if _GLOB.search(name):
        return _locate_glob(path, source)
    if path.is_absolute() or name.startswith((".", "~")) or _kind(path) is not None or name.count("/") > 1:
        raise DataError(f"dataset file not found: {name}", do=_CORRECT)
    return _locate_hub(name, source)


def file_kind(path: Path) -> str:
    """jsonl, json, csv, parquet or text, by the suffix (before `.gz`)."""
    kind = _kind(path)
    assert kind is not None, "located files have a known suffix"
    return kind


def _locate_hub(name: str, source: SourceSpec) -> Located:
    if name in SHORT_NAMES:
        known = SHORT_NAMES[name]
        return Located(
            "hub", hub=HubId(known.repository, source.subset or known.subset, source.revision or known.revision)
        )
    if _HUB_ID.fullmatch(name):
        return Located("hub", hub=HubId(name, source.subset, source.revision))
    near = difflib.get_close_matches(name, SHORT_NAMES, n=1)
    hint = f"did you mean {near[0]}? " if near else ""
    raise DataError(
        f"unknown dataset {name!r}: no such file or folder, and not a short name",
        do=f"{hint}short names: {', '.join(SHORT_NAMES)}; a dataset of the hub is written owner/name",
    )


def _locate_folder(path: Path, source: SourceSpec) -> Located:
    if (path / MANIFEST).is_file():
        return Located("store", path=path)
    rows = _parse_split(source)
    if (path / "dataset_dict.json").is_file():
        splits = sorted(folder.name for folder in path.iterdir() if (folder / "state.json").is_file())
        if rows.split not in splits:
            raise DataError(f"{path} has no split {rows.split!r}", do=f"splits: {', '.join(splits)}")
        return Located("saved", path=path / rows.split, rows=rows)
    if (path / "state.json").is_file() and (path / "dataset_info.json").is_file():
        return Located("saved", path=path, rows=rows)
    files = sorted(file for file in _files_below(path) if _kind(file) is not None)
    if not files:
        raise DataError(f"the folder {path} holds no data files", do=f"known kinds: {', '.join(KINDS)}, each also .gz")
    return Located("files", files=_files_of_split(files, path, rows.split), rows=rows)


def _locate_glob(path: Path, source: SourceSpec) -> Located:
    files = _files_matching(path)
    if not files:
        raise DataError(f"no file matches {path}", do=_CORRECT)
    return Located("files", files=tuple(_checked(file) for file in files), rows=_parse_split(source))


def _files_below(folder: Path) -> Iterator[Path]:
    """Every file in the folder and in those below it.

    Raises:
        DataError: too many entries, as below `/`, or some that cannot be listed, as in /proc.
    """
    # A fraction of the time of Path.rglob, which skips folders without permission as well.
    count = 0
    try:
        for parent, folders, names in os.walk(folder, onerror=_unless_not_permitted):
            count += len(folders) + len(names)
            _check_entries(count, folder)
            yield from (path for name in names if (path := Path(parent, name)).is_file())
    except OSError as error:
        raise DataError(f"{error.filename} cannot be listed", got=error.strerror) from error


def _unless_not_permitted(error: OSError) -> None:
    if not isinstance(error, PermissionError):
        raise error


def _check_entries(count: int, origin: Path) -> None:
    if count > _MOST_ENTRIES:
        raise DataError(
            f"{origin} holds more than {_MOST_ENTRIES:,} files and folders", do="name a folder that holds data"
        )


def _files_matching(pattern: Path) -> list[Path]:
    """The files that a pattern names. `Path.glob` visits any number of files that do not match."""
    parts = pattern.relative_to(pattern.anchor).parts
    if any("**" in part and part != "**" for part in parts):
        raise DataError(f"{pattern} is not a pattern of file names", got="** beside other text", do=_CORRECT)
    visited = itertools.count(1)

    def below(folder: Path, parts: Sequence[str]) -> Iterator[Path]:
        part, rest = parts[0], parts[1:]
        if part == "**" and rest:
            yield from below(folder, rest)
        for name, is_folder in _entries(folder) if _GLOB.search(part) else [(part, False)]:
            _check_entries(next(visited), pattern)
            path = folder / name
            if part == "**":
                if is_folder:
                    yield from below(path, parts)
            elif not fnmatch.fnmatchcase(name, part):
                continue
            elif not rest and path.is_file():
                yield path
            elif rest and path.is_dir():
                yield from below(path, rest)

    try:
        return sorted(set(below(Path(pattern.anchor), parts)))
    except OSError as error:
        raise DataError(f"{error.filename} cannot be listed", got=error.strerror) from error
    except re.error as error:
        raise DataError(f"{pattern} is not a pattern of file names", got=error, do=_CORRECT) from error


def _entries(folder: Path) -> list[tuple[str, bool]]:
    """(name, whether it is a folder and no link); as many as are refused at most."""
    try:
        with os.scandir(folder) as entries:
            first = itertools.islice(entries, _MOST_ENTRIES + 1)
            return [(entry.name, entry.is_dir(follow_symlinks=False)) for entry in first]
    except PermissionError:
        return []


def _files_of_split(files: list[Path], root: Path, split: str) -> tuple[Path, ...]:
    """The files named after the split, or all of them where no file is named after any."""
    chosen = [file for file in files if _is_of_split(file, root, split)]
    if chosen:
        return tuple(chosen)
    names = sorted({_stem(file) for file in files})
    has_splits = any(_is_of_split(file, root, usual) for file in files for usual in ("test", "validation", "dev"))
    if split == "train" and not has_splits:
        return tuple(files)
    raise DataError(f"the folder {root} has no files of the split {split!r}", do=f"it has: {', '.join(names[:20])}")


def _is_of_split(file: Path, root: Path, split: str) -> bool:
    """train.jsonl, train-00000-of-00002.parquet, train_1.csv, train/rows.jsonl"""
    named = re.match(rf"{re.escape(split)}(?![A-Za-z])", file.name) is not None
    return named or split in file.relative_to(root).parts[:-1]


def _parse_split(source: SourceSpec) -> SplitSlice:
    match = _SPLIT_SLICE.fullmatch(source.split)
    if match is None:
        raise DataError(
            "rows of local data are chosen by number", got=f"split {source.split!r}", do="write for example train[:100]"
        )
    return SplitSlice(match["split"], int(match["begin"] or 0), int(match["end"]) if match["end"] else None)


def _checked(file: Path) -> Path:
    if _kind(file) is None:
        raise DataError(f"{file} is of no known kind", do=f"known: {', '.join(KINDS)}, each also .gz")
    return file


def _kind(path: Path) -> str | None:
    bare = path.with_suffix("") if path.suffix == ".gz" else path
    return KINDS.get(bare.suffix.lower())


def _stem(path: Path) -> str:
    return path.name.split(".")[0]
