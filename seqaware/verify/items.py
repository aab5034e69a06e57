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
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from seqaware.verify.optimizer_oracle import Update
from seqaware.verify.oracle import OracleEvaluation, OracleStep

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
    return GradientComparison(_worst(items), next((item.note for item in items if not item.holds), None))


def _worst(items: Sequence[Item]) -> Item:
    """Of an item for each parameter, the one nearest to its bound or furthest beyond it, and how many are beyond."""
    worst = max(items, key=lambda item: item.strain)
    beyond = [item.note for item in items if not item.holds]
    counted = f"{len(beyond)} of {len(items)} differ, first {beyond[0]}" if beyond else f"{len(items)} parameters"
    return replace(worst, note=f"{counted}, worst {worst.note}")


def weights_item(
    name: str, seen: Mapping[str, Tensor], updates: Mapping[str, Update], *, before: Mapping[str, Tensor]
) -> Item:
    """Every parameter after a step, as a share of how far the step should have moved it."""
    items = []
    for key, update in updates.items():
        moved = float((update.weights - before[key].double()).norm())
        # Where a step moves nothing, what rounding may do is all there is to compare with.
        size = max(moved, update.weights_off) or 1.0
        items.append(Item(name, update.weights_off / size, _distance(update.weights, seen[key]) / size, key))
    return _worst(items)


def moments_item(name: str, seen: Mapping[tuple[str, str], Tensor], updates: Mapping[str, Update]) -> Item:
    """Every moment of the optimizer after a step, relative to its size."""
    items = []
    for (key, moment), value in seen.items():
        truth, off = updates[key].moments[moment], updates[key].moments_off[moment]
        size = max(float(truth.norm()), off) or 1.0
        items.append(Item(name, off / size, _distance(truth, value) / size, f"{key} {moment}"))
    return _worst(items)


def rate_item(name: str, pairs: Iterable[tuple[float, float]], *, peak: float, note: str) -> Item:
    """Learning rates, seen and expected, as shares of the highest: both are a few float64 operations from the step."""
    worst = max(abs(seen - expected) / peak for seen, expected in pairs)
    return Item(name, 16 * epsilon(torch.float64), worst, note)


def evaluation_items(
    seen: Mapping[str, Any], exact: OracleEvaluation, rounded: OracleEvaluation, *, k: Sequence[int]
) -> list[Item]:
    """The ratios of an evaluation; its counts are compared as those of a step.

    Args:
        seen: as the run reports it. k: the position of every token, as `exact` has them.
    """
    pair = Pair(exact.step, rounded.step, epsilon(torch.float32))
    scored = exact.step.weights != 0
    return [
        loss_item("evaluation: loss", seen["loss"], pair, weighted=True),
        loss_item("evaluation: unweighted loss", seen["unweighted_loss"], pair, weighted=False),
        _accuracy_item("evaluation: accuracy", seen["accuracy"], exact.margins[scored], rounded.margins[scored]),
        *_logsumexp_items(seen, exact.logsumexp[scored], rounded.logsumexp[scored]),
        _positions_item("evaluation: loss by position", seen["by_position"], pair, torch.tensor(k)),
    ]


def _accuracy_item(name: str, seen: float, exact: Tensor, rounded: Tensor) -> Item:
    """The share of tokens whose label is on top; one whose margin is within rounding may count either way."""
    rounding = MULTIPLE * float((rounded - exact).abs().max()) + epsilon(torch.float32)
    expected = float((exact >= 0).double().mean())
    undecided = float((exact.abs() <= rounding).double().mean())
    # The division itself may round: a count over a count, both exact.
    slack = undecided + epsilon(torch.float64) if undecided else epsilon(torch.float64)
    return Item(name, slack, abs(seen - expected), f"{seen:.6g}, oracle {expected:.6g}")


def _logsumexp_items(seen: Mapping[str, Any], exact: Tensor, rounded: Tensor) -> list[Item]:
    # A deviation moves by no more than the root mean square of what moves its terms.
    rounding = float((rounded - exact).square().mean().sqrt())
    explained = MULTIPLE * rounding + epsilon(torch.float32) * float(exact.abs().max())
    items = []
    for key, expected in (("mean", float(exact.mean())), ("std", float(exact.std(correction=0)))):
        value = seen[f"logsumexp_{key}"]
        note = f"{value:.8g}, oracle {expected:.8g}"
        items.append(Item(f"evaluation: logsumexp, {key}", explained, abs(value - expected), note))
    return items


def _positions_item(name: str, seen: Sequence[Mapping[str, Any]], pair: Pair, k: Tensor) -> Item:
    exact, rounded = pair.exact, pair.rounded
    items = []
    total = 0
    for entry in seen:
        inside = (k >= entry["from"]) & (k <= entry["to"]) & (exact.weights != 0)
        total += int(inside.sum())
        where = f"k {entry['from']} to {entry['to']}"
        if entry["tokens"] != int(inside.sum()):
            items.append(Item(name, 0.0, math.inf, f"{where}: {entry['tokens']} tokens, oracle {int(inside.sum())}"))
            continue
        for key, weights in (("loss", torch.ones_like(exact.weights)), ("weighted_loss", exact.weights)):
            truth = float((weights * exact.losses)[inside].mean())
            error = float((weights * (rounded.losses - exact.losses).abs())[inside].mean())
            explained = (MULTIPLE * error + epsilon(torch.float32) * truth) / truth
            items.append(Item(name, explained, abs(entry[key] / truth - 1.0), f"{where}: {key}"))
    if total != int((exact.weights != 0).sum()):
        return Item(name, 0.0, math.inf, f"{total} tokens are in a range of k")
    worst = max(items, key=lambda item: item.strain)
    return replace(worst, note=f"{len(seen)} ranges of k, worst {worst.note}")


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
