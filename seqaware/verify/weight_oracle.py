"""The weight of every token's loss, by plain loops over Python floats, straight from the definition.

    w_1 = 1        w_k = 1 + γ · w_{k−1}

The oracle's side of the comparison: nothing here is shared with `data/batch.py`, nor with `objective/` but for the
schemes that are not written out here: a user's function, or one that is new.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from seqaware.config.schema import SftConfig
from seqaware.data.store.store_format import Counted, Document
from seqaware.objective.weighting import Weighting


@dataclass(frozen=True)
class Scored:
    """A token that carries loss: its place in its document (from 1), what stands there, its weight, and its k."""

    place: int
    label: int
    weight: float
    k: int


def scored_tokens(document: Document, sft: SftConfig) -> list[Scored]:
    """The tokens of a document that carry loss when they are predicted, with their weights.

    Args:
        sft: the objective. A document of one step is one sequence: `mean_one` averages over it.
    """
    counted = _count(document, sft)
    weights = _weights([k for _, k, _ in counted], [length for _, _, length in counted], sft)
    if sft.scale == "mean_one" and sum(weights) > 0.0:
        mean = sum(weights) / len(weights)
        weights = [weight / mean for weight in weights]
    if document.weights is not None:
        weights = [w * float(document.weights[place]) for w, (place, _, _) in zip(weights, counted, strict=True)]
    return [
        Scored(place, int(document.tokens[place]), weight, k)
        for (place, k, _), weight in zip(counted, weights, strict=True)
    ]


def _count(document: Document, sft: SftConfig) -> list[tuple[int, int, int]]:
    """(place, k, length) of every token with loss: k from 1, length of the unit in which k counts."""
    # A piece of a split document goes on counting where the piece before stopped, or knows nothing of it.
    before = document.counted if sft.on_split == "continue" else Counted()
    places = range(1, len(document.tokens))
    with_loss = [place for place in places if document.supervised[place]]
    match sft.positions:
        case "sequence":
            length = max(before.sequence + len(places), before.total_sequence)
            return [(place, before.sequence + place, length) for place in with_loss]
        case "supervised":
            length = max(before.supervised + len(with_loss), before.total_supervised)
            return [(place, before.supervised + n, length) for n, place in enumerate(with_loss, start=1)]
    turns: list[list[int]] = [[]]
    for place in places:
        if document.turn_start[place]:
            turns.append([])
        if document.supervised[place]:
            turns[-1].append(place)
    found = []
    for number, turn in enumerate(turns):
        is_first, is_last = number == 0, number == len(turns) - 1
        base = before.turn if is_first else 0
        known = (before.total_first_turn if is_first else 0, before.total_last_turn if is_last and not is_first else 0)
        length = max(base + len(turn), *known)
        found += [(place, base + n, length) for n, place in enumerate(turn, start=1)]
    return found


def _weights(k: list[int], lengths: list[int], sft: SftConfig) -> list[float]:
    match sft.weighting:
        case "uniform":
            return [1.0] * len(k)
        case "linear":
            return [each / length for each, length in zip(k, lengths, strict=True)]
        case "log_suffix":
            series = [0.0]
            for _ in range(max(k, default=0)):
                series.append(1.0 + sft.discount * series[-1])
            factor = 1.0 - sft.discount if sft.scale == "horizon" else 1.0
            return [factor * series[each] for each in k]
        case name:
            # No formula of our own to compare with: the run's own function, on one document.
            values = Weighting(sft.discount, name).weights(torch.tensor(k), torch.tensor(lengths))
            return [float(value) for value in values]


def denominator(documents: list[list[Scored]], normalize_by: str) -> float:
    """What Σ w·l of a step is divided by."""
    match normalize_by:
        case "tokens":
            return float(sum(len(tokens) for tokens in documents))
        case "sequences":
            return float(len(documents))
        case _:
            return sum(token.weight for tokens in documents for token in tokens)
