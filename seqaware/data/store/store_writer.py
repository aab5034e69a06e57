"""Writing a token store: a stream of documents into flat files, all or nothing.

Everything is written into a folder beside the goal and renamed at the end: a store is complete or it is not there.
The bytes depend on the sequence of documents alone, not on the blocks they come in.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import socket
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Self

import numpy as np
from numpy.typing import NDArray

from seqaware.data.store.store_format import (
    COUNTED_FIELDS,
    FORMAT,
    FORMAT_VERSION,
    MANIFEST,
    Document,
    Part,
    StoreFacts,
    Tally,
    manifest_checksum,
)
from seqaware.errors import DataError

DROPPED = "dropped.jsonl"
_UINT16_VOCABULARY = 1 << 16
_UNFINISHED = ".unfinished-"
_ALWAYS_FILES = (
    "tokens.bin",
    "supervised.bin",
    "turn_start.bin",
    "offsets.bin",
    "lengths.bin",
    "totals.bin",
    "rows.bin",
)
# What decides the mathematics. The rows (line numbers) and the names do not.
_CONTENT_FILES = ("tokens.bin", "supervised.bin", "turn_start.bin", "weights.bin", "offsets.bin", "counted.bin")


@dataclass(frozen=True)
class Block:
    """D documents on their way into a store: flat arrays of T tokens, as a tokenising process hands them over.

    Attributes:
        tokens: uint32 [T]. supervised, turn_start: bool [T]. weights: float32 [T], or None where all are 1.
        lengths: int64 [D]. rows: int64 [D], record numbers, or -1 where the prefix is the name.
        counted: int32 [D, 7] (`Counted`, zeros for a whole document) or None where no document was split.
        prefix: the first part of the documents' names.
    """

    tokens: NDArray[np.uint32]
    supervised: NDArray[np.bool_]
    turn_start: NDArray[np.bool_]
    weights: NDArray[np.float32] | None
    lengths: NDArray[np.int64]
    rows: NDArray[np.int64]
    counted: NDArray[np.int32] | None
    prefix: str


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """A full disk, a missing permission and their like, as errors for people."""
    try:
        yield
    except OSError as error:
        match error.errno:
            case errno.ENOSPC | errno.EDQUOT:
                what, do = f"no disk space left while writing {path}", "free some, or set dataset.store_dir elsewhere"
            case errno.EACCES | errno.EPERM | errno.EROFS | errno.ENOTDIR | errno.EEXIST | errno.ENOENT:
                what, do = f"{path} cannot be written", "correct the permission, or set dataset.store_dir elsewhere"
            case _:
                raise
        raise DataError(what, got=error.strerror, do=do) from error


def unfinished(path: Path) -> Path:
    """Where this process writes what shall become `path`. Processes of several hosts may write beside one another."""
    return path.with_name(f"{path.name}{_UNFINISHED}{socket.gethostname()}-{os.getpid()}")


def remove_unfinished(path: Path) -> None:
    """Delete what killed writers of the store `path` left behind. Only under the lock that writers of it hold."""
    for left in path.parent.glob(f"{path.name}{_UNFINISHED}*"):
        shutil.rmtree(left, ignore_errors=True)


class _HashedStoreFile:
    """A file written once, front to back, with its SHA-256 on the way."""

    def __init__(self, path: Path) -> None:
        self._file: BinaryIO = path.open("wb")
        self._digest = hashlib.sha256()
        self._bytes = 0

    def write(self, array: NDArray[Any]) -> None:
        data = np.ascontiguousarray(array).view(np.uint8).data
        self._file.write(data)
        self._digest.update(data)
        self._bytes += data.nbytes

    def close(self) -> dict[str, Any]:
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        return {"bytes": self._bytes, "sha256": self._digest.hexdigest()}

    def abandon(self) -> None:
        # What is still buffered is to be thrown away: a full disk that refuses it is no news.
        with suppress(OSError):
            self._file.close()


class StoreWriter:
    """Append documents, then `finish()`. Leaving the `with` block without it removes everything.

    Args:
        path: where the store shall lie; `finish` may put it beside, under a name that holds the fingerprint.
        vocab_size: ids are below it; it decides between 2 and 4 bytes a token.
        identity: what made the tokens (tokenizer, templates, code version); it enters the fingerprint with the content.

    Raises:
        DataError: no space, no permission.
    """

    def __init__(
        self,
        path: Path | str,
        *,
        vocab_size: int,
        eos_id: int,
        max_seq_length: int | None = None,
        identity: Mapping[str, Any] | None = None,
    ) -> None:
        self.path = Path(path)
        self.tally = Tally()
        self._vocab_size = vocab_size
        self._eos_id = eos_id
        self._max_seq_length = max_seq_length
        self._identity = dict(identity or {})
        self._dtype = np.dtype(np.uint16 if vocab_size <= _UINT16_VOCABULARY else np.uint32)
        self._parts: list[Part] = []
        self._names: list[tuple[int, str]] = []
        self._documents = self._tokens = self._supervised = self._longest = 0
        self._files: dict[str, _HashedStoreFile] = {}
        self._folder = unfinished(self.path)
        self._finished = False
        with disk_errors(self._folder):
            self._folder.mkdir(parents=True)
            for name in _ALWAYS_FILES:
                self._files[name] = _HashedStoreFile(self._folder / name)
            self._files["offsets.bin"].write(np.zeros(1, dtype=np.int64))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._finished:
            return
        for file in self._files.values():
            file.abandon()
        shutil.rmtree(self._folder, ignore_errors=True)

    @property
    def documents(self) -> int:
        return self._documents

    @property
    def supervised_tokens(self) -> int:
        return self._supervised

    def append(self, document: Document) -> None:
        """One document."""
        prefix, _, row = document.name.partition("#")[0].rpartition(":")
        numbered = bool(prefix) and row.isascii() and row.isdigit()
        whole = document.counted.total_sequence in (0, len(document.tokens) - 1)
        self.append_block(
            Block(
                tokens=document.tokens.astype(np.uint32),
                supervised=document.supervised,
                turn_start=document.turn_start,
                weights=document.weights,
                lengths=np.array([len(document.tokens)], dtype=np.int64),
                rows=np.array([int(row) if numbered else -1], dtype=np.int64),
                counted=None if whole else np.array([document.counted], dtype=np.int32),
                prefix=prefix if numbered else document.name,
            )
        )

    def append_block(self, block: Block) -> None:
        """Several documents with names of one prefix.

        Raises:
            DataError: the tokenizer gives ids that it does not have.
        """
        count = len(block.lengths)
        if count == 0:
            return
        assert int(block.lengths.min()) > 0, "an empty document"
        assert int(block.lengths.sum()) == len(block.tokens) == len(block.supervised), "a block whose arrays disagree"
        largest = int(block.tokens.max())
        if largest >= self._vocab_size:
            what = f"the tokenizer gives ids outside its vocabulary of {self._vocab_size} tokens"
            raise DataError(
                what, got=largest, do="correct the ids of its tokens in tokenizer.json, or name another one"
            )
        ends = np.cumsum(block.lengths)
        running = np.concatenate([[0], np.cumsum(block.supervised)])
        totals = running[ends] - running[ends - block.lengths + 1]
        with disk_errors(self._folder):
            self._write_optional("weights.bin", block.weights, np.ones(len(block.tokens), dtype=np.float32))
            self._write_optional("counted.bin", block.counted, np.zeros((count, COUNTED_FIELDS), dtype=np.int32))
            self._files["tokens.bin"].write(block.tokens.astype(self._dtype))
            self._files["supervised.bin"].write(block.supervised.astype(np.bool_))
            self._files["turn_start.bin"].write(block.turn_start.astype(np.bool_))
            self._files["offsets.bin"].write(ends.astype(np.int64) + self._tokens)
            self._files["lengths.bin"].write(block.lengths.astype(np.int32))
            self._files["totals.bin"].write(totals.astype(np.int32))
            self._files["rows.bin"].write(block.rows.astype(np.int64))
        if not self._names or self._names[-1][1] != block.prefix:
            self._names.append((self._documents, block.prefix))
        self._supervised += int(totals.sum())
        self._documents += count
        self._tokens += len(block.tokens)
        self._longest = max(self._longest, int(block.lengths.max()))

    def end_part(self, name: str, proportion: float | None = None) -> None:
        """The documents since the last part's end are one source of the mixture."""
        before = sum(part.documents for part in self._parts)
        self._parts.append(Part(name, self._documents - before, proportion))

    def finish(self, name_of: Callable[[str], str] | None = None) -> Path:
        """Complete the store and put it in its place.

        Args:
            name_of: fingerprint -> the folder's name; None keeps the name of `path`.

        Returns:
            where the store lies. If another writer put an equal one there first, that one stays.

        Raises:
            DataError: no documents, no space, or something else already lies there.
        """
        if self._documents == 0:
            raise DataError(f"the store {self.path} would hold no documents", do="see what was dropped, and why")
        if sum(part.documents for part in self._parts) < self._documents:
            self.end_part(self._names[0][1])
        with disk_errors(self._folder):
            # By name: which of the optional ones came first depends on the blocks.
            files = {name: file.close() for name, file in sorted(self._files.items())}
            fingerprint = self._fingerprint(files)
            if self.tally.named:
                lines = "".join(json.dumps(entry, ensure_ascii=False) + "\n" for entry in self.tally.named)
                write_durably(self._folder / DROPPED, lines)
            self._write_manifest(files, fingerprint)
            goal = self.path if name_of is None else self.path.with_name(name_of(fingerprint))
            return self._put(goal)

    def _put(self, goal: Path) -> Path:
        self._finished = True
        try:
            self._folder.rename(goal)
        except OSError as error:
            shutil.rmtree(self._folder, ignore_errors=True)
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
                raise
            if not (goal / MANIFEST).is_file():
                raise DataError(f"{goal} is in the way of a token store", do="move it away") from error
        sync_to_disk(goal.parent)
        return goal

    def _fingerprint(self, files: Mapping[str, Mapping[str, Any]]) -> str:
        content = {name: files[name]["sha256"] for name in _CONTENT_FILES if name in files}
        parts = [(part.documents, part.proportion) for part in self._parts]
        text = json.dumps([FORMAT_VERSION, self._identity, content, parts], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:32]

    def _write_manifest(self, files: dict[str, dict[str, Any]], fingerprint: str) -> None:
        facts = StoreFacts(
            documents=self._documents,
            tokens=self._tokens,
            supervised_tokens=self._supervised,
            longest=self._longest,
            dropped=dict(self.tally.dropped),
            truncated=self.tally.truncated,
            fingerprint=fingerprint,
            parts=tuple(self._parts),
            records=self.tally.records,
            split=self.tally.split,
            max_seq_length=self._max_seq_length,
            vocab_size=self._vocab_size,
            eos_id=self._eos_id,
        )
        manifest: dict[str, Any] = {
            "format": FORMAT,
            "version": FORMAT_VERSION,
            "fingerprint": fingerprint,
            "identity": self._identity,
            "token_dtype": self._dtype.name,
            "facts": asdict(facts) | {"parts": [list(part) for part in self._parts]},
            "names": self._names,
            "dropped_first": self.tally.named[:5],
            "files": files,
        }
        manifest = json.loads(json.dumps(manifest))  # what a reader will see: its checksum is taken of that
        manifest["checksum"] = manifest_checksum(manifest)
        write_durably(self._folder / MANIFEST, json.dumps(manifest, indent=1))
        sync_to_disk(self._folder)

    def _write_optional(self, name: str, values: NDArray[Any] | None, neutral: NDArray[Any]) -> None:
        """A file that only stores with such values have: on the first of them it is filled up with neutral ones."""
        if name not in self._files:
            if values is None:
                return
            self._files[name] = _HashedStoreFile(self._folder / name)
            before = self._tokens if neutral.ndim == 1 else self._documents
            for start in range(0, before, 1 << 20):
                rows = min(1 << 20, before - start)
                self._files[name].write(np.full((rows, *neutral.shape[1:]), neutral.flat[0], dtype=neutral.dtype))
        self._files[name].write(neutral if values is None else values.astype(neutral.dtype))


def write_durably(path: Path, text: str) -> None:
    """Write a file whole or not at all, and wait until it is on the disk."""
    partial = unfinished(path)
    with partial.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


def sync_to_disk(path: Path) -> None:
    """Wait until a file, or a folder's list of names, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
