"""What a step makes of its gradient, in float64 from the definitions: clipping, AdamW, Lion and Muon, and the rate.

With the clipped gradient g = G · min(1, c / (‖G‖ + 10⁻⁶)), rate η, decay λ (of matrices alone) and step t from 1:

    all     W ← (1 − ηλ) W − η u
    AdamW   m ← β₁m + (1 − β₁) g,   v ← β₂v + (1 − β₂) g²,   u = (m / (1 − β₁ᵗ)) / (√(v / (1 − β₂ᵗ)) + ε)
    Lion    u = sign(β₁m + (1 − β₁) g),   then m ← β₂m + (1 − β₂) g
    Muon    M ← μM + (1 − μ) g,   u = √max(1, rows / columns) · NS(μM + (1 − μ) g);  the rest by AdamW
    NS      X / (‖X‖ + 10⁻⁷), then five times X ← aX + (bA + cA²) X with A = X Xᵀ,  a, b, c = 3.4445, −4.7750, 2.0315

Nothing here is shared with `engine/`. Beside each result stands how far float32 may take it: slow, and obviously right.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from seqaware.config.schema import OptimizerConfig, ScheduleConfig

# One rounding of a float32, relative to its size.
_ROUNDING = 2.0**-24
_QUINTIC = (3.4445, -4.7750, 2.0315)
_QUINTIC_STEPS = 5
# Near zero, where a step is steepest, each multiplies an error by a. A function of the singular values moves a matrix,
# in the norm of its entries, by no more than its slope times what moved the matrix.
_AMPLIFIED = _QUINTIC[0] ** _QUINTIC_STEPS
# These keep their coefficients in float32, where 1 − β is off by a rounding of 1.
_SINGLE_COEFFICIENTS = ("cpu_adam", "fused_adam", "adamw_8bit", "lion")


@dataclass(frozen=True)
class Update:
    """A parameter after a step. weights: float64. moments: by the names that torch gives them.

    Attributes:
        weights_off, moments_off: how far roundings may take each, as the norm of the difference.
    """

    weights: Tensor
    moments: dict[str, Tensor]
    weights_off: float
    moments_off: dict[str, float]


@dataclass
class _State:
    """Of one parameter over the steps: its moments, and the largest clipped gradient of each entry."""

    moments: dict[str, Tensor]
    largest: Tensor


class ReferenceOptimizer:
    """The optimizer of a run, a parameter at a time; it remembers the moments.

    Args:
        hidden: the names of the matrices that Muon orthogonalizes.
        muon_eps: ε of the dtype in which the run orthogonalizes.
        compiled_adam: whether the AdamW beside Muon is one of DeepSpeed's compiled ones.
    """

    def __init__(
        self, config: OptimizerConfig, *, hidden: frozenset[str], muon_eps: float, compiled_adam: bool
    ) -> None:
        self._config = config
        self._single = config.type in _SINGLE_COEFFICIENTS or (config.type == "muon" and compiled_adam)
        self._hidden = hidden if config.type == "muon" else frozenset()
        self._muon_eps = muon_eps
        self._steps = 0
        self._states: dict[str, _State] = {}

    @property
    def has_lost_moments(self) -> bool:
        """Whether the run's moments are rounded to 8 bits by now, so that its next update cannot be known."""
        return self._config.type == "adamw_8bit" and self._steps > 1

    def step(
        self, weights: Mapping[str, Tensor], gradients: Mapping[str, Tensor], *, norm: float, rate: float
    ) -> dict[str, Update]:
        """All parameters after a step from `weights`, with their gradients before clipping and the norm of all.

        Returns:
            by name; what the caller does not keep is gone, but for the moments.
        """
        self._steps += 1
        limit = self._config.max_grad_norm
        share = min(1.0, limit / (norm + 1e-6)) if limit else 1.0
        return {
            name: self._update(name, weights[name].double(), share * gradient.double(), rate)
            for name, gradient in gradients.items()
        }

    def _update(self, name: str, weight: Tensor, gradient: Tensor, rate: float) -> Update:
        zeros = torch.zeros_like(gradient)
        state = self._states.setdefault(name, _State({}, zeros))
        state.largest = torch.maximum(state.largest, gradient.abs())
        decay = self._config.weight_decay if weight.ndim >= 2 else 0.0
        if name in self._hidden:
            direction, off = self._muon(state, gradient)
            moments_off: dict[str, float] = {}
        elif self._config.type == "lion":
            direction, off, moments_off = self._lion(state, gradient)
        else:
            direction, off, moments_off = self._adamw(state, gradient)
        after = (1.0 - rate * decay) * weight - rate * direction
        # The factor of the decay is rounded, its product, the step's size, and the sum.
        rounded = 4.0 * _ROUNDING * (weight.abs() + rate * direction.abs())
        weights_off = float(rounded.norm()) + rate * off
        # Muon's momentum lies in every stage's own way: it shows in the next update.
        moments = {} if name in self._hidden else state.moments
        return Update(after, dict(moments), weights_off, moments_off)

    def _adamw(self, state: _State, gradient: Tensor) -> tuple[Tensor, float, dict[str, float]]:
        first, second = self._config.betas
        t = self._steps
        m = self._average(state, "exp_avg", gradient, first)
        v = self._average(state, "exp_avg_sq", gradient**2, second)
        scale = (v / (1.0 - second**t)).sqrt() + self._config.eps
        direction = (m / (1.0 - first**t)) / scale
        # An average of t terms that may cancel: three roundings a step, each of at most the largest term.
        roundings = (3.0 * t + 8.0) * _ROUNDING
        single = _ROUNDING if self._single else 0.0
        m_off = roundings * (1.0 - first**t) * state.largest + single / (1.0 - first) * m.abs()
        v_off = 2.0 * (roundings + single / (1.0 - second)) * v
        moments_off = {"exp_avg": float(m_off.norm()), "exp_avg_sq": float(v_off.norm())}
        off = roundings * state.largest / scale + (single / (1.0 - first) + single / (1.0 - second)) * direction.abs()
        return direction, float(off.norm()), {} if self._config.type == "adamw_8bit" else moments_off

    def _lion(self, state: _State, gradient: Tensor) -> tuple[Tensor, float, dict[str, float]]:
        first, second = self._config.betas
        before = state.moments.get("exp_avg", torch.zeros_like(gradient))
        mixed = first * before + (1.0 - first) * gradient
        roundings = (3.0 * self._steps + 8.0) * _ROUNDING
        # Where the two cancel to less than their roundings, the sign is anyone's.
        single = _ROUNDING * (before.abs() + gradient.abs())
        open_sign = mixed.abs() <= roundings * (first * before.abs() + (1.0 - first) * gradient.abs()) + single
        open_sign &= mixed != 0.0
        m = self._average(state, "exp_avg", gradient, second)
        m_off = roundings * (1.0 - second**self._steps) * state.largest + _ROUNDING / (1.0 - second) * m.abs()
        return mixed.sign(), 2.0 * math.sqrt(int(open_sign.sum())), {"exp_avg": float(m_off.norm())}

    def _muon(self, state: _State, gradient: Tensor) -> tuple[Tensor, float]:
        momentum = self._config.momentum
        average = self._average(state, "momentum_buffer", gradient, momentum)
        direction = orthogonalized(momentum * average + (1.0 - momentum) * gradient)
        scale = math.sqrt(max(1.0, gradient.shape[0] / gradient.shape[1]))
        # Five steps of two products each, and an error of any of them is multiplied by what follows it.
        off = 2.0 * _QUINTIC_STEPS * _AMPLIFIED * self._muon_eps
        return scale * direction, scale * off

    def _average(self, state: _State, name: str, term: Tensor, beta: float) -> Tensor:
        before = state.moments.get(name, torch.zeros_like(term))
        state.moments[name] = beta * before + (1.0 - beta) * term
        return state.moments[name]


def orthogonalized(matrix: Tensor) -> Tensor:
    """Newton–Schulz: a matrix of the same singular vectors, whose singular values lie near 1."""
    a, b, c = _QUINTIC
    x: Tensor = matrix / (matrix.norm() + 1e-7)
    for _ in range(_QUINTIC_STEPS):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x


def reference_rate(step: int, schedule: ScheduleConfig, *, peak: float, total: int, warmup: int) -> float:
    """The learning rate of optimizer step `step`, from 1: up to step max(warmup, 1) it rises."""
    top = max(warmup, 1)
    if step <= top:
        return peak * step / top
    done = (step - top) / (total + 1 - top)
    match schedule.scheduler_type:
        case "constant":
            return peak
        case "linear":
            share = 1.0 - done
        case "cosine":
            share = (1.0 + math.cos(math.pi * done)) / 2.0
        case "polynomial":
            share = (1.0 - done) ** schedule.power
        case "wsd":
            falling = min(total - top, math.ceil(schedule.decay_ratio * total))
            share = min(1.0, (total + 1 - step) / (falling + 1))
    return peak * (schedule.min_lr_ratio + (1.0 - schedule.min_lr_ratio) * share)
