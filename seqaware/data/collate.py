"""Rows of documents as tensors, with everything the objective needs per token.

A label stands where its token is predicted: one place before the token. The shift is made here, inside each document:
nothing downstream shifts anything, and nothing crosses a border.

Letters: R rows, T columns, S segments (documents and paddings), N tokens of the documents, D documents.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from seqaware.data.store.token_store import StoredDocuments, TokenStore
from seqaware.errors import ConfigError

NO_LABEL = -100
# Columns of `Documents.counted`, in the order of `Counted`'s fields.
_SUPERVISED, _SEQUENCE, _TURN, _TOTAL_SUPERVISED, _TOTAL_SEQUENCE, _TOTAL_FIRST_TURN, _TOTAL_LAST_TURN = range(7)


@dataclass(frozen=True)
class Batch:
    """One micro-batch.

    Attributes:
        input_ids: int64 [R, T].
        position_ids: int64 [R, T], from 0 in every segment.
        labels: int64 [R, T], the token predicted at this place; -100 where there is no loss.
        k: int32 [R, T], the position of the predicted token among those that count, from 1; 0 where there is no loss.
        length: int32 [R, T], how many count in the unit that k counts in (document or turn); 0 where there is no loss.
        token_weight: float32 [R, T], the data's factor of the predicted token's loss, 0 where there is no loss; None
            where all factors are 1.
        cu_seqlens: int32 [S + 1], where the segments begin in the flattened R·T places: strictly rising, from 0 to R·T.
            The padding of a row is a segment of its own.
        sequence_offsets: int64 [S + 1], the same.
        loss_rows: int64 [M], the flat places that have a label, rising; without those whose factor is 0.
        lengths: the S lengths of the segments, on the host.
        sequences, tokens, supervised_tokens: documents, their tokens, and their labels; padding never counts.
        document_names: where each document lies, for a person.
    """

    input_ids: Tensor
    position_ids: Tensor
    labels: Tensor
    k: Tensor
    length: Tensor
    token_weight: Tensor | None
    cu_seqlens: Tensor
    sequence_offsets: Tensor
    loss_rows: Tensor
    lengths: tuple[int, ...]
    sequences: int
    tokens: int
    supervised_tokens: int
    document_names: tuple[str, ...]

    def shard(self, index: int, count: int) -> Batch:
        """The `index`-th of `count` equal runs of columns; T must be a multiple of `count`.

        cu_seqlens, sequence_offsets and lengths stay those of the whole rows, and so do k and length: a document may
        lie across a cut. Documents and tokens are counted with run 0 alone, so that the runs' counts add up.
        """
        width, rest = divmod(self.input_ids.shape[1], count)
        assert rest == 0, "rows that several ranks share are built with a multiple of them as columns"
        columns = slice(index * width, (index + 1) * width)
        labels = self.labels[:, columns]
        labelled = labels != NO_LABEL
        scored = labelled if self.token_weight is None else labelled & (self.token_weight[:, columns] != 0)
        loss_rows = scored.flatten().nonzero().squeeze(1)
        return replace(
            self,
            input_ids=self.input_ids[:, columns],
            position_ids=self.position_ids[:, columns],
            labels=labels,
            k=self.k[:, columns],
            length=self.length[:, columns],
            token_weight=None if self.token_weight is None else self.token_weight[:, columns],
            loss_rows=loss_rows,
            sequences=self.sequences if index == 0 else 0,
            tokens=self.tokens if index == 0 else 0,
            supervised_tokens=int(labelled.sum()),
        )

    def pinned(self) -> Batch:
        """The same batch in page-locked memory of the host, from which a GPU copies while the host goes on."""
        return self._each(lambda tensor: tensor.pin_memory())

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> Batch:
        """The same batch on another device. No dtype changes: weights are computed from exact integers there."""
        return self._each(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def _each(self, change: Callable[[Tensor], Tensor]) -> Batch:
        changed: dict[str, Any] = {
            name: change(value) for name, value in vars(self).items() if isinstance(value, Tensor)
        }
        return replace(self, **changed)


def build_batch(
    store: TokenStore,
    rows: Sequence[Sequence[int]],
    *,
    positions: str,
    on_split: str,
    pad_id: int,
    columns_multiple_of: int = 1,
) -> Batch:
    """Read the documents of a micro-batch and lay them out, row by row.

    Args:
        rows: document ids; shorter rows are padded to the longest. No rows: 1 × 2 places of padding, without loss.
        columns_multiple_of: pad the rows to such a length, so that so many ranks can share them.
        positions: what k counts. `supervised`: the document's predicted tokens that carry loss; `sequence`: all its
            predicted tokens; `turn`: those that carry loss, anew in every turn.
        on_split: `continue`: k and length go over all pieces of a split document; `restart`: each piece is its own.
        pad_id: any id of the vocabulary.

    Raises:
        ConfigError: unknown `positions` or `on_split`.
    """
    if on_split not in ("continue", "restart"):
        raise ConfigError("training.sft.on_split must be continue or restart", got=on_split)
    ids = list(chain.from_iterable(rows))
    if not ids:
        return _padding_only(pad_id, columns=max(2, columns_multiple_of))
    documents = store.documents(ids)
    if on_split == "restart":
        documents = replace(documents, counted=None)
    k_N, length_N = _positions(documents, positions)
    frame = _Frame.of([len(row) for row in rows], np.diff(documents.offsets), columns_multiple_of)
    # Token 0 of a document never carries loss, so moving everything one place forward never crosses a border.
    loss_N = _carries_loss(documents)
    ahead = np.flatnonzero(loss_N)
    predicted_at = frame.places[ahead - 1]
    scored_at = predicted_at if documents.weights is None else predicted_at[documents.weights[ahead] != 0]
    return Batch(
        input_ids=frame.tensor(pad_id, frame.places, documents.tokens.astype(np.int64)),
        position_ids=torch.from_numpy(frame.positions()),
        labels=frame.tensor(NO_LABEL, predicted_at, documents.tokens[ahead].astype(np.int64)),
        k=frame.tensor(0, predicted_at, k_N[ahead].astype(np.int32)),
        length=frame.tensor(0, predicted_at, length_N[ahead].astype(np.int32)),
        token_weight=None if documents.weights is None else frame.tensor(0, predicted_at, documents.weights[ahead]),
        cu_seqlens=torch.from_numpy(frame.borders.astype(np.int32)),
        sequence_offsets=torch.from_numpy(frame.borders),
        loss_rows=torch.from_numpy(scored_at),
        lengths=tuple(np.diff(frame.borders).tolist()),
        sequences=len(ids),
        tokens=len(documents.tokens),
        supervised_tokens=len(ahead),
        document_names=tuple(store.name(index) for index in ids),
    )


@dataclass(frozen=True)
class _Frame:
    """Where the tokens of the documents lie in the R·T places.

    Attributes:
        places: int64 [N], the flat place of each token, rising. borders: int64 [S + 1], where the segments begin.
    """

    shape: tuple[int, int]
    places: NDArray[np.int64]
    borders: NDArray[np.int64]

    @classmethod
    def of(cls, documents_R: Sequence[int], lengths_D: NDArray[np.int64], multiple: int) -> _Frame:
        """For rows of so many documents each (at least one), the documents' lengths, and a divisor of the columns."""
        row_of_D = np.repeat(np.arange(len(documents_R)), documents_R)
        tokens_R = np.bincount(row_of_D, weights=lengths_D).astype(np.int64)
        columns = -(-int(tokens_R.max()) // multiple) * multiple
        padding_R = columns - tokens_R
        padding_before_D = (np.cumsum(padding_R) - padding_R)[row_of_D]
        ends_D = np.cumsum(lengths_D) + padding_before_D
        places = np.arange(int(lengths_D.sum())) + np.repeat(padding_before_D, lengths_D)
        row_ends_R = np.arange(1, len(documents_R) + 1) * columns
        # The end of a row without padding is the end of its last document: unique merges the two.
        borders = np.unique(np.concatenate([[0], ends_D, row_ends_R]))
        return cls((len(documents_R), columns), places, borders)

    def positions(self) -> NDArray[np.int64]:
        """The place inside its segment: int64 [R, T], from 0."""
        starts = np.repeat(self.borders[:-1], np.diff(self.borders))
        return (np.arange(self.borders[-1]) - starts).reshape(self.shape)

    def tensor(self, empty: int, places: NDArray[np.int64], values: NDArray[Any]) -> Tensor:
        """[R, T] of the values' dtype, the values at their flat places, `empty` elsewhere."""
        flat = np.full(self.shape[0] * self.shape[1], empty, dtype=values.dtype)
        flat[places] = values
        return torch.from_numpy(flat.reshape(self.shape))


def _carries_loss(documents: StoredDocuments) -> NDArray[np.bool_]:
    loss_N = documents.supervised.copy()
    loss_N[documents.offsets[:-1]] = False
    return loss_N


def _positions(documents: StoredDocuments, positions: str) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """k of every token and the length of the unit it counts in: two int64 [N], meant where the token carries loss."""
    begins = documents.offsets[:-1]
    counted = documents.counted
    if counted is None:
        counted = np.zeros((len(begins), 7), dtype=np.int32)
    match positions:
        case "supervised":
            bases, totals = counted[:, _SUPERVISED], counted[:, _TOTAL_SUPERVISED]
            return _count(_carries_loss(documents), begins, bases, totals)
        case "sequence":
            predicted_N = np.ones(len(documents.tokens), dtype=np.bool_)
            predicted_N[begins] = False
            return _count(predicted_N, begins, counted[:, _SEQUENCE], counted[:, _TOTAL_SEQUENCE])
        case "turn":
            return _count(_carries_loss(documents), *_turns(documents, counted))
    raise ConfigError("training.sft.positions must be supervised, sequence or turn", got=positions)


def _turns(
    documents: StoredDocuments, counted: NDArray[np.int32]
) -> tuple[NDArray[np.int64], NDArray[np.int32], NDArray[np.int32]]:
    """Where the turns begin, what was counted of each before, and the totals known of them.

    What stands before the first start of a turn is a unit as well. A start at token 0 of a document starts nothing: it
    is not predicted, or, in a later piece of a split document, was counted in the piece before.
    """
    starts_N = documents.turn_start.copy()
    starts_N[documents.offsets[:-1]] = True
    begins = np.flatnonzero(starts_N)
    first = np.searchsorted(begins, documents.offsets[:-1])
    last = np.append(first[1:], len(begins)) - 1
    bases = np.zeros(len(begins), dtype=np.int32)
    bases[first] = counted[:, _TURN]
    totals = np.zeros(len(begins), dtype=np.int32)
    totals[last] = counted[:, _TOTAL_LAST_TURN]
    totals[first] = counted[:, _TOTAL_FIRST_TURN]
    return begins, bases, totals


def _count(
    counts_N: NDArray[np.bool_], begins: NDArray[np.int64], bases: NDArray[np.int32], totals: NDArray[np.int32]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Count the tokens that count, from base + 1 in each unit, and how many each unit has in all.

    Args:
        begins: where the units begin. bases: what was counted of each before. totals: of a unit that goes on in other
            pieces, all of it; smaller than what is here (0) for any other.
    """
    sizes = np.diff(np.append(begins, len(counts_N)))
    own = np.add.reduceat(counts_N, begins, dtype=np.int64)
    before = np.cumsum(own) - own
    k_N = np.cumsum(counts_N) + np.repeat(bases - before, sizes)
    return k_N, np.repeat(np.maximum(own + bases, totals), sizes)


def _padding_only(pad_id: int, *, columns: int) -> Batch:
    shape = (1, columns)
    return Batch(
        input_ids=torch.full(shape, pad_id, dtype=torch.int64),
        position_ids=torch.arange(columns).view(shape),
        labels=torch.full(shape, NO_LABEL, dtype=torch.int64),
        k=torch.zeros(shape, dtype=torch.int32),
        length=torch.zeros(shape, dtype=torch.int32),
        token_weight=None,
        cu_seqlens=torch.tensor([0, columns], dtype=torch.int32),
        sequence_offsets=torch.tensor([0, columns]),
        loss_rows=torch.zeros(0, dtype=torch.int64),
        lengths=(columns,),
        sequences=0,
        tokens=0,
        supervised_tokens=0,
        document_names=(),
    )
