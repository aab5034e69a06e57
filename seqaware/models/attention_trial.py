"""Whether one way to compute attention gives what another gives: asked by trying both, forward and backward."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
"""[N, A, D], [N, G, D], [N, G, D] -> [N, A, D]"""

# A token's vector is off by so many roundings at most, beside its own length and the mean one. Those of right kernels
# are off by one; a mask that lets a token see the next, from the 65th of a document on, makes it six in bfloat16.
_ROUNDINGS = 3
_LEAST_TOLERANCE = 1e-4


@dataclass(frozen=True)
class Trial:
    """Some documents of random queries, keys and values.

    Attributes:
        shape: query heads A, key heads G, head dimension D. lengths: tokens of each document.
    """

    shape: tuple[int, int, int]
    lengths: tuple[int, ...]
    device: torch.device
    dtype: torch.dtype

    def borders(self) -> Tensor:
        """int32 [documents + 1], from 0."""
        return torch.tensor([0, *itertools.accumulate(self.lengths)], dtype=torch.int32, device=self.device)

    def difference(self, tried: Attend, known: Attend) -> str | None:
        """In what `tried` differs from `known`, or how it fails; None if in nothing."""
        with torch.enable_grad():
            expected = self._outcome(known)
            try:
                return _unlike(self._outcome(tried), expected)
            except Exception as error:  # noqa: BLE001 kernels that are compiled as they are called have their own
                return f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"

    def _outcome(self, attend: Attend) -> tuple[Tensor, ...]:
        heads, key_heads, head_dim = self.shape
        generator = torch.Generator().manual_seed(0)
        q, k, v, upstream = (
            torch.randn(sum(self.lengths), each, head_dim, generator=generator).to(self.device, self.dtype)
            for each in (heads, key_heads, key_heads, heads)
        )
        inputs = [each.requires_grad_() for each in (q, k, v)]
        output = attend(*inputs)
        return output.detach(), *torch.autograd.grad(output, inputs, upstream)


def _unlike(found: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> str | None:
    for name, got, want in zip(("output", "dq", "dk", "dv"), found, expected, strict=True):
        tolerance = max(_ROUNDINGS * torch.finfo(want.dtype).eps, _LEAST_TOLERANCE)
        lengths = want.float().norm(dim=-1)
        off = (got.float() - want.float()).norm(dim=-1) / (lengths + lengths.mean())
        if not bool((off <= tolerance).all()):  # also where it is no number
            return f"{name} is off by {float(off.max()):.1%}"
    return None
