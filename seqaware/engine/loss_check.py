"""Before the first step of every run: the fused loss against the plain one, on a few rows of the run's own data.

The fused loss runs under DeepSpeed's hooks, on this device, in this dtype, with this head. A forward of the first
micro-batch brings its real hidden states to the loss; there a few tokens are scored by both.

Letters: N tokens, M ≤ 64 of them that are scored, H hidden size, V vocabulary.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from seqaware.data.collate import Batch
from seqaware.engine.engine import Engine
from seqaware.errors import ConfigError
from seqaware.models.model import LossTargets, output_head
from seqaware.objective.cross_entropy import IGNORED_LABEL, Head, plain_cross_entropy
from seqaware.objective.fused import fused_cross_entropy
from seqaware.objective.products import rounds_products

_TOKENS = 64
# A sum of H products in float32 is off by about ε‖h‖‖w‖ (its H roundings go either way), and ε‖h‖‖w‖ is what a logit's
# rounding does to a token's loss. A GPU's kernel may add up in other orders: eight of it, and no two tokens cancel.
_ROUNDINGS = 8.0


@dataclass(frozen=True)
class LossComparison:
    """The two losses over the same tokens of one rank: Σ w·l of each, and the distance of their gradients by hidden.

    loss_explained, gradient_explained: how far rounding may take them, absolute.
    """

    tokens: int
    fused: float
    plain: float
    loss_explained: float
    gradient_size: float
    gradient_error: float
    gradient_explained: float

    @property
    def holds(self) -> bool:
        """Whether rounding explains what was seen; NaN is never explained."""
        apart = abs(self.fused - self.plain)
        return apart <= self.loss_explained and self.gradient_error <= self.gradient_explained


def compare_losses(engine: Engine, batch: Batch) -> LossComparison | None:
    """Score up to 64 tokens of a micro-batch by the fused and by the plain loss, on every rank; the worst of the ranks.

    Collective: every rank must call it, with a micro-batch of its own. None where the run's loss is the plain one, or
    where no rank's micro-batch has a token with loss, or a plain loss that is finite: what is wrong then lies in the
    data or the weights, and the step itself will say so.
    """
    if engine.wrapped.loss_kernel == "plain":
        return None
    seen: list[LossComparison] = []

    def look(_: Any, inputs: tuple[Tensor, LossTargets]) -> None:
        # A hook before the loss's own forward, behind DeepSpeed's, which has made the head whole.
        with torch.enable_grad():
            seen.append(_compare(inputs[0], inputs[1], output_head(engine.wrapped.model)))

    hook = engine.wrapped.head_loss.register_forward_pre_hook(look)
    try:
        engine.evaluate_step([batch])
    finally:
        hook.remove()
    found = [each for each in engine.ranks.gather(seen[0]) if each.tokens and math.isfinite(each.plain)]
    return max(found, key=_badness, default=None)


def check_losses(engine: Engine, batch: Batch) -> None:
    """Stop the run where the fused loss is not the plain one. Collective, as `compare_losses`.

    Raises:
        ConfigError: on every rank, with both values.
    """
    seen = compare_losses(engine, batch)
    if seen is None or seen.holds:
        return
    raise ConfigError(
        "the fused loss differs from the plain one on the first rows of this run",
        got=(
            f"Σ w·l over {seen.tokens} tokens: fused {seen.fused:.8g}, plain {seen.plain:.8g} "
            f"(rounding explains {seen.loss_explained:.1e}); gradients {seen.gradient_error:.1e} apart "
            f"of {seen.gradient_size:.1e} (rounding explains {seen.gradient_explained:.1e})"
        ),
        do="write model.loss_kernel: plain, and report the model, device and dtype",
    )


def _compare(hidden_NH: Tensor, targets: LossTargets, head: Head) -> LossComparison:
    labels_N, weights_N = targets.labels.flatten(), targets.weights.flatten()
    chosen_M = ((labels_N != IGNORED_LABEL) & (weights_N != 0)).nonzero().squeeze(1)[:_TOKENS]
    few_N = torch.full_like(labels_N, IGNORED_LABEL)
    few_N[chosen_M] = labels_N[chosen_M]
    frozen = _detached(head)
    ours_NH = hidden_NH.detach().clone().requires_grad_()
    fused, _ = fused_cross_entropy(
        ours_NH,
        head=frozen,
        labels_N=few_N,
        weights_N=weights_N,
        rows=chosen_M,
        weights_are_positive=targets.weights_are_positive,
    )
    (ours_grad_NH,) = torch.autograd.grad(fused, ours_NH)
    # The reference takes the same rounded inputs on in float32.
    wide = _detached(head, torch.float32)
    plain_MH = hidden_NH.detach()[chosen_M].float().requires_grad_()
    plain, _ = plain_cross_entropy(plain_MH, head=wide, labels_N=labels_N[chosen_M], weights_N=weights_N[chosen_M])
    (plain_grad_MH,) = torch.autograd.grad(plain, plain_MH)
    plain_grad_NH = torch.zeros_like(ours_grad_NH, dtype=torch.float32).index_copy_(0, chosen_M, plain_grad_MH)

    weights_M = weights_N[chosen_M].double()
    largest_row = float(wide.weight.norm(dim=1).max())
    largest_hidden = float(plain_MH.detach().norm(dim=1).max()) if len(chosen_M) else 0.0
    logit_error = _ROUNDINGS * torch.finfo(torch.float32).eps * (1.0 + abs(head.scale) * largest_hidden * largest_row)
    gradient_size = float(plain_grad_MH.double().norm())
    # A probability is off by what its logit is, and the run's dtype rounds it once more; the gradient by hidden is made
    # of these times rows of the head, which may cancel, and rounded itself.
    eps = torch.finfo(head.weight.dtype).eps
    if rounds_products(head.weight.dtype, hidden_NH.device):
        # Half of eps in every logit, and a loss is the difference of two.
        logit_error += eps * abs(head.scale) * _largest_product(plain_MH, wide.weight)
    through_head = abs(head.scale) * largest_row * float(weights_M.norm())
    return LossComparison(
        tokens=len(chosen_M),
        fused=float(fused.detach()),
        plain=float(plain.detach()),
        loss_explained=logit_error * float(weights_M.sum()),
        gradient_size=gradient_size,
        gradient_error=float((ours_grad_NH.double() - plain_grad_NH.double()).norm()),
        gradient_explained=(logit_error + eps) * through_head + eps * gradient_size,
    )


def _largest_product(hidden_MH: Tensor, weight_VH: Tensor) -> float:
    return float((hidden_MH.detach() @ weight_VH.t()).abs().max()) if len(hidden_MH) else 0.0


def _detached(head: Head, dtype: torch.dtype | None = None) -> Head:
    def constant(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else tensor.detach().to(dtype or tensor.dtype)

    weight = constant(head.weight)
    assert weight is not None
    return replace(head, weight=weight, bias=constant(head.bias))


def _badness(seen: LossComparison) -> float:
    """How far beyond what rounding explains: the worst comes first, and NaN before all."""
    loss = abs(seen.fused - seen.plain) / seen.loss_explained
    worst = max(loss, seen.gradient_error / seen.gradient_explained)
    return worst if worst == worst else float("inf")
