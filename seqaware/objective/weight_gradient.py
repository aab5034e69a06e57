"""The head's weight gradient while it is added up in a wide dtype, and as the backward hands it on in a narrow one.

Letters: V vocabulary, H hidden size; L = V / 2, rounded down to what a GPU multiplies at its full rate.

The sum dW += dzᵀ h takes 4·V·H bytes in float32. Handed on in bfloat16 it takes 2·V·H, and beside the sum these would
be the most that the loss ever holds, once they outgrow the buffers of a chunk. So a large sum lies in two parts:

    result, narrow [V, H]           ┌──────── rows 0 … L, narrow ────────┬──────── rows L … V, narrow ────────┐
    the same bytes, wide [L, H]     └ the sum's rows 0 … L                                                    ┘
    a tensor of its own [V − L, H]    the sum's rows L … V

Handing on narrows the first part over itself, then the second one into the half that this sets free. No byte is held
beside the sum, and none is left over when it is gone.
"""

from __future__ import annotations

import torch
from torch import Tensor

_GRANULE = 8
# Numbers that are narrowed by way of a copy: the first ones, whose new places are among their old ones.
_COPIED = 2**20


class WeightGradient:
    """dW in parts of the vocabulary.

    Attributes:
        parts: the words of each part, and their sum in the wide dtype. Not yet filled.
    """

    def __init__(self, weight_VH: Tensor, *, wide: torch.dtype, large: bool) -> None:
        self._shape, self._dtype = weight_VH.shape, weight_VH.dtype
        vocabulary, hidden = weight_VH.shape
        lower = vocabulary // 2 // _GRANULE * _GRANULE
        self._result_VH: Tensor | None = None
        if not (large and lower and wide.itemsize == 2 * weight_VH.dtype.itemsize):
            self.parts = [(slice(None), weight_VH.new_empty(self._shape, dtype=wide))]
            return
        self._result_VH = weight_VH.new_empty(self._shape)
        over_LH = self._result_VH.view(-1)[: 2 * lower * hidden].view(wide).view(lower, hidden)
        rest = weight_VH.new_empty(vocabulary - lower, hidden, dtype=wide)
        self.parts = [(slice(0, lower), over_LH), (slice(lower, None), rest)]

    def zero_(self) -> None:
        for _, part in self.parts:
            part.zero_()

    def handed_on(self, factor: Tensor, *, last: bool) -> Tensor:
        """dW · factor in the weight's dtype [V, H].

        Args:
            factor: 0-d, wide.
            last: the sum is not needed again; else it stays as it is, at the price of a second tensor.
        """
        if self._result_VH is None or not last:
            result_VH = self.parts[0][1].new_empty(self._shape, dtype=self._dtype)
            for words, part in self.parts:
                torch.mul(part, factor, out=result_VH[words])
            return result_VH
        (_, lower), (words, upper) = self.parts
        _narrow_over_itself(lower.view(-1), factor, self._result_VH.view(-1)[: lower.numel()])
        torch.mul(upper, factor, out=self._result_VH[words])
        return self._result_VH


def _narrow_over_itself(wide: Tensor, factor: Tensor, narrow: Tensor) -> None:
    """narrow = wide · factor, where both begin at the same byte: each piece goes where earlier ones were read."""
    done = min(_COPIED, len(wide))
    narrow[:done].copy_(wide[:done] * factor)
    while done < len(wide):
        end = min(2 * done, len(wide))
        torch.mul(wide[done:end], factor, out=narrow[done:end])
        done = end


def graph_is_kept() -> bool:
    """Inside a backward: whether the caller asked to keep the graph, so that another backward may follow."""
    return torch._C._autograd._get_current_graph_task_keep_graph()
