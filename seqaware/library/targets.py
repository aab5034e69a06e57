"""From labels as transformers has them to what the objective needs: shifted labels, and k and length of every token.

Letters: R rows, T columns, S segments (documents and runs of padding).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from seqaware.errors import ConfigError, DataError

NO_LABEL = -100
Positions: TypeAlias = Literal["supervised", "sequence"]


@dataclass(frozen=True, eq=False)
class Targets:
    """What stands at each place of a batch, the place from which a token is predicted.

    Attributes:
        labels: int64 [R, T], the token predicted here; -100 where there is no loss.
        k: int64 [R, T], its position among those that count, from 1; 0 where there is no loss.
        length: int64 [R, T], how many count in its document; 0 where there is no loss.
        sequence_offsets: int64 [S + 1], where the segments begin in the flattened places, from 0 to R·T.
        packed: a row holds several documents.
    """

    labels: Tensor
    k: Tensor
    length: Tensor
    sequence_offsets: Tensor
    packed: bool


def targets_of(
    labels: Tensor,
    *,
    position_ids: Tensor | None = None,
    attention_mask: Tensor | None = None,
    positions: Positions = "supervised",
) -> Targets:
    """Shift labels inside each document, and count.

    A document begins at column 0, where position_ids do not go on by one, and where padding ends. Waits for the device,
    to look for labels that cannot be right.

    Args:
        labels: int64 [R, T] beside input_ids, not shifted; -100 where there is no loss.
        position_ids: int64 [R, T] or [1, T]; None: one document to a row.
        attention_mask: [R, T], 0 at padding; None: no padding, or padding that only trails and has no labels.
        positions: what k counts: the document's tokens with a label, or all its predicted tokens.

    Raises:
        DataError: a label at padding, or at the first token of a document inside a row, which nothing predicts.
        ConfigError: unknown `positions`, or a mask that says more than where the padding is.
    """
    if positions not in ("supervised", "sequence"):
        raise ConfigError("positions must be supervised or sequence", got=positions)
    starts, real = _segments(labels, position_ids, attention_mask)
    has_label = labels != NO_LABEL
    # The first column has no predecessor, whatever its label: transformers passes over it as well.
    wrong = has_label & (starts | ~real)
    wrong[:, 0] &= ~real[:, 0]
    if bool(wrong.any()):
        row, column = (int(each) for each in wrong.nonzero()[0])
        raise DataError(
            "a label where no token can be predicted: at padding, or at the first token of a document inside a row",
            got=f"labels[{row}, {column}] = {int(labels[row, column])}",
            do="write -100 there (DataCollatorWithFlattening does)",
        )
    predicted = real & ~starts
    loss = has_label & predicted
    k, length, offsets = _counted(loss if positions == "supervised" else predicted, starts)
    return Targets(
        labels=_ahead(torch.where(loss, labels, NO_LABEL), NO_LABEL),
        k=_ahead(torch.where(loss, k, 0), 0),
        length=_ahead(torch.where(loss, length, 0), 0),
        sequence_offsets=offsets,
        packed=bool(((starts & real).sum(1) > 1).any()),
    )


def _segments(labels: Tensor, position_ids: Tensor | None, attention_mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Where segments start, and where there is no padding: bool [R, T] each."""
    starts = torch.zeros_like(labels, dtype=torch.bool)
    starts[:, 0] = True
    real = torch.ones_like(starts)
    if position_ids is not None:
        here = position_ids.expand_as(labels)
        starts[:, 1:] |= here[:, 1:] != here[:, :-1] + 1
    if attention_mask is not None:
        if attention_mask.shape != labels.shape or bool(((attention_mask != 0) & (attention_mask != 1)).any()):
            raise ConfigError(
                "an attention_mask must be [rows, columns] of 0 and 1",
                got=f"shape {tuple(attention_mask.shape)}",
                do="tell documents of one row apart by position_ids, without a mask",
            )
        real = attention_mask != 0
        starts[:, 1:] |= real[:, 1:] != real[:, :-1]
    return starts, real


def _counted(counts: Tensor, starts: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """k and length of every token, [R, T], and where the segments begin; a segment's first token never counts."""
    running = counts.flatten().cumsum(0)
    begins = starts.flatten().nonzero().squeeze(1)
    offsets = torch.cat((begins, begins.new_tensor([counts.numel()])))
    before = running[begins]
    totals = torch.cat((before[1:], running[-1:])) - before
    of_token = offsets.diff()
    k = running - before.repeat_interleave(of_token)
    return k.view_as(counts), totals.repeat_interleave(of_token).view_as(counts), offsets


def _ahead(values: Tensor, empty: int) -> Tensor:
    """Every value one place before its token."""
    return torch.cat((values[:, 1:], values.new_full((len(values), 1), empty)), dim=1)
