"""Fused linear cross-entropy with a weight per token: head, softmax, loss and gradient in one pass over chunks of rows.

Letters: N rows (tokens), M rows that are multiplied, C rows of a chunk, H hidden size, V vocabulary.

The gradient of Σ w·l is known as soon as the logits are, so it is worked out in the forward, chunk by chunk:

    z = cap · tanh(scale · (h Wᵀ + b) / cap)      p = softmax(z)      l = logsumexp(z) − z_label
    dz = w · scale · (p − onehot(label)) · (1 − (z / cap)²)           (no cap: the last factor is 1)
    dh = dz W        dW += dzᵀ h        db += Σ dz

Three matrix products, as many as the plain loss needs, and what lies between them (`softmax_pass.py`), in buffers that
all chunks share. The backward multiplies by one number and reads no weight: a ZeRO-3 parameter needs to be whole in the
forward only. dW is added up in float32 (in bfloat16 the contributions of later chunks would be rounded away) and cast
once (`weight_gradient.py`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from seqaware.objective.cross_entropy import IGNORED_LABEL, Head, summarize
from seqaware.objective.positions import sums_by_position
from seqaware.objective.products import HeadProducts, wide_dtype
from seqaware.objective.softmax_pass import Rows, Setting, softmax_pass
from seqaware.objective.sums import STATS, LossStats
from seqaware.objective.weight_gradient import WeightGradient, graph_is_kept

# Bytes of a chunk's buffers. A chunk costs one read and one write of dW beside its matrix products: more rows hide that
# cost, fewer rows keep the memory low. GPUs multiply so much faster that they need more rows.
_CPU_CHUNK_BYTES = 64 * 2**20
_GPU_CHUNK_BYTES = 1250 * 10**6
_CPU_MOST_CHUNK_ROWS = 4096
_GPU_MOST_CHUNK_ROWS = 8192

# Rows of a GPU's chunk come in whole tiles of its products.
_GPU_TILE_ROWS = 128

# Rows whose gradient the backward brings to their places at once: it holds two copies of these only.
_BACKWARD_ROWS = 16384

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


@torch.no_grad()
def fused_by_position(
    hidden_NH: Tensor, *, head: Head, labels_N: Tensor, weights_N: Tensor, k_N: Tensor, rows: Tensor | None = None
) -> tuple[Tensor, LossStats]:
    """`fused_cross_entropy` without gradients, and with the sums by position behind its statistics.

    Args:
        k_N: integer, the position of each row's token. The others: as there.
    """
    scored = _scored_rows(labels_N, weights_N, rows, weights_are_positive=False)
    call = _Call(labels=labels_N, weights=weights_N, rows=scored, head=head, needs=_Needs(False, False, False))
    run = _Forward(hidden_NH.to(head.weight.dtype), head.weight, head.bias, call)
    run.all_chunks()
    loss_sum, stats = run.result()
    multiplied, k_M = run.scored, _select(k_N, scored)
    tail = sums_by_position(losses=multiplied.losses, weights=run.weights_M, correct=multiplied.correct, k=k_M)
    return loss_sum, torch.cat((stats, tail))


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
        # No saved tensor: it is gone as soon as it is handed on. Checkpointing round the loss does not drop it.
        ctx.grad_weight = run.grad_weight
        ctx.save_for_backward(run.grad_hidden_MH, run.grad_bias_V, run.unit)
        loss_sum, stats = run.result()
        ctx.mark_non_differentiable(stats)
        return loss_sum, stats

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor, _grad_stats: Tensor) -> tuple[Tensor | None, ...]:
        hidden_MH, bias_V, unit = ctx.saved_tensors
        factor = grad_loss if unit is None else grad_loss * unit
        grad_bias = None if bias_V is None else _scaled(bias_V, factor, ctx.dtype)
        grad_weight = None
        if ctx.grad_weight is not None:
            last = not graph_is_kept()
            grad_weight = ctx.grad_weight.handed_on(factor, last=last)
            if last:
                ctx.grad_weight = None
        if hidden_MH is None or ctx.rows is None:
            return None if hidden_MH is None else _scaled(hidden_MH, factor, ctx.dtype), grad_weight, grad_bias, None
        grad_hidden = hidden_MH.new_zeros(ctx.hidden_shape, dtype=ctx.dtype)
        for rows, part in zip(ctx.rows.split(_BACKWARD_ROWS), hidden_MH.split(_BACKWARD_ROWS), strict=True):
            grad_hidden.index_copy_(0, rows, _scaled(part, factor, ctx.dtype))
        return grad_hidden, grad_weight, grad_bias, None


class _Forward:
    """One forward: buffers that every chunk reuses, and what the chunks leave behind."""

    def __init__(self, hidden_NH: Tensor, weight: Tensor, bias: Tensor | None, call: _Call) -> None:
        self.call, self.hidden_NH = call, hidden_NH
        self.rows = len(hidden_NH) if call.rows is None else len(call.rows)
        tile_rows = 1 if weight.device.type == "cpu" else _GPU_TILE_ROWS
        self.chunk_rows = _even_chunk_rows(self.rows, _most_chunk_rows(weight), tile_rows=tile_rows)
        self.products = HeadProducts(weight, chunk_rows=self.chunk_rows)
        wide = wide_dtype(weight.dtype)

        self.labels_M = _select(call.labels, call.rows)
        self.weights_M = _select(call.weights, call.rows).to(wide)
        has_label = self.labels_M != IGNORED_LABEL
        factors_M = torch.where(has_label, self.weights_M * call.head.scale, 0.0)
        self.unit = _float16_unit(factors_M) if self.products.operand == torch.float16 else None

        # float16 gradients wait in float32 for the factor of the backward, which holds the loss scale.
        kept = wide if weight.dtype == torch.float16 else weight.dtype
        needs = call.needs
        self.grad_hidden_MH = hidden_NH.new_empty(self.rows, hidden_NH.shape[1], dtype=kept) if needs.hidden else None
        large = weight.numel() * weight.itemsize > _GPU_CHUNK_BYTES
        self.grad_weight = WeightGradient(weight, wide=wide, large=large) if needs.weight else None
        self.grad_bias_V = weight.new_zeros(len(weight), dtype=wide) if needs.bias else None
        self.scored = Rows(
            targets=torch.where(has_label, self.labels_M, 0),
            factors=factors_M if self.unit is None else factors_M / self.unit,
            losses=weight.new_zeros(self.rows, dtype=wide),
            logsumexp=weight.new_zeros(self.rows, dtype=wide),
            correct=weight.new_zeros(self.rows, dtype=torch.bool),
        )
        self.softmax = softmax_pass(
            Setting(
                products=self.products,
                rows=self.scored,
                head=call.head,
                bias=None if bias is None else bias.to(wide),
                grad_bias=self.grad_bias_V,
                chunk_rows=self.chunk_rows,
                wants_gradient=needs.any,
            )
        )

    def all_chunks(self) -> None:
        if self.grad_weight is not None and not self.rows:
            self.grad_weight.zero_()
        for start in range(0, self.rows, self.chunk_rows):
            self._chunk(slice(start, min(start + self.chunk_rows, self.rows)))

    def _chunk(self, chunk: slice) -> None:
        """Losses of one chunk and, where wanted, its share of the gradients."""
        rows = self.call.rows
        chosen_CH = self.hidden_NH[chunk] if rows is None else self.hidden_NH.index_select(0, rows[chunk])
        hidden_CH = chosen_CH.to(self.products.operand)
        grad_logits_CV = self.softmax.run(hidden_CH, chunk)
        if grad_logits_CV is None:
            return
        if self.grad_hidden_MH is not None:
            self.products.hidden_gradient(grad_logits_CV, out_CH=self.grad_hidden_MH[chunk])
        if self.grad_weight is not None:
            for words, part in self.grad_weight.parts:
                dz = grad_logits_CV[:, words]
                self.products.add_weight_gradient(dz, hidden_CH, sum_VH=part, first=chunk.start == 0)

    def result(self) -> tuple[Tensor, LossStats]:
        """The plain loss's formulas over the rows that were multiplied."""
        losses_M = torch.where(self.labels_M != IGNORED_LABEL, self.scored.losses, 0.0)
        stats = summarize(
            losses=losses_M,
            weights=self.weights_M,
            labels=self.labels_M,
            correct=self.scored.correct,
            logsumexp=self.scored.logsumexp,
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
    """Rows of a chunk: as many as the budget holds, and on a CPU so many that the products outweigh dW's traffic.

    A chunk of C rows does 2·C·V·H operations on dW and moves 2·V·H numbers; H rows make the [C, V] buffer as large as
    dW itself, which is memory that the gradient takes in any case. On a GPU the budget alone decides.
    """
    vocabulary, hidden_size = weight.shape
    if weight.device.type == "cpu":
        return max(_CPU_CHUNK_BYTES // (4 * vocabulary), min(hidden_size, _CPU_MOST_CHUNK_ROWS), 1)
    rows = min(_GPU_CHUNK_BYTES // (4 * vocabulary), _GPU_MOST_CHUNK_ROWS)
    return max(_GPU_TILE_ROWS, rows // _GPU_TILE_ROWS * _GPU_TILE_ROWS)


def _even_chunk_rows(rows: int, most: int, *, tile_rows: int) -> int:
    """Chunks of equal size, but for the rounding to whole tiles: a short last one would multiply at a bad shape."""
    chunks = max(1, -(-rows // most))
    even = -(-rows // chunks)
    return max(1, min(rows, -(-even // tile_rows) * tile_rows))


def _float16_unit(factors_M: Tensor) -> Tensor:
    """What dz is divided by, so that its largest entry is about _FLOAT16_UNIT; the backward multiplies by it again."""
    largest = torch.cat((factors_M.abs(), factors_M.new_zeros(1))).amax()
    return torch.where(largest > 0.0, largest / _FLOAT16_UNIT, 1.0)


def _scaled(gradient: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """gradient · factor, cast after: what a narrow dtype cannot hold now, it may hold then.

    Written into its dtype at once: on a GPU no float32 product, as large as dW, lies beside it.
    """
    return torch.mul(gradient, factor, out=torch.empty_like(gradient, dtype=dtype))
