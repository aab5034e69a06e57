"""Stand-ins that are simple enough to be trusted."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from seqaware.checkpoint.manifest import MANIFEST, sealed
from seqaware.data.store.token_store import Counted, Document, StoredDocuments


def document(
    tokens: Sequence[int],
    *,
    supervised: Sequence[bool] | None = None,
    turn_starts: Sequence[int] = (),
    weights: Sequence[float] | None = None,
    counted: Counted | None = None,
    name: str = "rows:0",
) -> Document:
    """A document of these tokens, all of them supervised unless told otherwise; turn_starts are places."""
    n = len(tokens)
    starts = np.zeros(n, dtype=np.bool_)
    starts[list(turn_starts)] = True
    return Document(
        tokens=np.array(tokens, dtype=np.int32),
        supervised=np.ones(n, np.bool_) if supervised is None else np.array(supervised, dtype=np.bool_),
        turn_start=starts,
        weights=None if weights is None else np.array(weights, dtype=np.float32),
        counted=Counted() if counted is None else counted,
        name=name,
    )


class MemoryStore:
    """A token store in memory, with what the hot path asks of `TokenStore`."""

    def __init__(self, documents: Sequence[Document], fingerprint: str = "fake") -> None:
        self.fingerprint = fingerprint
        self.lengths = np.array([len(each.tokens) for each in documents], dtype=np.int32)
        self._documents = list(documents)

    def __len__(self) -> int:
        return len(self._documents)

    def document(self, index: int) -> Document:
        return self._documents[index]

    def name(self, index: int) -> str:
        return self._documents[index].name

    def documents(self, indices: Sequence[int]) -> StoredDocuments:
        chosen = [self._documents[index] for index in indices]
        weighted = any(each.weights is not None for each in self._documents)
        split = any(each.counted != Counted() for each in self._documents)
        return StoredDocuments(
            tokens=np.concatenate([each.tokens for each in chosen]),
            supervised=np.concatenate([each.supervised for each in chosen]),
            turn_start=np.concatenate([each.turn_start for each in chosen]),
            weights=np.concatenate([_weights(each) for each in chosen]) if weighted else None,
            offsets=np.cumsum([0] + [len(each.tokens) for each in chosen]),
            counted=np.array([each.counted for each in chosen], dtype=np.int32) if split else None,
        )


def _weights(each: Document) -> np.ndarray:
    return np.ones(len(each.tokens), np.float32) if each.weights is None else each.weights


def checkpoint_folder(path: Path, step: int, /, **changes: Any) -> Path:
    """A folder with the manifest of a checkpoint that has no files; `changes` replace top-level values."""
    manifest: dict[str, Any] = {
        "step": step,
        "epoch": 0,
        "passed_over": [],
        "data_fingerprint": "",
        "plan_hash": "",
        "mathematics": {},
        "topology": {"ranks": 1, "zero_stage": 1},
        "files": {},
    }
    path.mkdir(parents=True, exist_ok=True)
    (path / MANIFEST).write_text(json.dumps(sealed({**manifest, **changes})))
    return path
