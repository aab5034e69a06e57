"""The weight of every token's loss, from its position in its own sequence.

The discounted loss of every suffix of a sequence, summed, is a weighted sum of the token losses l_1 … l_L:

    Σ_s Σ_{k≥s} γ^(k−s) · l_k  =  Σ_k w_k · l_k       w_k = Σ_{s≤k} γ^(k−s) = 1 + γ + … + γ^(k−1) = (1 − γ^k) / (1 − γ)

(exchange the sums: l_k belongs to the k suffixes that start at s = 1 … k). k counts predicted tokens from 1; 0 marks a
token without loss, and its weight is 0. γ = 0 gives 1 (plain cross-entropy), γ = 1 gives k.

Weights are worked out from integer positions on their device, in float64, and returned as float32.
"""

from __future__ import annotations

import importlib
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib.machinery import PathFinder
from pathlib import Path
from types import ModuleType
from typing import Literal, TypeAlias

import torch
from torch import Tensor

Scheme: TypeAlias = Callable[[Tensor, Tensor], Tensor]
"""(k, length), integer tensors of one shape and ≥ 1, to non-negative weights of that shape."""

Scale: TypeAlias = Literal["raw", "horizon", "mean_one"]

SCHEMES = ("log_suffix", "linear", "uniform")
SCALES = ("raw", "horizon", "mean_one")
# Schemes that never give a token the weight 0: nothing looks for zeros then. Others may.
_POSITIVE_SCHEMES = ("log_suffix", "linear", "uniform")


@dataclass(frozen=True)
class Weighting:
    """How much every token's loss counts.

    Attributes:
        gamma: the discount of `log_suffix`, in [0, 1].
        scheme: log_suffix, linear (k / length), uniform (1), `module:function`, or a function (k, length) → weights.
        scale: raw (the formula) · horizon (× (1 − γ): weights approach 1; log_suffix with γ < 1 only) · mean_one (the
            weights of each sequence's loss tokens average 1).

    Raises:
        ValueError: γ outside [0, 1]; an unknown scheme or scale; a function that cannot be imported; a scale that is
            not defined for the scheme.
    """

    gamma: float
    scheme: str | Scheme = "log_suffix"
    scale: Scale = "raw"

    def __post_init__(self) -> None:
        if not 0.0 <= self.gamma <= 1.0:  # also refuses NaN
            raise ValueError(f"gamma must lie in [0, 1]; got {self.gamma}")
        if self.scale not in SCALES:
            raise ValueError(f"scale must be one of {', '.join(SCALES)}; got {self.scale!r}")
        if isinstance(self.scheme, str) and self.scheme not in SCHEMES:
            resolve_scheme(self.scheme)
        if self.scale == "horizon" and self.scheme != "log_suffix":
            raise ValueError(f"scale horizon belongs to scheme log_suffix; got {self.scheme!r}; use raw or mean_one")
        if self.scale == "horizon" and self.gamma == 1.0:
            raise ValueError("scale horizon multiplies by 1 - gamma, which is 0 at gamma 1; use raw or mean_one")

    @property
    def is_positive(self) -> bool:
        """Whether every token with loss has a weight above 0, which is known of some schemes only."""
        return isinstance(self.scheme, str) and self.scheme in _POSITIVE_SCHEMES

    def weights(
        self,
        k: Tensor,
        length: Tensor,
        sequence_offsets: Tensor | None = None,
        *,
        token_weight: Tensor | None = None,
    ) -> Tensor:
        """The weight of every token. No host sync, except for a user's function, whose result is checked.

        Args:
            k: integer, any shape; 1-based position of the predicted token, 0 where there is no loss.
            length: integer, k's shape; length of the unit that k counts in. Read where k > 0.
            sequence_offsets: int64 [S + 1], from 0 to k.numel(): sequence s is the tokens offsets[s] … offsets[s+1]
                of the flattened k. Needed by mean_one.
            token_weight: float, k's shape; multiplied in after the scaling (so mean_one leaves its ratios alone).

        Returns:
            float32 of k's shape; exactly 0 where k = 0.

        Raises:
            ValueError: a user's function returned another shape, or values that are negative or not finite;
                mean_one without sequence_offsets.
        """
        has_loss = k > 0
        # Places without loss hold k = length = 0: a scheme must not have to think about 0 / 0.
        weights = torch.where(has_loss, self._evaluate(k.clamp(min=1), length.clamp(min=1)), 0.0)
        if self.scale == "mean_one":
            weights = _mean_one(weights, has_loss, sequence_offsets)
        weights = weights.to(torch.float32)
        return weights if token_weight is None else weights * token_weight

    def _evaluate(self, k: Tensor, length: Tensor) -> Tensor:
        """Weights in float64, scaled by 1 − γ where `horizon` asks for it; k and length are at least 1."""
        match self.scheme:
            case "log_suffix" if self.scale == "horizon":
                return _one_minus_power(k, self.gamma)
            case "log_suffix":
                return _log_suffix(k, self.gamma)
            case "linear":
                return k.double() / length.double()
            case "uniform":
                return torch.ones_like(k, dtype=torch.float64)
            case str() as name:
                return _checked(resolve_scheme(name)(k, length), k, name)
            case function:
                return _checked(function(k, length), k, getattr(function, "__qualname__", repr(function)))


def log_suffix_weight(k: Tensor, gamma: float) -> Tensor:
    """(1 − γ^k) / (1 − γ), continuous at γ = 1.

    Args:
        k: integer, any shape, ≥ 0.
        gamma: in [0, 1].

    Returns:
        float32 of k's shape: 0 at k = 0; at γ = 0 exactly 1, at γ = 1 exactly k (up to 2²⁴).
    """
    return torch.where(k > 0, _log_suffix(k, gamma), 0.0).to(torch.float32)


@cache
def resolve_scheme(name: str) -> Scheme:
    """Return the function that `module:function` names; the module is looked for in the working directory first.

    Raises:
        ValueError: not of that form, no such module, another one of that name, or nothing callable of that name in it.
    """
    module_name, colon, function_name = name.partition(":")
    if not colon or not module_name or not function_name:
        raise ValueError(f"weighting must be one of {', '.join(SCHEMES)}, or module:function; got {name!r}")
    try:
        module = _import_from_working_directory(module_name)
    except ImportError as error:
        raise ValueError(f"weighting {name!r}: cannot import {module_name!r} ({error})") from error
    function: Scheme | None = getattr(module, function_name, None)
    if not callable(function):
        where = getattr(module, "__file__", None) or "built in"
        raise ValueError(f"weighting {name!r}: {module_name!r} ({where}) has no function {function_name!r}")
    return function


def _import_from_working_directory(name: str) -> ModuleType:
    """Import a user's module as a script in the working directory would.

    A launched script searches its own folder instead: `python launcher/train.py` finds launcher/weights.py.
    """
    here = str(Path.cwd())
    sys.path.insert(0, here)
    importlib.invalidate_caches()
    try:
        module = importlib.import_module(name)
    finally:
        # Not the first entry blindly: the module may have changed the path itself.
        if here in sys.path:
            sys.path.remove(here)
    top = name.partition(".")[0]
    own = PathFinder.find_spec(top, [here])
    loaded = getattr(sys.modules[top], "__file__", None)
    if own is not None and own.origin and loaded and not Path(loaded).samefile(own.origin):
        raise ImportError(f"{loaded} is loaded under that name already; rename {own.origin}")
    return module


def _log_suffix(k: Tensor, gamma: float) -> Tensor:
    """float64. Near γ = 1 all digits are kept: 1 − γ^k by expm1, and 1 − γ is exact in floating point from γ = ½ on."""
    if gamma == 1.0:
        return k.double()
    return _one_minus_power(k, gamma) / (1.0 - gamma)


def _one_minus_power(k: Tensor, gamma: float) -> Tensor:
    """1 − γ^k in float64, for k ≥ 1 and γ in [0, 1)."""
    if gamma == 0.0:  # ln 0 is −∞, which is right for k ≥ 1 but loud
        return torch.ones_like(k, dtype=torch.float64)
    return -torch.expm1(k.double() * math.log(gamma))


def _mean_one(weights: Tensor, has_loss: Tensor, sequence_offsets: Tensor | None) -> Tensor:
    """Divide each sequence's weights by their mean over its loss tokens; float64, the same bits every time.

    A segment reduction, not an index_add: on CUDA the latter adds in the order in which threads arrive.
    """
    if sequence_offsets is None:
        raise ValueError("scale mean_one needs sequence_offsets: where each sequence begins in the batch")
    columns = torch.stack((weights.flatten(), has_loss.flatten().to(weights.dtype)))
    totals, counts = (
        torch.segment_reduce(column, "sum", offsets=sequence_offsets, initial=0.0, unsafe=True) for column in columns
    )
    # A sequence whose weights are all zero has no mean to divide by and stays zero.
    factors = torch.where(totals > 0.0, counts / totals, 0.0)
    per_token = factors.repeat_interleave(sequence_offsets.diff(), output_size=weights.numel())
    return weights * per_token.view_as(weights)


def _checked(weights: Tensor, k: Tensor, name: str) -> Tensor:
    """A user's weights in float64, or a ValueError that names their function.

    Looking at the values waits for the device: once a micro-batch, before its forward, for a user's function only.
    """
    if not isinstance(weights, Tensor) or weights.shape != k.shape:
        shape = tuple(weights.shape) if isinstance(weights, Tensor) else type(weights).__name__
        raise ValueError(f"weighting {name!r} must return a tensor of k's shape {tuple(k.shape)}; got {shape}")
    weights = weights.detach().to(device=k.device, dtype=torch.float64)
    if not bool((torch.isfinite(weights) & (weights >= 0.0)).all()):
        raise ValueError(f"weighting {name!r} returned weights that are negative or not finite")
    return weights
