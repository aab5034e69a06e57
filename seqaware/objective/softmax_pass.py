"""Between the products of a chunk: hidden states to logits to losses, and to the gradient by the logits.

Letters: M rows, C rows of a chunk, B rows of a block, H hidden size, V vocabulary.

`TorchPass` runs anywhere: logits of the whole chunk, softmax and gradient in place, in blocks that stay in a CPU's
cache. `TritonPass` runs on a GPU: logits of the whole chunk in float32, and one kernel that turns them into losses and
the gradient, in the dtype that is multiplied next and in the same memory: a narrow gradient takes the second half of
its row of logits.
"""

from __future__ import annotations

import importlib.util
import subprocess
import warnings
from dataclasses import dataclass
from functools import cache
from typing import Protocol

import torch
from torch import Tensor

from seqaware.objective.cross_entropy import Head
from seqaware.objective.products import HeadProducts

# A CPU walks the rows of a chunk in blocks that stay in its cache between the passes of softmax and gradient.
_CPU_BLOCK_BYTES = 2 * 2**20

# A row of a buffer begins at a multiple of so many elements, whatever the vocabulary: products and kernels then read it
# in their widest pieces.
_ROW_ALIGNMENT = 64


@dataclass(frozen=True, eq=False)
class Rows:
    """What a pass reads of each row, and what it leaves; all [M].

    Attributes:
        targets: int64, the label; 0 where there is none.
        factors: w · scale; 0 where there is no label.
        losses, logsumexp: written, wide. correct: written, bool.
    """

    targets: Tensor
    factors: Tensor
    losses: Tensor
    logsumexp: Tensor
    correct: Tensor


@dataclass(frozen=True, eq=False)
class Setting:
    """What a pass works with, the same for all chunks of a call.

    Attributes:
        head: its scale and softcap are read; its weight is in `products`.
        bias: [V], wide, or None. grad_bias: [V], wide, added to, or None.
        wants_gradient: whether the gradient by the logits is needed.
    """

    products: HeadProducts
    rows: Rows
    head: Head
    bias: Tensor | None
    grad_bias: Tensor | None
    chunk_rows: int
    wants_gradient: bool


class SoftmaxPass(Protocol):
    """Losses and statistics of the rows of a chunk, and dz [C, V] in the dtype of the products' operands."""

    def run(self, hidden_CH: Tensor, chunk: slice) -> Tensor | None:
        """The result is a buffer, valid until the next call; None where no gradient is wanted."""


class TorchPass:
    """Operations of torch on one wide [C, V] buffer that is logits, then probabilities, then gradient."""

    def __init__(self, setting: Setting) -> None:
        self.setting = setting
        rows = setting.rows
        self._buffer_CV = rows.losses.new_empty(setting.chunk_rows, len(setting.products))
        self._targets_M1, self._factors_M1 = rows.targets.unsqueeze(-1), rows.factors.unsqueeze(-1)
        self._block_rows = setting.chunk_rows
        if rows.losses.device.type == "cpu":
            self._block_rows = max(1, _CPU_BLOCK_BYTES // (4 * len(setting.products)))

    def run(self, hidden_CH: Tensor, chunk: slice) -> Tensor | None:
        setting = self.setting
        buffer_CV = self._buffer_CV[: len(hidden_CH)]
        setting.products.logits(hidden_CH, out_CV=buffer_CV)
        slope_CV = self._cap(buffer_CV)
        for start in range(0, len(buffer_CV), self._block_rows):
            block_BV = buffer_CV[start : start + self._block_rows]
            first = chunk.start + start
            self._softmax_gradient(block_BV, slice(first, first + len(block_BV)))
        if not setting.wants_gradient:
            return None
        if slope_CV is not None:
            buffer_CV.mul_(slope_CV)
        if setting.grad_bias is not None:
            setting.grad_bias.add_(buffer_CV.sum(0))
        return setting.products.as_operand(buffer_CV)

    def _cap(self, logits_CV: Tensor) -> Tensor | None:
        """h Wᵀ to z, in place; returns the slope of the soft cap [C, V] where a gradient will need it."""
        head = self.setting.head
        if self.setting.bias is not None:
            logits_CV.add_(self.setting.bias)
        if head.softcap is None:
            if head.scale != 1.0:
                logits_CV.mul_(head.scale)
            return None
        logits_CV.mul_(head.scale / head.softcap).tanh_()
        slope_CV = 1.0 - logits_CV.square() if self.setting.wants_gradient else None
        logits_CV.mul_(head.softcap)
        return slope_CV

    def _softmax_gradient(self, logits_BV: Tensor, block: slice) -> None:
        """z to p to dz (but for the slope of a cap), in place; losses and statistics of the rows on the way."""
        rows, targets_B1 = self.setting.rows, self._targets_M1[block]
        target_B = logits_BV.gather(1, targets_B1).squeeze(1)
        largest_B = logits_BV.amax(-1)
        # Into its own input: every row is reduced before any of its places is written.
        torch.softmax(logits_BV, -1, out=logits_BV)
        # The largest probability is 1 / Σ exp(z − max): at least 1 / V, so its logarithm is safe.
        surplus_B = -logits_BV.amax(-1).log()
        rows.losses[block] = (largest_B - target_B) + surplus_B
        rows.logsumexp[block] = largest_B + surplus_B
        rows.correct[block] = target_B == largest_B
        if self.setting.wants_gradient:
            # p − 1 at the label before the weight multiplies: the difference is exact where p is near 1.
            logits_BV.scatter_(1, targets_B1, logits_BV.gather(1, targets_B1) - 1.0)
            logits_BV.mul_(self._factors_M1[block])


class TritonPass:
    """One product and one kernel a chunk. The gradient lies over the logits, in their place or their second half."""

    def __init__(self, setting: Setting) -> None:
        self.setting = setting
        products, device = setting.products, setting.rows.losses.device
        stride = -(-len(products) // _ROW_ALIGNMENT) * _ROW_ALIGNMENT
        wide_CS = torch.empty(setting.chunk_rows, stride, dtype=products.wide, device=device)
        self._logits_CV = wide_CS[:, : len(products)]
        # Float32 is its own operand; of two narrow numbers in the place of each wide one, a row's second half.
        self._gradient_CV = wide_CS.view(products.operand)[:, -stride:][:, : len(products)]

    def run(self, hidden_CH: Tensor, chunk: slice) -> Tensor | None:
        from seqaware.objective.triton_kernels import rows_pass

        setting, rows = self.setting, self.setting.rows
        logits_CV, gradient_CV = self._logits_CV[: len(hidden_CH)], self._gradient_CV[: len(hidden_CH)]
        setting.products.logits(hidden_CH, out_CV=logits_CV)
        rows_pass(
            logits_CV,
            gradient_CV if setting.wants_gradient else None,
            bias_V=setting.bias,
            scale=setting.head.scale,
            softcap=setting.head.softcap,
            rows=(
                rows.targets[chunk],
                rows.factors[chunk],
                rows.losses[chunk],
                rows.logsumexp[chunk],
                rows.correct[chunk].view(torch.uint8),
            ),
        )
        if not setting.wants_gradient:
            return None
        if setting.grad_bias is not None:
            setting.grad_bias.add_(gradient_CV.sum(0, dtype=setting.grad_bias.dtype))
        return gradient_CV


@dataclass(frozen=True)
class KernelChoice:
    """How softmax and gradient are worked out on a device, `torch` or `triton`, and why."""

    kernel: str
    reason: str


def softmax_pass(setting: Setting) -> SoftmaxPass:
    """The pass for the device and dtype of a call."""
    choice = choose_kernel(setting.rows.losses.device, setting.products.wide)
    return TritonPass(setting) if choice.kernel == "triton" else TorchPass(setting)


@cache
def choose_kernel(device: torch.device, wide: torch.dtype) -> KernelChoice:
    """The kernel for logits of dtype `wide` on this device. A GPU that has to do without Triton is told of, once."""
    if device.type != "cuda":
        return KernelChoice("torch", "the Triton kernel is for GPUs")
    if wide != torch.float32:
        return KernelChoice("torch", f"the Triton kernel works in float32, not in {wide}")
    obstacle = _triton_obstacle(device)
    if obstacle is None:
        return KernelChoice("triton", "Triton is installed and its kernel was right on a trial")
    warnings.warn(f"the loss does without its Triton kernel, and is slower: {obstacle}", stacklevel=2)
    return KernelChoice("torch", obstacle)


def _triton_obstacle(device: torch.device) -> str | None:
    """What keeps the kernel from running here. Asked by trying: it needs a driver, a compiler and a recent GPU."""
    if importlib.util.find_spec("triton") is None:
        return "the package triton is not installed"
    from triton.errors import TritonError

    try:
        return None if _trial_is_right(device) else "its result on a trial was wrong"
    except (TritonError, RuntimeError, OSError, ImportError, subprocess.SubprocessError) as error:
        return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"


def _trial_is_right(device: torch.device) -> bool:
    """Two rows of four logits 0: p is ¼ everywhere, and every number is known."""
    from seqaware.objective.triton_kernels import rows_pass

    logits = torch.zeros(2, 4, device=device)
    targets, factors = torch.tensor([1, 3], device=device), torch.tensor([1.0, 2.0], device=device)
    losses, logsumexp, correct = torch.zeros(2, device=device), torch.zeros(2, device=device), targets.to(torch.uint8)
    rows_pass(logits, logits, bias_V=None, scale=1.0, softcap=None, rows=(targets, factors, losses, logsumexp, correct))
    expected = torch.tensor([[0.25, -0.75, 0.25, 0.25], [0.5, 0.5, 0.5, -1.5]])
    # A few roundings of float32, and what the GPU's approximate exponential and logarithm add.
    close = torch.allclose(logits.cpu(), expected, atol=1e-5)
    return close and torch.allclose(losses.cpu(), torch.full((2,), 4.0).log(), atol=1e-5) and correct.tolist() == [1, 1]
