"""The three matrix products of a linear head, with float32 results whatever the dtype of their operands.

Letters: C rows of a chunk, H hidden size, V vocabulary.

    logits [C, V] = h Wᵀ        dh [C, H] = dz W        dW [V, H] += dzᵀ h

float32 and float64 multiply as they are. bfloat16 and float16 (the narrow dtypes) do what the machine does best:

- a GPU multiplies narrow operands and writes float32 (`out_dtype`), so nothing is rounded on the way;
- a CPU with bfloat16 arithmetic multiplies narrow operands into a narrow result, which is then widened;
- any other CPU would emulate every multiplication (measured: 8 to 150 times slower than float32), so the operands are
  widened once and multiplied in float32.

A GPU multiplies narrow numbers at its full rate only where V is a multiple of 8; GPT-2's 50,257 words make the products
two to seven times slower there (H200). So the last words, those beyond such a multiple, are multiplied by themselves.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

NARROW = (torch.bfloat16, torch.float16)
# Words that a GPU multiplies together at its full rate.
VOCABULARY_GRANULE = 8


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which sums over a value of `dtype` are kept: float64 for float64, else float32."""
    return torch.promote_types(dtype, torch.float32)


class HeadProducts:
    """The products with one head weight, over chunks of at most `chunk_rows` rows.

    Attributes:
        operand: the dtype that is multiplied.
        wide: the dtype of logits and sums.
    """

    def __init__(self, weight_VH: Tensor, *, chunk_rows: int) -> None:
        self.operand = operand_dtype(weight_VH.dtype, weight_VH.device)
        self.wide = wide_dtype(weight_VH.dtype)
        self._weight_VH = weight_VH.to(self.operand)
        self._chunk_rows = chunk_rows
        self._into_wide = self.operand in NARROW and not rounds_products(weight_VH.dtype, weight_VH.device)
        self._narrow_CV: Tensor | None = None
        self._words = self._cut(len(weight_VH))

    def __len__(self) -> int:
        """V."""
        return len(self._weight_VH)

    def logits(self, hidden_CH: Tensor, *, out_CV: Tensor) -> None:
        """out = h Wᵀ, wide. hidden_CH has the operand's dtype."""
        if self.operand == self.wide:
            torch.mm(hidden_CH, self._weight_VH.t(), out=out_CV)
        elif self._into_wide:
            for words in self._words:
                self._multiply(hidden_CH, self._weight_VH[words].t(), out_CV[:, words])
        else:
            out_CV.copy_(torch.mm(hidden_CH, self._weight_VH.t(), out=self._narrow(len(hidden_CH))))

    def as_operand(self, grad_logits_CV: Tensor) -> Tensor:
        """dz in the dtype that is multiplied; the same tensor where that is the wide one, else a reused buffer."""
        if self.operand == self.wide:
            return grad_logits_CV
        return self._narrow(len(grad_logits_CV)).copy_(grad_logits_CV)

    def hidden_gradient(self, grad_logits_CV: Tensor, *, out_CH: Tensor) -> None:
        """out = dz W. grad_logits_CV as `as_operand` returned it; out_CH of any dtype."""
        if out_CH.dtype == self.operand and len(self._words) == 1:
            torch.mm(grad_logits_CV, self._weight_VH, out=out_CH)
        elif self._into_wide:
            # Over the parts of the vocabulary added up in float32, and rounded once.
            wide_CH = out_CH if out_CH.dtype == self.wide else torch.empty_like(out_CH, dtype=self.wide)
            for number, words in enumerate(self._words):
                self._multiply(grad_logits_CV[:, words], self._weight_VH[words], wide_CH, first=not number)
            if wide_CH is not out_CH:
                out_CH.copy_(wide_CH)
        else:
            out_CH.copy_(torch.mm(grad_logits_CV, self._weight_VH))

    def add_weight_gradient(
        self, grad_logits_CV: Tensor, hidden_CH: Tensor, *, sum_VH: Tensor, first: bool = False
    ) -> None:
        """sum += dzᵀ h, wide; the first time sum = dzᵀ h, whatever was there.

        grad_logits_CV, in the operand's dtype, and sum_VH may be those of a part of the words.
        """
        if self.operand == self.wide and first:
            torch.mm(grad_logits_CV.t(), hidden_CH, out=sum_VH)
        elif self.operand == self.wide:
            sum_VH.addmm_(grad_logits_CV.t(), hidden_CH)
        elif self._into_wide:
            for words in self._cut(len(sum_VH)):
                self._multiply(grad_logits_CV[:, words].t(), hidden_CH, sum_VH[words], first=first)
        elif first:
            sum_VH.copy_(torch.mm(grad_logits_CV.t(), hidden_CH))
        else:
            sum_VH.add_(torch.mm(grad_logits_CV.t(), hidden_CH))

    def _cut(self, words: int) -> tuple[slice, ...]:
        """So many words in pieces that are multiplied by themselves."""
        whole = words // VOCABULARY_GRANULE * VOCABULARY_GRANULE
        odd = self._into_wide and 0 < whole < words
        return (slice(0, whole), slice(whole, None)) if odd else (slice(None),)

    def _multiply(self, left: Tensor, right: Tensor, total: Tensor, *, first: bool = True) -> None:
        """total += left · right, narrow operands into a wide total; the first time total = left · right."""
        if first:
            torch.mm(left, right, out_dtype=self.wide, out=total)
        else:
            torch.addmm(total, left, right, out_dtype=self.wide, out=total)

    def _narrow(self, rows: int) -> Tensor:
        """The reused buffer of narrow logits, then of their narrow gradient."""
        if self._narrow_CV is None:
            shape = (self._chunk_rows, len(self._weight_VH))
            self._narrow_CV = torch.empty(shape, dtype=self.operand, device=self._weight_VH.device)
        return self._narrow_CV[:rows]


def operand_dtype(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """The dtype in which a head of `dtype` is multiplied on this device."""
    if dtype in NARROW and device.type == "cpu" and not _cpu_multiplies(dtype):
        return torch.float32
    return dtype


def rounds_products(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether a product with a head of `dtype` is rounded to that dtype before it is widened."""
    operand = operand_dtype(dtype, device)
    return operand in NARROW and not multiplies_into_float32(operand, device)


@cache
def _cpu_multiplies(dtype: torch.dtype) -> bool:
    """Whether this CPU has arithmetic for a narrow dtype, as oneDNN sees it."""
    if not torch.backends.mkldnn.is_available():
        return False
    query = "_is_mkldnn_bf16_supported" if dtype == torch.bfloat16 else "_is_mkldnn_fp16_supported"
    return bool(getattr(torch.ops.mkldnn, query)())


@cache
def multiplies_into_float32(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether a product of narrow operands can be written, and added up, in float32 on this device. Asked by trying.

    The operands of the second product are 1 and 1 + eps: a result that was rounded to their dtype would show.
    """
    square = torch.ones(16, 16, dtype=dtype, device=device)
    above = square + torch.finfo(dtype).eps
    total = torch.zeros(16, 16, dtype=torch.float32, device=device)
    try:
        torch.mm(square, square, out_dtype=torch.float32, out=total)
        torch.addmm(total, square, above, out_dtype=torch.float32, out=total)
    except (RuntimeError, TypeError):  # no such kernel on this device; no such argument in this torch
        return False
    # 16 and 16 · (1 + eps): exact in float32.
    return bool((total == 32.0 + 16.0 * torch.finfo(dtype).eps).all())
