"""The head's weight gradient while it is added up in a wide dtype, and as the backward hands it on in a narrow one.

Letters: V vocabulary, H hidden size; L = V / 2, rounded down to what a GPU multiplies at its full rate.

The sum dW += dzᵀ h takes 4·V·H bytes in float32. Handed on in bfloat16 it takes 2·V·H, and beside the sum these would
be the most that the loss ever holds, once they outgrow the buffers of a chunk. So a large sum lies in two parts:

    result, narrow [V, H]           ┌──────── rows 0 … L, narrow ────────┬──────── rows L … V, narrow ────────┐
    the same bytes, wide [L, H]     └ the sum's rows 0 … L                                                    ┘
    a tensor of its own [V − L, H]    the sum's rows L … V

Handing on narrows the first part over itself, then the second one into the half that this sets free. Nothing but a
piece of a few megabytes is held beside the sum, and nothing is left over when the sum is gone.
"""

from __future__ import annotations

import torch
from torch import Tensor

from seqaware.objective.products import VOCABULARY_GRANULE

# Numbers that are narrowed by way of a wide copy: the first ones of a sum that is narrowed over itself, whose new
# places are among their old ones; and on a CPU, which multiplies into no narrow tensor, all.
_PIECE = 2**20


class WeightGradient:
    """dW in parts of the vocabulary.

    Attributes:
        parts: the words of each part, and their sum in the wide dtype. Not yet filled.
    """

    def __init__(self, weight_VH: Tensor, *, wide: torch.dtype, large: bool) -> None:
        self._shape, self._dtype = weight_VH.shape, weight_VH.dtype
        vocabulary, hidden = weight_VH.shape
        lower = vocabulary // 2 // VOCABULARY_GRANULE * VOCABULARY_GRANULE
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
                _multiply(part.view(-1), factor, result_VH[words].view(-1))
            return result_VH
        (_, lower), (words, upper) = self.parts
        _multiply(lower.view(-1), factor, self._result_VH.view(-1)[: lower.numel()], over_itself=True)
        _multiply(upper.view(-1), factor, self._result_VH[words].view(-1))
        return self._result_VH


def _multiply(wide: Tensor, factor: Tensor, result: Tensor, *, over_itself: bool = False) -> None:
    """result = wide · factor, rounded once; over itself: both begin at the same byte, result half as wide."""
    casts_apart = wide.device.type == "cpu" and wide.dtype != result.dtype
    done = 0
    if over_itself:
        done = min(_PIECE, len(wide))
        result[:done].copy_(wide[:done] * factor)
    while done < len(wide):
        end = min(len(wide), done + _PIECE) if casts_apart else len(wide)
        if over_itself:  # up to twice as far: so far reach the places of numbers that were read
            end = min(end, 2 * done)
        torch.mul(wide[done:end], factor, out=result[done:end])
        done = end


def graph_is_kept() -> bool:
    """Inside a backward: whether the caller asked to keep the graph, so that another backward may follow."""
    return torch._C._autograd._get_current_graph_task_keep_graph()
