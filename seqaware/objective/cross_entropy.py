"""Weighted cross-entropy, the plain way: the reference that the fused kernel is held against.

Letters: N rows (tokens, flattened), M rows that are scored, H hidden size, V vocabulary.

    z = cap · tanh(scale · (h Wᵀ + b) / cap)        (no cap: scale · (h Wᵀ + b))
    l = logsumexp(z) − z_label                       float32 at least, whatever the dtype of the model
    loss_sum = Σ w · l                               nothing is divided here: the denominator is the optimizer step's

A row is *supervised* when its label is not −100, and *scored* when its weight is not zero either. Rows that are not
scored add nothing to the loss, to the gradient, or to the means of the statistics.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from seqaware.objective.positions import sums_by_position
from seqaware.objective.sums import LossStats

IGNORED_LABEL = -100
"""The label of a row without loss."""


@dataclass(frozen=True, eq=False)
class Head:
    """The map from hidden states to logits: z = cap(scale · (h Wᵀ + b)).

    Attributes:
        weight: [V, H]; may be the (tied) input embedding.
        bias: [V].
        scale: factor on the logits (Cohere's logit_scale, 1 / Granite's logits_scaling).
        softcap: cap of cap · tanh(z / cap) (Gemma 2).
    """

    weight: Tensor
    bias: Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None

    def __post_init__(self) -> None:
        if self.softcap is not None and not self.softcap > 0.0:
            raise ValueError(f"a head's softcap must be positive; got {self.softcap}")

    def logits(self, hidden_NH: Tensor) -> Tensor:
        """Logits [N, V] in the dtype of the weight."""
        logits_NV = F.linear(hidden_NH.to(self.weight.dtype), self.weight, self.bias)
        if self.scale != 1.0:
            logits_NV = logits_NV * self.scale
        if self.softcap is not None:
            logits_NV = torch.tanh(logits_NV / self.softcap) * self.softcap
        return logits_NV


def cross_entropy_from_logits(
    logits_NV: Tensor, labels_N: Tensor, weights_N: Tensor, *, k_N: Tensor | None = None
) -> tuple[Tensor, LossStats]:
    """Σ w·l over rows of logits.

    With weights of exactly 1.0 the loss and its gradient are, bit for bit, those of
    `F.cross_entropy(logits.float(), labels, reduction="none").sum()`: multiplying by 1.0 rounds nothing.

    Args:
        logits_NV: any float dtype; upcast to float32 (float64 stays).
        labels_N: int64, already shifted; −100 where there is no loss.
        weights_N: float; constants, no gradient flows into them.
        k_N: integer, the position of each row's token: asks for the sums by position.

    Returns:
        loss_sum (0-d, float32 or float64, differentiable) and the statistics vector of `sums`.
    """
    logits_NV = logits_NV.to(torch.promote_types(logits_NV.dtype, torch.float32))
    weights_N = weights_N.detach().to(logits_NV.dtype)
    losses_N = F.cross_entropy(logits_NV, labels_N, reduction="none", ignore_index=IGNORED_LABEL)
    loss_sum = (losses_N * weights_N).sum()
    with torch.no_grad():
        correct_N = logits_NV.gather(1, labels_N.clamp(min=0).unsqueeze(1)).squeeze(1) == logits_NV.amax(-1)
        stats = summarize(
            losses=losses_N,
            weights=weights_N,
            labels=labels_N,
            correct=correct_N,
            logsumexp=torch.logsumexp(logits_NV, -1),
        )
        if k_N is not None:
            stats = torch.cat((stats, sums_by_position(losses=losses_N, weights=weights_N, correct=correct_N, k=k_N)))
    return loss_sum, stats


def plain_cross_entropy(
    hidden_NH: Tensor, *, head: Head, labels_N: Tensor, weights_N: Tensor
) -> tuple[Tensor, LossStats]:
    """Σ w·l with all logits [N, V] at once: obviously right, and heavy.

    Arguments and result as `cross_entropy_from_logits`; hidden_NH is [N, H], after the final norm.
    """
    return cross_entropy_from_logits(head.logits(hidden_NH), labels_N, weights_N)


def summarize(*, losses: Tensor, weights: Tensor, labels: Tensor, correct: Tensor, logsumexp: Tensor) -> LossStats:
    """The statistics vector of `sums` from one value per row, all [M]; no host sync.

    Args:
        losses: −log p(label); any finite value where there is no label.
        weights: w.
        labels: −100 where there is no loss.
        correct: bool, no logit is larger than the label's.
        logsumexp: log Σ exp z.
    """
    supervised = labels != IGNORED_LABEL
    scored = supervised & (weights != 0)
    weights = torch.where(supervised, weights, 0.0).double()
    losses, logsumexp = (torch.where(scored, x, 0.0).double() for x in (losses, logsumexp))
    columns = (
        losses * weights,
        losses,
        weights,
        supervised.double(),
        scored.double(),
        (correct & scored).double(),
        logsumexp,
        logsumexp.square(),
    )
    return torch.stack(columns).sum(-1)
