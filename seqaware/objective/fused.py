"""Fused linear cross-entropy with a weight per token: head, softmax, loss and gradient in one pass over chunks of rows.

Letters: N rows (tokens), M rows that are multiplied, C rows of a chunk, H hidden size, V vocabulary.

The gradient of Σ w·l is known as soon as the logits are, so it is worked out in the forward, chunk by chunk:

    z = cap · tanh(scale · (h Wᵀ + b) / cap)      p = softmax(z)      l = logsumexp(z) − z_label
    dz = w · scale · (p − onehot(label)) · (1 − (z / cap)²)           (no cap: the last factor is 1)
    dh = dz W        dW += dzᵀ h        db += Σ dz

Three matrix products, as many as the plain loss needs, and one [C, V] buffer that is logits, then probabilities, then
gradient. The backward multiplies by one number and reads no weight: a ZeRO-3 parameter needs to be whole in the forward
only. dW is added up in float32 (in bfloat16 the small contributions of later chunks would be rounded away) and cast once.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from seqaware.objective.cross_entropy import IGNORED_LABEL, Head, summarize
from seqaware.objective.sums import LossStats

# Bytes of the float32 [C, V] buffer. A chunk costs one read and one write of dW beside its matrix products: more rows
# hide that cost, fewer rows keep the memory low. GPUs multiply so much faster that they need more rows.
_CPU_CHUNK_BYTES = 128 * 2**20
_GPU_CHUNK_BYTES = 512 * 2**20

# Largest |dz| in float16, a power of two: far from overflow (65504), and its rounding begins at 6e-11 of it.
_HALF_UNIT = 1024.0


def fused_cross_entropy(
    hidden_NH: Tensor,
    *,
    head: Head,
    labels_N: Tensor,
    weights_N: Tensor,
    rows: Tensor | None = None,
    chunk_rows: int | None = None,
) -> tuple[Tensor, LossStats]:
    """Σ w·l of the head's cross-entropy, without ever holding the logits of all rows.

    Args:
        hidden_NH: after the final norm; cast to the head's dtype if it has another.
        head: weight, bias, scale and softcap; the weight may be tied to the input embedding, or frozen.
        labels_N: int64, already shifted; −100 where there is no loss.
        weights_N: float; constants, no gradient flows into them.
        rows: int64 [M], distinct indices of the rows with a label, when the caller knows them: finding them on a GPU
            waits for the device. None finds them.
        chunk_rows: rows of a chunk; None chooses.

    Returns:
        loss_sum (0-d, float32 or float64, differentiable by hidden and head) and the statistics vector of `sums`.
        With no row to multiply the loss is 0 and every gradient is a zero, not absent: ranks stay in step.
    """
    assert hidden_NH.ndim == 2 and labels_N.shape == weights_N.shape == hidden_NH.shape[:1]
    weights_N = weights_N.detach()
    hidden_NH = hidden_NH.to(head.weight.dtype)
    inputs = (hidden_NH, head.weight, head.bias)
    if torch.is_grad_enabled():
        needs = tuple(tensor is not None and tensor.requires_grad for tensor in inputs)
    else:
        needs = (False, False, False)
    call = _Call(
        labels_N=labels_N,
        weights_N=weights_N,
        rows=_scored_rows(labels_N, weights_N, rows),
        scale=head.scale,
        softcap=head.softcap,
        chunk_rows=chunk_rows,
        needs=(needs[0], needs[1], needs[2]),
    )
    result: tuple[Tensor, LossStats] = _FusedCrossEntropy.apply(*inputs, call)  # type: ignore[no-untyped-call]
    return result


@dataclass(frozen=True, eq=False)
class _Call:
    """What does not take part in differentiation."""

    labels_N: Tensor
    weights_N: Tensor
    rows: Tensor | None  # None: every row
    scale: float
    softcap: float | None
    chunk_rows: int | None
    needs: tuple[bool, bool, bool]  # gradient of hidden, weight, bias


class _FusedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden_NH: Tensor, weight: Tensor, bias: Tensor | None, call: _Call) -> tuple[Tensor, Tensor]:
        chunks = _Chunks(hidden_NH, weight, bias, call)
        chunks.run()
        ctx.rows, ctx.hidden_shape, ctx.dtype = call.rows, hidden_NH.shape, weight.dtype
        ctx.save_for_backward(chunks.grad_hidden_MH, chunks.grad_weight_VH, chunks.grad_bias_V, chunks.unit)
        loss_sum, stats = chunks.result()
        ctx.mark_non_differentiable(stats)
        return loss_sum, stats

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, grad_loss: Tensor, _grad_stats: Tensor) -> tuple[Tensor | None, ...]:
        grad_hidden_MH, grad_weight_VH, grad_bias_V, unit = ctx.saved_tensors
        factor = grad_loss if unit is None else grad_loss * unit
        # The factor multiplies before the cast: what is too small or too large for the dtype may not be so after it.
        grad_weight, grad_bias = (
            None if grad is None else (grad * factor).to(ctx.dtype) for grad in (grad_weight_VH, grad_bias_V)
        )
        if grad_hidden_MH is None:
            return None, grad_weight, grad_bias, None
        grad_hidden = (grad_hidden_MH * factor).to(ctx.dtype)
        if ctx.rows is not None:
            everywhere = grad_hidden.new_zeros(ctx.hidden_shape)
            grad_hidden = everywhere.index_copy_(0, ctx.rows, grad_hidden)
        return grad_hidden, grad_weight, grad_bias, None


class _Chunks:
    """One forward: the buffers that every chunk reuses, and what the chunks leave behind."""

    def __init__(self, hidden_NH: Tensor, weight: Tensor, bias: Tensor | None, call: _Call) -> None:
        self.call = call
        self.hidden_NH = hidden_NH
        device, operand = weight.device, _operand_dtype(weight.dtype, weight.device)
        self.accumulator = torch.promote_types(weight.dtype, torch.float32)
        self.weight_VH = weight.to(operand)
        self.bias_V = None if bias is None else bias.to(self.accumulator)
        self.direct = operand == self.accumulator or _multiplies_into_float32(operand, device)
        self.rows_total = len(hidden_NH) if call.rows is None else len(call.rows)
        vocabulary, hidden_size = weight.shape
        self.chunk_rows = call.chunk_rows or _chunk_rows(
            self.rows_total, vocabulary=vocabulary, hidden_size=hidden_size, device=device
        )
        rows = min(self.chunk_rows, self.rows_total)
        wide = {"dtype": self.accumulator, "device": device}
        self.logits_CV = torch.empty(rows, vocabulary, **wide)
        narrow = operand != self.accumulator
        self.operand_CV = torch.empty(rows, vocabulary, dtype=operand, device=device) if narrow else None
        needs_hidden, needs_weight, needs_bias = call.needs
        capped = call.softcap is not None and any(call.needs)
        self.slope_CV = torch.empty_like(self.logits_CV) if capped else None
        # float16 gradients wait for the loss scale of the backward in float32; their range is too short otherwise.
        kept = self.accumulator if weight.dtype == torch.float16 else weight.dtype
        shape_MH = (self.rows_total, hidden_size)
        self.grad_hidden_MH = torch.empty(shape_MH, dtype=kept, device=device) if needs_hidden else None
        self.grad_weight_VH = torch.zeros(weight.shape, **wide) if needs_weight else None
        self.grad_bias_V = torch.zeros(vocabulary, **wide) if needs_bias else None
        self.labels_M = _select(call.labels_N, call.rows)
        self.weights_M = _select(call.weights_N, call.rows).to(self.accumulator)
        self.losses_M, self.logsumexp_M = (torch.empty(self.rows_total, **wide) for _ in range(2))
        self.correct_M = torch.empty(self.rows_total, dtype=torch.bool, device=device)
        has_label = self.labels_M != IGNORED_LABEL
        self.targets_M1 = torch.where(has_label, self.labels_M, 0).unsqueeze(-1)
        self.slopes_M1 = torch.where(has_label, self.weights_M * call.scale, 0.0).unsqueeze(-1)
        self.unit = self._lift() if operand == torch.float16 else None

    def _lift(self) -> Tensor:
        """Bring |dz| to at most _HALF_UNIT and return the factor (0-d) that takes it back."""
        largest = self.slopes_M1.abs().amax() if self.rows_total else self.slopes_M1.sum()
        unit = torch.where(largest > 0.0, largest / _HALF_UNIT, 1.0)
        self.slopes_M1 = self.slopes_M1 / unit
        return unit

    def run(self) -> None:
        for start in range(0, self.rows_total, self.chunk_rows):
            chunk = slice(start, min(start + self.chunk_rows, self.rows_total))
            hidden_CH = self._hidden(chunk)
            logits_CV = self._logits(hidden_CH)
            slope_CV = self._cap(logits_CV)
            self._softmax(logits_CV, chunk)
            if any(self.call.needs):
                self._gradients(logits_CV, slope_CV, hidden_CH, chunk)

    def result(self) -> tuple[Tensor, LossStats]:
        """The same formulas as the plain loss, over the rows that were multiplied."""
        labels_M, weights_M = self.labels_M, self.weights_M
        losses_M = torch.where(labels_M != IGNORED_LABEL, self.losses_M, 0.0)
        stats = summarize(
            losses=losses_M, weights=weights_M, labels=labels_M, correct=self.correct_M, logsumexp=self.logsumexp_M
        )
        return (losses_M * weights_M).sum(), stats
