"""Fused linear cross-entropy with a weight per token: head, softmax, loss and gradient in one pass over chunks of rows.

Letters: N rows (tokens), M rows that are multiplied, C rows of a chunk, H hidden size, V vocabulary.

The gradient of Σ w·l is known as soon as the logits are, so it is worked out in the forward, chunk by chunk:

    z = cap · tanh(scale · (h Wᵀ + b) / cap)      p = softmax(z)      l = logsumexp(z) − z_label
    dz = w · scale · (p − onehot(label)) · (1 − (z / cap)²)           (no cap: the last factor is 1)
    dh = dz W        dW += dzᵀ h        db += Σ dz

Three matrix products, as many as the plain loss needs, and one [C, V] buffer that is logits, then probabilities, then
gradient. The backward multiplies by one number and reads no weight: a ZeRO-3 parameter needs to be whole in the forward
only. dW is added up in float32 (in bfloat16 the contributions of later chunks would be rounded away) and cast once.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from seqaware.objective.cross_entropy import IGNORED_LABEL, Head, summarize
from seqaware.objective.products import HeadProducts, wide_dtype
from seqaware.objective.sums import STATS, LossStats

# Bytes of the float32 [C, V] buffer. A chunk costs one read and one write of dW beside its matrix products: more rows
# hide that cost, fewer rows keep the memory low. GPUs multiply so much faster that they need more rows.
_CPU_CHUNK_BYTES = 64 * 2**20
_GPU_CHUNK_BYTES = 512 * 2**20
_MOST_CHUNK_ROWS = 4096

# A CPU walks the rows of a chunk in blocks that stay in its cache between the passes of softmax and gradient.
_CPU_BLOCK_BYTES = 2 * 2**20

# Largest |dz| in float16, a power of two: far below overflow (65504), and what rounds to 0 is below 1e-10 of it.
_FLOAT16_UNIT = 1024.0


def fused_cross_entropy(
    hidden_NH: Tensor,
    *,
    head: Head,
    labels_N: Tensor,
    weights_N: Tensor,
    rows: Tensor | None = None,
    weights_are_positive: bool = False,
) -> tuple[Tensor, LossStats]:
    """Σ w·l of the head's cross-entropy, without ever holding the logits of all rows.

    Args:
        hidden_NH: after the final norm; cast to the head's dtype if it has another.
        head: weight, bias, scale and softcap; the weight may be tied to the input embedding, or frozen.
        labels_N: int64, already shifted; −100 where there is no loss.
        weights_N: float; constants, no gradient flows into them.
        rows: int64, distinct; the rows that have a label, when the caller knows them. None finds them. Those of
            weight zero are never multiplied; telling which they are waits for a GPU, once.
        weights_are_positive: no row in `rows` has weight zero: all of them are taken, and nothing waits.

    Returns:
        loss_sum (0-d, float32 or float64, differentiable by hidden and head) and the statistics vector of `sums`.
        With no row to multiply the loss is 0 and every gradient is a zero, not absent: ranks stay in step.
    """
    assert hidden_NH.ndim == 2 and labels_N.shape == weights_N.shape == hidden_NH.shape[:1]
    hidden_NH = hidden_NH.to(head.weight.dtype)
    differentiable = [
        tensor is not None and tensor.requires_grad and torch.is_grad_enabled()
        for tensor in (hidden_NH, head.weight, head.bias)
    ]
    call = _Call(
        labels=labels_N,
        weights=weights_N.detach(),
        rows=_scored_rows(labels_N, weights_N, rows, weights_are_positive=weights_are_positive),
        head=head,
        needs=_Needs(*differentiable),
    )
    result: tuple[Tensor, LossStats] = _FusedCrossEntropy.apply(hidden_NH, head.weight, head.bias, call)  # type: ignore[no-untyped-call]
    return result


@dataclass(frozen=True)
class _Needs:
    """Which gradients are wanted. Not asked of autograd: inside no_grad it still reports what a leaf requires."""

    hidden: bool
    weight: bool
    bias: bool

    @property
    def any(self) -> bool:
        return self.hidden or self.weight or self.bias


@dataclass(frozen=True, eq=False)
class _Call:
    """What does not take part in differentiation."""

    labels: Tensor  # [N]
    weights: Tensor  # [N]
    rows: Tensor | None  # [M]; None: every row
    head: Head
    needs: _Needs


class _FusedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden_NH: Tensor, weight: Tensor, bias: Tensor | None, call: _Call) -> tuple[Tensor, Tensor]:
        run = _Forward(hidden_NH, weight, bias, call)
        run.all_chunks()
        ctx.rows, ctx.hidden_shape, ctx.dtype = call.rows, hidden_NH.shape, weight.dtype
        ctx.save_for_backward(run.grad_hidden_MH, run.grad_weight_VH, run.grad_bias_V, run.unit)
        loss_sum, stats = run.result()
        ctx.mark_non_differentiable(stats)
        return loss_sum, stats

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor, _grad_stats: Tensor) -> tuple[Tensor | None, ...]:
        *gradients, unit = ctx.saved_tensors
        factor = grad_loss if unit is None else grad_loss * unit
        # The factor multiplies before the cast: what a narrow dtype cannot hold now, it may hold after.
        grad_hidden, grad_weight, grad_bias = (
            None if gradient is None else (gradient * factor).to(ctx.dtype) for gradient in gradients
        )
        if grad_hidden is not None and ctx.rows is not None:
            everywhere = grad_hidden.new_zeros(ctx.hidden_shape)
            grad_hidden = everywhere.index_copy_(0, ctx.rows, grad_hidden)
        return grad_hidden, grad_weight, grad_bias, None


class _Forward:
    """One forward: buffers that every chunk reuses, and what the chunks leave behind."""

    def __init__(self, hidden_NH: Tensor, weight: Tensor, bias: Tensor | None, call: _Call) -> None:
        self.call, self.hidden_NH = call, hidden_NH
        self.rows = len(hidden_NH) if call.rows is None else len(call.rows)
        self.chunk_rows = _even_chunk_rows(self.rows, _most_chunk_rows(weight))
        self.block_rows = _block_rows(weight, self.chunk_rows)
        self.products = HeadProducts(weight, chunk_rows=self.chunk_rows)
        wide = wide_dtype(weight.dtype)
        self.bias_V = None if bias is None else bias.to(wide)

        self.labels_M = _select(call.labels, call.rows)
        self.weights_M = _select(call.weights, call.rows).to(wide)
        has_label = self.labels_M != IGNORED_LABEL
        self.targets_M1 = torch.where(has_label, self.labels_M, 0).unsqueeze(-1)
        self.factors_M1 = torch.where(has_label, self.weights_M * call.head.scale, 0.0).unsqueeze(-1)
        self.unit: Tensor | None = None
        if self.products.operand == torch.float16:
            self._bring_into_range()

        # float16 gradients wait in float32 for the factor of the backward, which holds the loss scale.
        kept = wide if weight.dtype == torch.float16 else weight.dtype
        needs = call.needs
        self.grad_hidden_MH = hidden_NH.new_empty(self.rows, hidden_NH.shape[1], dtype=kept) if needs.hidden else None
        self.grad_weight_VH = weight.new_zeros(weight.shape, dtype=wide) if needs.weight else None
        self.grad_bias_V = weight.new_zeros(len(weight), dtype=wide) if needs.bias else None
        self.losses_M = weight.new_zeros(self.rows, dtype=wide)
        self.logsumexp_M = weight.new_zeros(self.rows, dtype=wide)
        self.correct_M = weight.new_zeros(self.rows, dtype=torch.bool)

    def _bring_into_range(self) -> None:
        """Scale dz so that its largest entry is about _FLOAT16_UNIT; the backward multiplies by `unit` again."""
        largest = torch.cat((self.factors_M1.abs().flatten(), self.factors_M1.new_zeros(1))).amax()
        self.unit = torch.where(largest > 0.0, largest / _FLOAT16_UNIT, 1.0)
        self.factors_M1 = self.factors_M1 / self.unit

    def all_chunks(self) -> None:
        buffer_CV = self.losses_M.new_empty(self.chunk_rows, len(self.products))
        for start in range(0, self.rows, self.chunk_rows):
            chunk = slice(start, min(start + self.chunk_rows, self.rows))
            self._chunk(chunk, buffer_CV[: chunk.stop - start])

    def _chunk(self, chunk: slice, buffer_CV: Tensor) -> None:
        """Losses of one chunk and, where wanted, its share of the gradients. The buffer changes its meaning twice."""
        call = self.call
        chosen_CH = self.hidden_NH[chunk] if call.rows is None else self.hidden_NH.index_select(0, call.rows[chunk])
        hidden_CH = chosen_CH.to(self.products.operand)
        self.products.logits(hidden_CH, out_CV=buffer_CV)
        slope_CV = self._cap(buffer_CV)
        for start in range(0, len(buffer_CV), self.block_rows):
            block_BV = buffer_CV[start : start + self.block_rows]
            first = chunk.start + start
            self._softmax_gradient(block_BV, slice(first, first + len(block_BV)))
        if not call.needs.any:
            return
        if slope_CV is not None:
            buffer_CV.mul_(slope_CV)
        if self.grad_bias_V is not None:
            self.grad_bias_V.add_(buffer_CV.sum(0))
        grad_logits_CV = self.products.as_operand(buffer_CV)
        if self.grad_hidden_MH is not None:
            self.products.hidden_gradient(grad_logits_CV, out_CH=self.grad_hidden_MH[chunk])
        if self.grad_weight_VH is not None:
            self.products.add_weight_gradient(grad_logits_CV, hidden_CH, sum_VH=self.grad_weight_VH)

    def _cap(self, logits_CV: Tensor) -> Tensor | None:
        """h Wᵀ to z, in place; returns the slope of the soft cap [C, V] where a gradient will need it."""
        head = self.call.head
        if self.bias_V is not None:
            logits_CV.add_(self.bias_V)
        if head.softcap is None:
            if head.scale != 1.0:
                logits_CV.mul_(head.scale)
            return None
        logits_CV.mul_(head.scale / head.softcap).tanh_()
        slope_CV = 1.0 - logits_CV.square() if self.call.needs.any else None
        logits_CV.mul_(head.softcap)
        return slope_CV

    def _softmax_gradient(self, logits_BV: Tensor, block: slice) -> None:
        """z to p to dz (but for the slope of a cap), in place; losses and statistics of the rows on the way."""
        targets_B1 = self.targets_M1[block]
        target_B = logits_BV.gather(1, targets_B1).squeeze(1)
        largest_B = logits_BV.amax(-1)
        # Into its own input: every row is reduced before any of its places is written.
        torch.softmax(logits_BV, -1, out=logits_BV)
        # The largest probability is 1 / Σ exp(z − max): at least 1 / V, so its logarithm is safe.
        surplus_B = -logits_BV.amax(-1).log()
        self.losses_M[block] = (largest_B - target_B) + surplus_B
        self.logsumexp_M[block] = largest_B + surplus_B
        self.correct_M[block] = target_B == largest_B
        if self.call.needs.any:
            # p − 1 at the label before the weight multiplies: the difference is exact where p is near 1.
            logits_BV.scatter_(1, targets_B1, logits_BV.gather(1, targets_B1) - 1.0)
            logits_BV.mul_(self.factors_M1[block])

    def result(self) -> tuple[Tensor, LossStats]:
        """The plain loss's formulas over the rows that were multiplied."""
        losses_M = torch.where(self.labels_M != IGNORED_LABEL, self.losses_M, 0.0)
        stats = summarize(
            losses=losses_M,
            weights=self.weights_M,
            labels=self.labels_M,
            correct=self.correct_M,
            logsumexp=self.logsumexp_M,
        )
        # Tokens of weight zero were not multiplied, but they are supervised: the step's denominator counts them.
        stats[STATS.index("supervised_tokens")] = (self.call.labels != IGNORED_LABEL).sum()
        return (losses_M * self.weights_M).sum(), stats


def _scored_rows(
    labels_N: Tensor, weights_N: Tensor, rows: Tensor | None, *, weights_are_positive: bool
) -> Tensor | None:
    """Indices of the rows to multiply; None for all of them."""
    if rows is not None and weights_are_positive:
        scored = rows
    else:
        scored_N = (labels_N != IGNORED_LABEL) & (weights_N != 0)
        scored = scored_N.nonzero().squeeze(1) if rows is None else rows[scored_N[rows]]
    return None if len(scored) == len(labels_N) else scored


def _select(values_N: Tensor, rows: Tensor | None) -> Tensor:
    return values_N if rows is None else values_N.index_select(0, rows)


def _most_chunk_rows(weight: Tensor) -> int:
    """Rows of a chunk: as many as the budget holds, and at least so many that the products outweigh dW's traffic.

    A chunk of C rows does 2·C·V·H operations on dW and moves 2·V·H numbers; H rows make the [C, V] buffer as large as
    dW itself, which is memory that the gradient takes in any case.
    """
    vocabulary, hidden_size = weight.shape
    budget = _CPU_CHUNK_BYTES if weight.device.type == "cpu" else _GPU_CHUNK_BYTES
    return max(budget // (4 * vocabulary), min(hidden_size, _MOST_CHUNK_ROWS), 1)


def _even_chunk_rows(rows: int, most: int) -> int:
    """Chunks of equal size: a short last one would multiply at a bad shape."""
    chunks = max(1, -(-rows // most))
    return max(1, -(-rows // chunks))


def _block_rows(weight: Tensor, chunk_rows: int) -> int:
    """Rows that softmax and gradient are worked out for at once; on a GPU all of a chunk, for few large kernels."""
    if weight.device.type != "cpu":
        return chunk_rows
    return max(1, _CPU_BLOCK_BYTES // (4 * len(weight)))
