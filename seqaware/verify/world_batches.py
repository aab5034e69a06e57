"""The batches that other numbers of ranks would get, made without starting them.

Whatever the number of ranks, a step must hold the same documents, the same labels at the same places, and bit for bit
the same weights. Rows and micro-batches may differ, so a step is compared as a multiset of documents: each is what its
tokens are, and carries the places, labels and weights of its losses.
"""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from seqaware.data.batch_loader import RowFormat, rank_batches
from seqaware.data.collate import Batch
from seqaware.data.store.store_format import Document
from seqaware.objective.weighting import Weighting
from seqaware.training.prepare import Prepared
from seqaware.verify.items import WEIGHT_ROUNDING, Item
from seqaware.verify.oracle_step import StepDocuments
from seqaware.verify.weight_oracle import Scored

WORLDS = (1, 2, 4, 8)
_NO_LABEL = -100


@dataclass(frozen=True)
class LossPlaces:
    """The tokens with loss of one document: places int32 [M] from 1, labels int64 [M], weights float64 [M]."""

    tokens: str
    places: NDArray[np.int32]
    labels: NDArray[np.int64]
    weights: NDArray[np.float64]

    @property
    def identity(self) -> tuple[str, bytes, bytes]:
        """Everything but the weights."""
        return self.tokens, self.places.tobytes(), self.labels.tobytes()

    @property
    def key(self) -> tuple[tuple[str, bytes, bytes], bytes]:
        """Everything: the weights bit by bit, as float32."""
        return self.identity, self.weights.astype(np.float32).tobytes()


def of_batches(batches: Iterable[Batch], weighting: Weighting) -> list[LossPlaces]:
    """The documents with loss in the micro-batches of all ranks, as the engine would weigh them."""
    found = []
    for batch in batches:
        weights = weighting.weights(batch.k, batch.length, batch.sequence_offsets, token_weight=batch.token_weight)
        flat_weights, flat_labels = weights.flatten().double().numpy(), batch.labels.flatten().numpy()
        flat_ids, borders = batch.input_ids.flatten().numpy(), batch.cu_seqlens.tolist()
        for begin, end in pairwise(borders):
            labels = flat_labels[begin:end]
            at = np.flatnonzero(labels != _NO_LABEL)
            if at.size:
                own = flat_weights[begin:end]
                # A weight where no label is would be lost here: it makes all of the document's weights wrong.
                weights_M = own[at] if np.count_nonzero(own) == np.count_nonzero(own[at]) else np.full(at.size, np.inf)
                # A label stands one place before its token.
                places = (at + 1).astype(np.int32)
                found.append(LossPlaces(_digest(flat_ids[begin:end]), places, labels[at], weights_M))
    return found


def of_documents(documents: Sequence[Document], scored: Sequence[Sequence[Scored]]) -> list[LossPlaces]:
    """The same from the store's documents and the oracle's weights."""
    return [
        LossPlaces(
            _digest(document.tokens),
            np.array([token.place for token in tokens], dtype=np.int32),
            np.array([token.label for token in tokens], dtype=np.int64),
            np.array([token.weight for token in tokens]),
        )
        for document, tokens in zip(documents, scored, strict=True)
        if tokens
    ]


def hash_of(documents: Iterable[LossPlaces]) -> str:
    """One hash of the multiset, whatever the order of its documents."""
    digest = hashlib.sha256()
    for identity, weights in sorted(document.key for document in documents):
        for part in (identity[0].encode(), *identity[1:], weights):
            digest.update(hashlib.sha256(part).digest())
    return digest.hexdigest()


@dataclass(frozen=True)
class Mismatch:
    """How the documents of a step differ from the oracle's.

    missing, surplus: documents whose tokens, places or labels the other side does not have. weights: the largest
    relative error of a weight, where no document is missing.
    """

    missing: int
    surplus: int
    weights: float


def compare(batches: Sequence[LossPlaces], oracle: Sequence[LossPlaces]) -> Mismatch:
    """Match the documents by tokens, places and labels; then their weights."""
    seen, wanted = Counter(d.identity for d in batches), Counter(d.identity for d in oracle)
    worst = 0.0
    pairs = zip(sorted(batches, key=_by_key), sorted(oracle, key=_by_key), strict=False)
    if seen == wanted:
        worst = max((_worst_weight(ours.weights, theirs.weights) for ours, theirs in pairs), default=0.0)
    return Mismatch(missing=(wanted - seen).total(), surplus=(seen - wanted).total(), weights=worst)


def _by_key(document: LossPlaces) -> tuple[tuple[str, bytes, bytes], float]:
    # Equal documents with unequal factors: by the size of the weights, which rounding does not reorder.
    return document.identity, float(document.weights.sum())


def _worst_weight(ours: NDArray[np.float64], theirs: NDArray[np.float64]) -> float:
    error = np.abs(ours - theirs)
    relative = np.divide(error, theirs, out=np.where(error > 0.0, math.inf, 0.0), where=theirs > 0.0)
    return float(relative.max(initial=0.0))


def _digest(tokens: NDArray[np.int32] | NDArray[np.int64]) -> str:
    return hashlib.sha256(np.ascontiguousarray(tokens, dtype=np.int64).tobytes()).hexdigest()


def world_items(prepared: Prepared, rows: RowFormat, steps: Sequence[int]) -> list[Item]:
    """The documents, labels and weights of steps, as 1, 2, 4 and 8 data-parallel ranks would get them.

    Of the first epoch's last step too, where it lies in the run: it is the one that may be ragged.
    """
    assert prepared.plan.total_steps is not None
    last = min(prepared.order.steps_in_epoch(0), prepared.plan.total_steps)
    items = []
    for step in sorted({*steps, last}):
        ids = prepared.order.documents(*prepared.order.position(step))
        oracle = StepDocuments.of(prepared, step, prepared.plan.config.training.sft)
        wanted = of_documents(oracle.documents, oracle.scored)
        found = {
            world: of_batches(_batches_of_world(prepared, ids, rows, world), prepared.weighting) for world in WORLDS
        }
        hashes = {world: hash_of(documents) for world, documents in found.items()}
        apart = [world for world in WORLDS if hashes[world] != hashes[WORLDS[0]]]
        mismatches = [compare(documents, wanted) for documents in found.values()]
        wrong = max(mismatch.missing + mismatch.surplus for mismatch in mismatches)
        note = f"{len(wanted)} documents, hash {hashes[1][:12]}" if not apart else f"worlds {apart} differ from world 1"
        missing = f"{max(m.missing for m in mismatches)} missing, {max(m.surplus for m in mismatches)} too many"
        weights = max(mismatch.weights for mismatch in mismatches)
        about = "by w_k = 1 + γ·w_(k−1)" if weights < math.inf else "a weight where none belongs"
        items += [
            Item("batches of worlds 1, 2, 4, 8", 0.0, len(apart), note, step),
            Item("tokens and labels", 0.0, wrong, "as in the token store" if not wrong else missing, step),
            Item("weight of every token", WEIGHT_ROUNDING, weights, about, step),
        ]
    return items


def _batches_of_world(prepared: Prepared, ids: NDArray[np.int64], rows: RowFormat, world: int) -> Iterator[Batch]:
    for group in range(world):
        # The ranks of a group that shares its rows get the same ones: its first rank stands for all.
        rank, size = group * rows.sequence, world * rows.sequence
        yield from rank_batches(prepared.store, ids, rows=rows, rank=rank, size=size)
