"""One pass over rows of logits on a GPU: softmax statistics, loss, and the weighted gradient by the logits.

Letters: B rows, V vocabulary.

    z = cap · tanh(scale · (x + b) / cap)      m = max z      s = Σ exp(z − m)
    loss = (m − z_label) + ln s                logsumexp = m + ln s
    dx = w · scale · (exp(z − m) / s − onehot(label)) · (1 − (z / cap)²)

A row is one program. It reads its logits once for m and s, which it keeps up to date block by block (Milakov and
Gimelshein, "Online normalizer calculation for softmax", 2018), and once more, last block first, for the gradient: what
was read last is what the cache still holds. Everything is worked out in float32. The gradient may be written over the
logits: in their places, or, where it is half as wide, over the second half of the row, so that what is written over has
been read already. Imported only where Triton is installed.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

# Columns that a program holds at once: 16 float32 a thread at 16 warps.
_MOST_COLUMNS = 8192
_MOST_WARPS = 16
_COLUMNS_OF_A_WARP = 512

# A thread loads and stores 16 bytes at once only where every mask ends at a multiple of this.
_PIECE = 16


@triton.jit
def _scores(row, columns, width, vocabulary, bias, scale, cap, HAS_BIAS: tl.constexpr, HAS_CAP: tl.constexpr):
    x = tl.load(row + columns, mask=columns < width, other=0.0)
    if HAS_BIAS:
        x += tl.load(bias + columns, mask=columns < vocabulary, other=0.0)
    x *= scale
    if HAS_CAP:
        # tanh by an exponential that cannot overflow; off by a rounding of 1, as a tanh near 1 is.
        shrunk = tl.exp(-2.0 * tl.abs(x) / cap)
        size = cap * (1.0 - shrunk) / (1.0 + shrunk)
        x = tl.where(x < 0.0, -size, size)
    return x


@triton.jit
def _rows_pass(
    logits,
    gradient,
    bias,
    targets,
    factors,
    losses,
    logsumexps,
    correct,
    vocabulary,
    width,
    logits_stride,
    gradient_stride,
    scale,
    cap,
    HAS_BIAS: tl.constexpr,
    HAS_CAP: tl.constexpr,
    WANTS_GRADIENT: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    index = tl.program_id(0)
    row = logits + index.to(tl.int64) * logits_stride
    target = tl.load(targets + index)
    # Before anything is written over it.
    z_target = _scores(row, target, width, vocabulary, bias, scale, cap, HAS_BIAS, HAS_CAP)

    largest = -float("inf")
    total = 0.0
    blocks = tl.cdiv(vocabulary, COLUMNS)
    for block in range(0, blocks):
        columns = block * COLUMNS + tl.arange(0, COLUMNS)
        z = _scores(row, columns, width, vocabulary, bias, scale, cap, HAS_BIAS, HAS_CAP)
        z = tl.where(columns < vocabulary, z, -float("inf"))
        larger = tl.maximum(largest, tl.max(z, 0))
        # Where nothing but −∞ was seen yet, −∞ − (−∞) must not make a NaN of it.
        base = tl.where(larger == -float("inf"), 0.0, larger)
        total = total * tl.exp(largest - base) + tl.sum(tl.exp(z - base), 0)
        largest = larger
    surplus = tl.log(total)
    tl.store(losses + index, (largest - z_target) + surplus)
    tl.store(logsumexps + index, largest + surplus)
    tl.store(correct + index, (z_target >= largest).to(tl.uint8))

    if WANTS_GRADIENT:
        factor = tl.load(factors + index)
        share = 1.0 / total
        written = gradient + index.to(tl.int64) * gradient_stride
        for step in range(0, blocks):
            columns = (blocks - 1 - step) * COLUMNS + tl.arange(0, COLUMNS)
            z = _scores(row, columns, width, vocabulary, bias, scale, cap, HAS_BIAS, HAS_CAP)
            # A narrow gradient lies over later columns, and over some of these: all threads read before one writes.
            tl.debug_barrier()
            p = tl.exp(z - largest) * share
            # p − 1 before the weight multiplies: the difference is exact where p is near 1.
            d = tl.where(columns == target, p - 1.0, p) * factor
            if HAS_CAP:
                d *= 1.0 - (z / cap) * (z / cap)
            tl.store(written + columns, d.to(gradient.dtype.element_ty), mask=columns < width)


def rows_pass(
    logits_BV: Tensor,
    gradient_BV: Tensor | None,
    *,
    bias_V: Tensor | None,
    scale: float,
    softcap: float | None,
    rows: tuple[Tensor, Tensor, Tensor, Tensor, Tensor],
) -> None:
    """Run the pass over B rows of logits. Launched on the current stream; nothing waits for it.

    Args:
        logits_BV: float32; rows may lie apart, a row's columns may not.
        gradient_BV: where the gradient goes, of any float dtype; may be `logits_BV` itself, or 16-bit and the second
            half of its rows; None for none. What lies between its rows, up to a multiple of 16 columns, is overwritten.
        bias_V: float32.
        scale: factor on the logits. softcap: see `Head`.
        rows: five tensors [B]: labels (int64, in [0, V)) and w · scale (float32) are read; losses and logsumexp
            (float32) and "no logit is larger than the label's" (uint8) are written.
    """
    count, vocabulary = logits_BV.shape
    if not count:
        return
    assert logits_BV.dtype == torch.float32 and logits_BV.stride(1) == 1
    columns = min(_MOST_COLUMNS, triton.next_power_of_2(vocabulary))
    written_BV = logits_BV if gradient_BV is None else gradient_BV
    labels, factors, losses, logsumexps, correct = rows
    with torch.cuda.device_of(logits_BV):
        _rows_pass[(count,)](
            logits_BV,
            written_BV,
            logits_BV if bias_V is None else bias_V,
            labels,
            factors,
            losses,
            logsumexps,
            correct,
            vocabulary,
            _width(vocabulary, min(logits_BV.stride(0), written_BV.stride(0))),
            logits_BV.stride(0),
            written_BV.stride(0),
            scale,
            1.0 if softcap is None else softcap,
            HAS_BIAS=bias_V is not None,
            HAS_CAP=softcap is not None,
            WANTS_GRADIENT=gradient_BV is not None,
            COLUMNS=columns,
            num_warps=max(1, min(_MOST_WARPS, columns // _COLUMNS_OF_A_WARP)),
        )


def _width(vocabulary: int, stride: int) -> int:
    """Columns of a row that are read and written: whole pieces, where the rows lie far enough apart for that."""
    whole = -(-vocabulary // _PIECE) * _PIECE
    return whole if whole <= stride else vocabulary
