"""The token store: tokenised documents in flat files, memory-mapped, read at random.

A store is a folder:

    store.json       the manifest: counts, facts, and size and SHA-256 of every file below; written last
    tokens.bin       uint16 or uint32 [T]   token ids, documents one behind the other
    supervised.bin   bool    [T]            carries loss when it is predicted
    turn_start.bin   bool    [T]            is the first token of an assistant's turn
    weights.bin      float32 [T]            only when a weight differs from 1
    offsets.bin      int64   [D+1]          where a document begins
    lengths.bin      int32   [D]
    totals.bin       int32   [D]            supervised tokens of the document that are predicted in it
    counted.bin      int32   [D, 7]         only when a document was split: `Counted`, zeros for a whole document
    rows.bin         int64   [D]            the record a document was made of, for its name; -1: the prefix is the name

T tokens, D documents. `store_writer.py` writes what this module reads.
"""

from __future__ import annotations

import hashlib
import json
import mmap
import os
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from seqaware.data.file_records import inside
from seqaware.data.store.store_format import (
    COUNTED_FIELDS,
    Counted,
    Document,
    Part,
    StoredDocuments,
    StoreFacts,
    StoreManifest,
    read_manifest,
)
from seqaware.data.store.store_writer import Block, StoreWriter
from seqaware.errors import DataError
from seqaware.files import MalformedError, read_text
from seqaware.locks import held

__all__ = ["Counted", "Document", "Part", "StoreFacts", "StoreWriter", "StoredDocuments", "TokenStore"]

_INT32 = np.dtype(np.int32)
_DOCUMENTS_AT_ONCE = 4096

# SHA-256 reads about 1 GB/s: a store up to this size is verified before it is used again.
_VERIFIED_BYTES = 2**30
_VERIFIED = "verified.json"
_NOTE_BYTES = 2**16


class TokenStore:
    """Documents by number, read from memory-mapped files. Open one with `TokenStore.open`."""

    def __init__(self, path: Path, manifest: StoreManifest) -> None:
        self.path = path
        self.fingerprint = manifest.fingerprint
        self._manifest = manifest
        self._facts = manifest.facts
        self._count = self._facts.documents
        self._check_sizes()
        self._tokens = self._map("tokens.bin", np.dtype(manifest.token_dtype))
        self._supervised = self._map("supervised.bin", np.dtype(np.bool_))
        self._turn_start = self._map("turn_start.bin", np.dtype(np.bool_))
        self._weights = self._map_optional("weights.bin", np.dtype(np.float32))
        self._offsets: NDArray[np.int64] = self._map("offsets.bin", np.dtype(np.int64))
        self._counted = self._map_optional("counted.bin", np.dtype(np.int32))
        if self._counted is not None:
            self._counted = self._counted.reshape(self._count, COUNTED_FIELDS)
        self._rows = self._map("rows.bin", np.dtype(np.int64))
        self._totals = self._map("totals.bin", np.dtype(np.int32))
        # Python integers straight from the buffer: half the time of indexing an array.
        self._begin = self._offsets.data
        self._row = self._rows.data
        self._total = self._totals.data
        self._name_firsts = [first for first, _ in manifest.names]
        self._name_prefixes = [prefix for _, prefix in manifest.names]
        self.lengths: NDArray[np.int32] = self._map("lengths.bin", np.dtype(np.int32))
        if self._begin[0] != 0 or self._begin[self._count] != self._facts.tokens:
            raise self._corrupt("offsets.bin does not span the tokens")

    @classmethod
    def open(cls, path: Path | str) -> TokenStore:
        """Open the store at `path`: manifest and file sizes are checked, contents by `verify()`.

        Raises:
            DataError: it is not a store, or damaged, or of another version.
        """
        return cls(Path(path), read_manifest(Path(path)))

    def __reduce__(self) -> tuple[Any, ...]:
        return (TokenStore.open, (self.path,))

    def __len__(self) -> int:
        return self._count

    @property
    def tokenizer(self) -> str:
        """Digest of the tokenizer that made the tokens; empty where who made the store did not say."""
        return str(self._manifest.identity.get("tokenizer", ""))

    def facts(self) -> StoreFacts:
        """Counts of the whole store, from the manifest."""
        return self._facts

    def document(self, index: int) -> Document:
        """Document `index`, from 0. The flags are read-only views of the file, the other arrays copies."""
        if not 0 <= index < self._count:
            raise IndexError(f"document {index} of {self._count}")
        begin, end = self._begin[index], self._begin[index + 1]
        if self._counted is None or self._counted[index, 4] == 0:
            counted = Counted(0, 0, 0, self._total[index], end - begin - 1)
        else:
            counted = Counted(*self._counted[index].tolist())
        return Document(
            self._checked(self._tokens[begin:end]),
            self._supervised[begin:end],
            self._turn_start[begin:end],
            None if self._weights is None else self._weights[begin:end].copy(),
            counted,
            self.name(index),
        )

    def documents(self, indices: Sequence[int] | NDArray[np.integer[Any]]) -> StoredDocuments:
        """Several documents at once, in the order asked for: the way of the hot path."""
        ids = np.asarray(indices, dtype=np.int64)
        begins = self._offsets[ids]
        lengths = self._offsets[ids + 1] - begins
        offsets = np.zeros(len(ids) + 1, dtype=np.int64)
        np.cumsum(lengths, out=offsets[1:])
        places = np.repeat(begins - offsets[:-1], lengths) + np.arange(offsets[-1])
        return StoredDocuments(
            self._checked(self._tokens[places]),
            self._supervised[places],
            self._turn_start[places],
            None if self._weights is None else self._weights[places],
            offsets,
            self._counted_rows(ids, lengths),
        )

    def blocks(self) -> Iterator[Block]:
        """All documents in their order, a few thousand at a time: what a writer makes an equal store of."""
        firsts = [*self._name_firsts, self._count]
        for prefix, (first, last) in zip(self._name_prefixes, pairwise(firsts), strict=True):
            for begin in range(first, last, _DOCUMENTS_AT_ONCE):
                yield self._block(prefix, begin, min(last, begin + _DOCUMENTS_AT_ONCE))

    def _block(self, prefix: str, begin: int, end: int) -> Block:
        tokens = slice(self._begin[begin], self._begin[end])
        return Block(
            tokens=self._tokens[tokens].astype(np.uint32),
            supervised=self._supervised[tokens],
            turn_start=self._turn_start[tokens],
            weights=None if self._weights is None else self._weights[tokens],
            lengths=self.lengths[begin:end].astype(np.int64),
            rows=self._rows[begin:end],
            counted=None if self._counted is None else self._counted[begin:end],
            prefix=prefix,
        )

    def name(self, index: int) -> str:
        """Where the record of document `index` lies; pieces of a split record bear their number from 1."""
        prefix = self._name_prefixes[bisect_right(self._name_firsts, index) - 1]
        row = self._row[index]
        name = prefix if row < 0 else f"{prefix}:{row}"
        if self._counted is None or self._counted[index, 4] == 0:
            return name
        if self._facts.max_seq_length is None:
            return name
        # Every piece but the last predicts max_seq_length - 1 tokens, so its number follows from the count before it.
        return f"{name}#{self._counted[index, 1] // (self._facts.max_seq_length - 1) + 1}"

    def verify(self) -> None:
        """Read every file, compare its checksum, and check that the documents are consistent.

        Raises:
            DataError: a file's content is not what was written, or cannot be that of documents.
        """
        for name, written in self._manifest.files.items():
            with inside(self.path, name).open("rb") as file:
                if hashlib.file_digest(file, "sha256").hexdigest() != written.sha256:
                    raise self._corrupt(f"{name} is not what was written (SHA-256 differs)")
        self.check_documents()
        for begin in range(0, self._count, _DOCUMENTS_AT_ONCE):
            self._check_tokens(begin, min(self._count, begin + _DOCUMENTS_AT_ONCE))

    def check_documents(self) -> None:
        """Check all that need not read tokens: checksums detect accidents only, and anybody can sign a store again.

        Raises:
            DataError: offsets, lengths or counts contradict each other.
        """
        lengths = np.diff(self._offsets)
        if lengths.min() < 1 or not np.array_equal(lengths, self.lengths):
            raise self._corrupt("offsets.bin and lengths.bin contradict each other")
        if lengths.max() != self._facts.longest:
            raise self._corrupt(f"the longest document has {lengths.max()} tokens, not {self._facts.longest}")
        if (self._totals < 0).any() or (self._totals >= lengths).any():
            raise self._corrupt("totals.bin counts more supervised tokens than a document has")
        if self._totals.sum(dtype=np.int64) != self._facts.supervised_tokens:
            raise self._corrupt("totals.bin does not add up to the manifest's supervised tokens")
        if self._counted is not None and (self._counted < 0).any():
            raise self._corrupt("counted.bin has negative counts")

    def _check_tokens(self, begin: int, end: int) -> None:
        """The tokens of documents [begin, end), their flags and weights."""
        first, last = self._begin[begin], self._begin[end]
        self._checked(self._tokens[first:last])
        supervised = self._supervised[first:last]
        for name, flags in (("supervised.bin", supervised), ("turn_start.bin", self._turn_start[first:last])):
            if flags.view(np.uint8).max() > 1:
                raise self._corrupt(f"{name} holds bytes other than 0 and 1")
        running = np.concatenate([[0], np.cumsum(supervised)])
        offsets = self._offsets[begin : end + 1] - first
        if not np.array_equal(running[offsets[1:]] - running[offsets[:-1] + 1], self._totals[begin:end]):
            raise self._corrupt("totals.bin and supervised.bin contradict each other")
        if self._weights is not None:
            weights = self._weights[first:last]
            if not (np.isfinite(weights) & (weights >= 0)).all():
                raise self._corrupt("weights.bin holds weights that are negative or not finite")

    def _checked(self, tokens: NDArray[np.unsignedinteger[Any]]) -> NDArray[np.int32]:
        """Token ids as batches hold them. An id outside the vocabulary would read any row of the embedding."""
        if tokens.size and tokens.max() >= self._facts.vocab_size:
            raise self._corrupt(f"token id {tokens.max()} is outside the vocabulary of {self._facts.vocab_size}")
        return tokens.astype(_INT32)

    def verify_once(self) -> None:
        """`verify()`, unless its files are as they were when some process last verified them; of a large store, the
        checks that need not read its tokens.

        Of the processes that come at once, one reads and the others wait; verified.json notes what it read. Where the
        folder may only be read nothing can be noted, and every process reads.

        Raises:
            DataError: as `verify`.
        """
        size = sum(written.bytes for written in self._manifest.files.values())
        if self._is_verified():
            return
        if size > _VERIFIED_BYTES:
            self.check_documents()
            return
        if not os.access(self.path, os.W_OK):
            self.verify()
            return
        note = inside(self.path, _VERIFIED)
        with held(inside(self.path, "verified.lock")):
            if self._is_verified():
                return
            stamps = self._stamps()  # before the reading: what changes meanwhile is read again
            self.verify()
            note.write_text(stamps, encoding="utf-8")

    def _is_verified(self) -> bool:
        try:
            return read_text(self.path / _VERIFIED, limit=_NOTE_BYTES) == self._stamps()
        except (OSError, MalformedError):
            return False

    def _stamps(self) -> str:
        """Name, size, times and inode of every file. The change time, unlike the other, cannot be set back."""
        found = {name: (self.path / name).stat() for name in sorted(self._manifest.files)}
        return json.dumps({name: [s.st_size, s.st_mtime_ns, s.st_ctime_ns, s.st_ino] for name, s in found.items()})

    def _counted_rows(self, ids: NDArray[np.int64], lengths: NDArray[np.int64]) -> NDArray[np.int32] | None:
        if self._counted is None:
            return None
        counted: NDArray[np.int32] = self._counted[ids]
        whole = counted[:, 4] == 0
        counted[whole, 3] = self._totals[ids[whole]]
        counted[whole, 4] = lengths[whole] - 1
        return counted

    def _check_sizes(self) -> None:
        for name, written in self._manifest.files.items():
            file = inside(self.path, name)
            size = file.stat().st_size if file.is_file() else None
            if size != written.bytes:
                got = "no such file" if size is None else f"{size} bytes instead of {written.bytes}"
                raise self._corrupt(f"{name} is not as it was written: {got}")

    def _corrupt(self, why: str) -> DataError:
        return DataError(
            f"the token store {self.path} is corrupt: {why}", do="delete the folder and prepare the data again"
        )

    def _map(self, name: str, dtype: np.dtype[Any]) -> NDArray[Any]:
        with inside(self.path, name).open("rb") as file:
            buffer = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        return np.frombuffer(buffer, dtype=dtype)

    def _map_optional(self, name: str, dtype: np.dtype[Any]) -> NDArray[Any] | None:
        return self._map(name, dtype) if name in self._manifest.files else None
