"""What a token store holds, in memory and in its manifest; `store.py` lays out the files."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from seqaware.data.inside import inside
from seqaware.errors import DataError

FORMAT = "seqaware token store"
FORMAT_VERSION = 1
MANIFEST = "store.json"
COUNTED_FIELDS = 7
_ITEMSIZES = {"uint16": 2, "uint32": 4}
_NAMED_DROPPED = 1000


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
class Documents:
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

    name: str
    documents: int
    proportion: float | None


@dataclass(frozen=True)
class StoreFacts:
    """What a store holds. Tokens include the first of every document; supervised tokens are those that are predicted.

    dropped counts the examples (or pieces) that were left out, by reason; truncated and split count examples.
    """

    documents: int
    tokens: int
    supervised_tokens: int
    longest: int
    dropped: dict[str, int]
    truncated: int
    fingerprint: str
    parts: tuple[Part, ...]
    records: int = 0
    split: int = 0
    max_seq_length: int | None = None
    vocab_size: int = 0
    eos_id: int = 0


@dataclass
class Tally:
    """What became of the rows that a store is made of.

    Attributes:
        records, truncated, split: numbers of rows.
        dropped: examples (or pieces) that were left out, by reason, in the order in which the reasons came up.
        named: name and reason of the first of them.
    """

    records: int = 0
    truncated: int = 0
    split: int = 0
    dropped: dict[str, int] = field(default_factory=dict)
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


def read_manifest(path: Path) -> dict[str, Any]:
    """The manifest of the store at `path`, checked by its checksum and for what a reader will take from it.

    Raises:
        DataError: there is no store, another version's, or the manifest is damaged, or names a file that does not lie
            in the store's folder.
    """
    again = "delete the folder and prepare the data again"
    if not (path / MANIFEST).is_file():
        raise DataError(f"{path} is not a token store", got=f"no {MANIFEST}", do="prepare it, or correct the path")
    try:
        manifest = json.loads(inside(path, MANIFEST).read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise DataError(f"the token store {path} is corrupt: {MANIFEST} cannot be read", got=error, do=again) from error
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise DataError(f"{path} is not a token store of ours: {MANIFEST} is something else's", do="correct the path")
    if manifest.get("version") != FORMAT_VERSION:
        got = f"format version {manifest.get('version')}, this program reads {FORMAT_VERSION}"
        raise DataError(f"the token store {path} was written by another version", got=got, do=again)
    if manifest.get("checksum") != manifest_checksum(manifest):
        raise DataError(f"the token store {path} is corrupt: {MANIFEST} was altered", do=again)
    try:
        _check_files(path, manifest)
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        what = f"the token store {path} is corrupt: {MANIFEST} does not say what it must"
        raise DataError(what, got=f"{type(error).__name__}: {error}", do=again) from error
    return manifest


def _check_files(path: Path, manifest: dict[str, Any]) -> None:
    """The checksum keeps accidents away, not people: whoever made the manifest made its checksum too."""
    facts, itemsize = facts_of(manifest), _ITEMSIZES[manifest["token_dtype"]]
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
    files = manifest["files"]
    for name, written in files.items():
        inside(path, name)
        if written["bytes"] != sizes[name]:
            raise ValueError(f"{name} has {written['bytes']} bytes where {sizes[name]} are needed")
    absent = sizes.keys() - files.keys() - {"weights.bin", "counted.bin"}
    if absent or facts.documents < 1 or manifest["names"][0][0] != 0 or not isinstance(manifest["identity"], dict):
        raise ValueError(f"without {', '.join(sorted(absent)) or 'documents, names or identity'}")


def facts_of(manifest: dict[str, Any]) -> StoreFacts:
    """The facts in a manifest that `read_manifest` returned."""
    facts = manifest["facts"]
    return StoreFacts(**{**facts, "parts": tuple(Part(*part) for part in facts["parts"])})
