"""What a step adds up: sums over micro-batches and ranks, ratios taken once, at the end.

A mean of means is wrong as soon as two micro-batches hold different numbers of tokens. So everything that is reported
travels as a sum in one float64 vector on the device: micro-batches add, ranks add (one all-reduce of `vector`), and
`metrics` divides once. float64, because a sum over 10⁷ tokens in float32 loses the digits that are looked at.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, TypeAlias

import torch
from torch import Tensor

from seqaware.objective.positions import POSITION_SIZE, by_position

NormalizeBy: TypeAlias = Literal["tokens", "weight", "sequences"]

LossStats: TypeAlias = Tensor
"""Detached float64 vector [len(STATS)] of sums over the rows of one loss call, in the order of `STATS`; where it was
asked for, the sums by position (`positions`) follow."""

STATS = (
    "weighted_loss",  # Σ w·l
    "loss",  # Σ l over the scored tokens
    "weight",  # Σ w over the supervised tokens
    "supervised_tokens",  # tokens with a label
    "scored_tokens",  # tokens with a label and a weight that is not zero: only these are multiplied with the head
    "correct",  # scored tokens of which no logit is larger than the label's: a tie counts
    "logsumexp",  # Σ log Σ_v exp z_v over the scored tokens
    "logsumexp_squared",
)


@dataclass(frozen=True, eq=False)
class StepSums:
    """The sums of an optimizer step, or of any part of one.

    Attributes:
        vector: float64 [len(FIELDS)] on the device, in the order of `FIELDS`; in evaluation the POSITION_SIZE sums by
            position follow. An all-reduce (sum) of it, in place, turns the sums of one rank into those of the world.
    """

    FIELDS: ClassVar[tuple[str, ...]] = (*STATS, "sequences", "tokens")

    vector: Tensor

    @classmethod
    def zeros(cls, device: torch.device | str = "cpu", *, positions: bool = False) -> StepSums:
        """The sums of nothing, with those by position if `positions`."""
        size = len(cls.FIELDS) + positions * POSITION_SIZE
        return cls(torch.zeros(size, dtype=torch.float64, device=device))

    @classmethod
    def of(cls, stats: LossStats, *, sequences: int, tokens: int) -> StepSums:
        """The sums of one micro-batch: what the loss returned, and what only the batch knows.

        Args:
            stats: float64 vector that a loss of this package returned.
            sequences: documents in the micro-batch.
            tokens: tokens that are not padding.
        """
        assert stats.shape in ((len(STATS),), (len(STATS) + POSITION_SIZE,)), stats.shape
        vector = stats.new_zeros(len(cls.FIELDS) + len(stats) - len(STATS))
        vector[: len(STATS)] = stats[: len(STATS)]
        vector[len(cls.FIELDS) :] = stats[len(STATS) :]
        # Filled by kernels with the value as an argument: copying a host tensor to the device would wait for it.
        vector[len(STATS)].fill_(sequences)
        vector[len(STATS) + 1].fill_(tokens)
        return cls(vector)

    def __add__(self, other: StepSums) -> StepSums:
        return StepSums(self.vector + other.vector)

    def __getitem__(self, field: str) -> Tensor:
        """One sum, float64 0-d, still on the device."""
        return self.vector[self.FIELDS.index(field)]

    def denominator(self, normalize_by: NormalizeBy) -> Tensor:
        """What Σ w·l is divided by: float64, 0-d, still on the device."""
        return self[_denominator_field(normalize_by)]

    def metrics(self, normalize_by: NormalizeBy) -> dict[str, float]:
        """Every reported figure. One transfer to the host; a ratio over nothing is NaN.

        Returns:
            loss (nats, normalised as asked); unweighted_loss (nats), accuracy, logsumexp_mean and logsumexp_std over
            the scored tokens; and the sums supervised_tokens, scored_tokens, tokens, sequences and weight_sum.
        """
        total = dict(zip(self.FIELDS, self.vector[: len(self.FIELDS)].tolist(), strict=True))
        scored = total["scored_tokens"]
        mean = _ratio(total["logsumexp"], scored)
        variance = _ratio(total["logsumexp_squared"], scored) - mean * mean
        return {
            "loss": _ratio(total["weighted_loss"], total[_denominator_field(normalize_by)]),
            "unweighted_loss": _ratio(total["loss"], scored),
            "accuracy": _ratio(total["correct"], scored),
            "logsumexp_mean": mean,
            # The difference of two nearly equal numbers may round to just below zero; NaN must stay NaN.
            "logsumexp_std": math.sqrt(0.0 if variance < 0.0 else variance),
            "supervised_tokens": total["supervised_tokens"],
            "scored_tokens": scored,
            "tokens": total["tokens"],
            "sequences": total["sequences"],
            "weight_sum": total["weight"],
        }

    def positions(self) -> list[dict[str, Any]]:
        """The figures of every bucket of positions that holds tokens (`by_position`); none in training."""
        sums = self.vector[len(self.FIELDS) :].tolist()
        return by_position(sums) if sums else []


def _denominator_field(normalize_by: NormalizeBy) -> str:
    match normalize_by:
        case "tokens":
            return "supervised_tokens"
        case "weight":
            return "weight"
        case "sequences":
            return "sequences"
        case _:
            raise ValueError(f"normalize_by must be tokens, weight or sequences; got {normalize_by!r}")


def _ratio(numerator: float, denominator: float) -> float:
    return numerator / denominator if denominator else math.nan
