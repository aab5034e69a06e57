"""What a token store holds, in memory and in its manifest; `store.py` lays out the files."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from seqaware.data.file_records import Count, FileRecord, Text, first_problem, inside
from seqaware.errors import DataError
from seqaware.files import MalformedError, read_json

FORMAT = "seqaware token store"
FORMAT_VERSION = 1
MANIFEST = "store.json"
COUNTED_FIELDS = 7
_NAMED_DROPPED = 1000
_LARGEST_VOCABULARY = 2**31  # token ids are int32 in batches


class Counted(NamedTuple):
    """What the pieces before this one counted, and the totals of the whole document, in predicted tokens.

    The counts before are 0 for a document that was not split.

    Attributes:
        supervised: supervised tokens predicted in the pieces before.
        sequence: tokens predicted in the pieces before.
        turn: supervised tokens predicted in the pieces before, since the last start of a turn there.
        total_supervised: supervised tokens predicted in the whole document.
        total_sequence: tokens predicted in the whole document: its length - 1.
        total_first_turn: supervised tokens of the whole turn in which this piece begins; 0 where nothing was split.
        total_last_turn: the same of the turn in which this piece ends.
    """

    supervised: int = 0
    sequence: int = 0
    turn: int = 0
    total_supervised: int = 0
    total_sequence: int = 0
    total_first_turn: int = 0
    total_last_turn: int = 0


class Document(NamedTuple):
    """One document (or one piece of a split one) of n tokens.

    Attributes:
        tokens: int32 [n].
        supervised: bool [n]; token i carries loss when it is predicted. Token 0 is never predicted, whatever its flag.
        turn_start: bool [n]; token i is the first of an assistant's turn.
        weights: float32 [n] factors of the tokens' losses, or None where all are 1.
        counted: what came before this piece of a split document.
        name: where the record lies, for a person: `gsm8k/train:17`, `rows.jsonl:18`, `rows.jsonl:18#2` (second piece).
    """

    tokens: NDArray[np.int32]
    supervised: NDArray[np.bool_]
    turn_start: NDArray[np.bool_]
    weights: NDArray[np.float32] | None
    counted: Counted
    name: str


@dataclass(frozen=True, slots=True)
class StoredDocuments:
    """Several documents, flat: document j lies at offsets[j]:offsets[j + 1]. Fields as in `Document`.

    counted is int32 [D, 7] in the order of `Counted`'s fields, or None where no document of the store was split.
    """

    tokens: NDArray[np.int32]
    supervised: NDArray[np.bool_]
    turn_start: NDArray[np.bool_]
    weights: NDArray[np.float32] | None
    offsets: NDArray[np.int64]
    counted: NDArray[np.int32] | None


class Part(NamedTuple):
    """One source of a mixture: its documents follow those of the part before it in the store."""

    name: Text
    documents: Count
    proportion: Annotated[float, Field(ge=0, allow_inf_nan=False)] | None


@dataclass(frozen=True)
class StoreFacts:
    """What a store holds. Tokens include the first of every document; supervised tokens are those that are predicted.

    dropped counts the examples (or pieces) that were left out, by reason; truncated and split count examples.
    """

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")

    documents: Count
    tokens: Count
    supervised_tokens: Count
    longest: Count
    dropped: dict[str, Count]
    truncated: Count
    fingerprint: Text
    parts: tuple[Part, ...]
    records: Count = 0
    split: Count = 0
    max_seq_length: Count | None = None
    vocab_size: Count = 0
    eos_id: Count = 0


class StoreManifest(BaseModel):
    """What `store.json` holds. Its checksum detects accidents only: whoever edits a manifest can sign it again."""

    model_config = ConfigDict(frozen=True, extra="allow")

    fingerprint: Text
    identity: dict[str, Any]
    token_dtype: Literal["uint16", "uint32"]
    facts: StoreFacts
    names: Annotated[list[tuple[Count, Text]], Field(min_length=1)]
    files: dict[str, FileRecord]


@dataclass
class Tally:
    """What became of the rows that a store is made of.

    Attributes:
        records, truncated, split: numbers of rows.
        dropped: examples (or pieces) that were left out, by reason, in the order in which the reasons came up.
        named: name and reason of the first of them.
    """

    records: Count = 0
    truncated: Count = 0
    split: Count = 0
    dropped: dict[str, Count] = field(default_factory=dict)
    named: list[dict[str, str]] = field(default_factory=list)

    def drop(self, name: str, reason: str) -> None:
        """Count an example that was left out; the first ones are named."""
        self.dropped[reason] = self.dropped.get(reason, 0) + 1
        if len(self.named) < _NAMED_DROPPED:
            self.named.append({"name": name, "reason": reason})

    def add(self, later: Tally) -> None:
        """Count the rows of another one as well, which come behind these."""
        self.records += later.records
        self.truncated += later.truncated
        self.split += later.split
        for reason, count in later.dropped.items():
            self.dropped[reason] = self.dropped.get(reason, 0) + count
        self.named += later.named[: _NAMED_DROPPED - len(self.named)]


def manifest_checksum(manifest: dict[str, Any]) -> str:
    """SHA-256 of a manifest without its own `checksum`."""
    body = {key: value for key, value in manifest.items() if key != "checksum"}
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def read_manifest(path: Path) -> StoreManifest:
    """The manifest of the store at `path`, checked by its checksum and for what a reader will take from it.

    Raises:
        DataError: there is no store, another version's, or the manifest is damaged, or names a file that does not lie
            in the store's folder.
    """
    again = "delete the folder and prepare the data again"
    if not (path / MANIFEST).is_file():
        raise DataError(f"{path} is not a token store", got=f"no {MANIFEST}", do="prepare it, or correct the path")
    try:
        manifest = read_json(inside(path, MANIFEST))
    except (MalformedError, OSError) as error:
        raise DataError(f"the token store {path} is corrupt: {MANIFEST} cannot be read", got=error, do=again) from error
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise DataError(f"{path} is not a token store of ours: {MANIFEST} is something else's", do="correct the path")
    if manifest.get("version") != FORMAT_VERSION:
        got = f"format version {manifest.get('version')}, this program reads {FORMAT_VERSION}"
        raise DataError(f"the token store {path} was written by another version", got=got, do=again)
    if manifest.get("checksum") != manifest_checksum(manifest):
        raise DataError(f"the token store {path} is corrupt: {MANIFEST} was altered", do=again)
    try:
        checked = StoreManifest.model_validate(manifest)
        problem = _contradiction(path, checked)
    except ValidationError as error:
        problem = first_problem(error)
    if problem is not None:
        raise DataError(f"the token store {path} is corrupt: {MANIFEST} is invalid", got=problem, do=again)
    return checked


def _contradiction(path: Path, manifest: StoreManifest) -> str | None:
    """What contradicts itself in a manifest whose values have the right types; None where nothing does.

    Raises:
        DataError: a name leads out of the folder.
    """
    facts, itemsize = manifest.facts, np.dtype(manifest.token_dtype).itemsize
    sizes = {
        "tokens.bin": itemsize * facts.tokens,
        "supervised.bin": facts.tokens,
        "turn_start.bin": facts.tokens,
        "weights.bin": 4 * facts.tokens,
        "offsets.bin": 8 * (facts.documents + 1),
        "lengths.bin": 4 * facts.documents,
        "totals.bin": 4 * facts.documents,
        "rows.bin": 8 * facts.documents,
        "counted.bin": 4 * COUNTED_FIELDS * facts.documents,
    }
    for name, written in manifest.files.items():
        inside(path, name)
        if name not in sizes:
            return f"{name} is no file of a token store"
        if written.bytes != sizes[name]:
            return f"{name} has {written.bytes} bytes where {sizes[name]} are needed"
    if absent := sizes.keys() - manifest.files.keys() - {"weights.bin", "counted.bin"}:
        return f"without {', '.join(sorted(absent))}"
    firsts = [first for first, _ in manifest.names]
    if firsts[0] != 0 or firsts[-1] >= facts.documents or any(a >= b for a, b in pairwise(firsts)):
        return "names: not in the order of the documents"
    if sum(part.documents for part in facts.parts) != facts.documents:
        return "facts.parts: not all documents belong to one"
    if facts.fingerprint != manifest.fingerprint:
        return "facts.fingerprint: not the fingerprint"
    if not facts.eos_id < facts.vocab_size <= _LARGEST_VOCABULARY:
        return "facts.vocab_size: no vocabulary, or without the end-of-sequence token"
    if "counted.bin" in manifest.files and facts.max_seq_length is not None and facts.max_seq_length < 2:
        return "facts.max_seq_length: too small for pieces of documents"
    return None
