"""What was compared, what rounding explains, and what was seen.

How far a run in float32 or bfloat16 may be from a float64 oracle depends on the model, its depth and its data, so it
is measured, not guessed: the oracle runs a second time in the run's own dtype, and what that changes is what rounding
does.

    error of a parameter's gradient   ‖g − g₆₄‖ / max(‖g₆₄‖, floor)
    rounding                          the same, of the oracle in the run's dtype
    explained                         MULTIPLE · rounding + ε

The floor of the denominator, a hundredth of the gradient's root mean square, is for parameters whose gradient is zero
in truth (the bias of keys): nothing but rounding is left there, and no ratio of it says anything.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from seqaware.training.verify.oracle import OracleStep

# The oracle's rounding is one draw. The run adds up in another order (rows, kernels, ranks) and rounds where the oracle
# does not (the fused loss, reductions). Such draws are independent and add up by squares, so four of that size come to
# twice the oracle's and leave a factor of two; the errors in question change a gradient by percents and more.
MULTIPLE = 4.0
# The ε beside it is for draws that happen to vanish. A gradient's entries are rounded to the run's dtype twice, when
# they are made and when they are reduced; a loss is a float32 in every run, and rounded as often.
_SMALL = 1e-2
# A weight is rounded to float32 once, and once more where the data's factor multiplies it.
WEIGHT_ROUNDING = 2.0 * 2.0**-24


@dataclass(frozen=True)
class Item:
    """One line of the certificate.

    Attributes:
        explained: the largest error that rounding explains; 0 where the two sides must be equal.
        seen: the error. note: which parameter, how many of what, or what was found.
        step: the optimizer step it belongs to, if to one.
    """

    name: str
    explained: float
    seen: float
    note: str = ""
    step: int | None = None

    @property
    def holds(self) -> bool:
        return self.seen <= self.explained  # NaN never holds

    @property
    def strain(self) -> float:
        """How far the error goes towards what is explained: above 1 it falls short; NaN counts as infinite."""
        if self.seen == 0.0:
            return 0.0
        return self.seen / self.explained if self.explained and not math.isnan(self.seen) else math.inf


@dataclass(frozen=True)
class Pair:
    """The oracle twice: `exact`, and once more in the run's dtype, whose ε is `eps`."""

    exact: OracleStep
    rounded: OracleStep
    eps: float


def loss_item(name: str, seen: float, pair: Pair, *, weighted: bool) -> Item:
    """The step's loss. Rounding: as if the errors of no two tokens cancelled, for one sum may vanish by luck."""
    exact = pair.exact
    weights = exact.weights if weighted else (exact.weights != 0).double()
    errors = (pair.rounded.losses - exact.losses).abs()
    total = float((weights * exact.losses).sum())
    expected = exact.loss if weighted else exact.unweighted_loss
    rounding = float((weights * errors).sum()) / total
    explained = MULTIPLE * rounding + epsilon(torch.float32)
    return Item(name, explained, abs(seen / expected - 1.0), f"{seen:.8g}, oracle {expected:.8g}")


def norm_item(name: str, seen: float, pair: Pair) -> Item:
    """The gradient's norm: it cannot be further off than the gradient itself."""
    expected = pair.exact.gradient_norm
    squares = sum(_distance(g, pair.rounded.gradients[key]) ** 2 for key, g in pair.exact.gradients.items())
    rounding = math.sqrt(squares) / expected
    note = f"{seen:.8g}, oracle {expected:.8g}"
    return Item(name, MULTIPLE * rounding + pair.eps, abs(seen / expected - 1.0), note)


@dataclass(frozen=True)
class GradientComparison:
    """All parameters of a step. first: the first in the order of the model that differs; None where none does."""

    item: Item
    first: str | None


def gradient_item(name: str, seen: dict[str, Tensor], pair: Pair) -> GradientComparison:
    """Every parameter's gradient; the item is that of the one nearest to its bound, or furthest beyond it."""
    exact = pair.exact
    entries = sum(g.numel() for g in exact.gradients.values())
    typical = exact.gradient_norm / math.sqrt(entries)
    items = []
    for key, truth in exact.gradients.items():
        size = max(float(truth.double().norm()), _SMALL * typical * math.sqrt(truth.numel()))
        explained = MULTIPLE * _distance(truth, pair.rounded.gradients[key]) / size + pair.eps
        items.append(Item(name, explained, _distance(truth, seen[key]) / size if key in seen else math.inf, key))
    surplus = sorted(seen.keys() - exact.gradients.keys())
    items += [Item(name, 0.0, math.inf, f"{key}, which the oracle does not have") for key in surplus]
    worst = max(items, key=lambda item: item.strain)
    beyond = [item.note for item in items if not item.holds]
    counted = f"{len(beyond)} of {len(items)} differ, first {beyond[0]}" if beyond else f"{len(items)} parameters"
    note = f"{counted}, worst {worst.note}"
    return GradientComparison(replace(worst, note=note), beyond[0] if beyond else None)


def count_item(name: str, seen: float, expected: float) -> Item:
    """Something that is counted: equal or wrong."""
    return Item(name, 0.0, abs(seen - expected), f"{seen:.10g}, oracle {expected:.10g}")


def weight_item(name: str, seen: float, expected: float) -> Item:
    """A sum of float32 weights: all are positive, so the sum is off by no more than each of them is."""
    error = abs(seen / expected - 1.0) if expected else abs(seen)
    return Item(name, WEIGHT_ROUNDING, error, f"{seen:.10g}, oracle {expected:.10g}")


def _distance(tensor: Tensor, other: Tensor) -> float:
    return float((tensor.double().cpu() - other.double().cpu()).norm())


def epsilon(dtype: torch.dtype) -> float:
    """The distance from 1 to the next number of a dtype."""
    return float(torch.finfo(dtype).eps)
