"""The learning rate of every optimizer step: a pure function of the step, so that resuming needs no scheduler state.

With S = total_steps, W = max(warmup_steps, 1), p = peak and m = min_ratio:

    warm-up      step 1 … W       p · step / W        (p at step W; without a warm-up, at step 1)
    afterwards   t = (step − W) / (S + 1 − W)   runs over (0, 1), and would be 1 at step S + 1
    constant     p
    linear       p · (m + (1 − m) · (1 − t))
    cosine       p · (m + (1 − m) · (1 + cos πt) / 2)
    polynomial   p · (m + (1 − m) · (1 − t)^power)
    wsd          p until the last ⌈decay_ratio · S⌉ steps (at most S − W), then linear towards p · m

Every schedule but the constant one would come to p · m one step after the last: the examples of the last step are
trained on like all others, also where m = 0.
"""

from __future__ import annotations

import math
from typing import Literal, TypedDict, Unpack

Kind = Literal["constant", "linear", "cosine", "polynomial", "wsd"]


class Curve(TypedDict):
    """A run's learning rate over its steps.

    peak: the highest rate. min_ratio: the rate after the last step, as a share of it. power: of `polynomial`.
    decay_ratio: share of all steps that `wsd` decays over.
    """

    peak: float
    total_steps: int
    warmup_steps: int
    kind: Kind
    min_ratio: float
    power: float
    decay_ratio: float


def learning_rate(step: int, **curve: Unpack[Curve]) -> float:
    """The learning rate of optimizer step `step`, counted from 1, on a `Curve` given by keywords."""
    peak, total_steps, warmup_steps = curve["peak"], curve["total_steps"], curve["warmup_steps"]
    assert 1 <= step <= total_steps, f"step {step} is not in 1 … {total_steps}"
    assert 0 <= warmup_steps <= total_steps, f"warm-up of {warmup_steps} steps in {total_steps}"
    first_peak = max(warmup_steps, 1)
    if step <= first_peak:
        return peak * (step / first_peak)
    if curve["kind"] == "constant":
        return peak
    after, to_come = total_steps - first_peak, total_steps + 1 - step
    left = to_come / (after + 1)
    if curve["kind"] == "wsd":
        decay = min(after, math.ceil(curve["decay_ratio"] * total_steps))
        left = min(1.0, to_come / (decay + 1))
    lowest = curve["min_ratio"]
    return peak * (lowest + (1.0 - lowest) * _shape(left, kind=curve["kind"], power=curve["power"]))


def _shape(left: float, *, kind: Kind, power: float) -> float:
    """1 → 0 over the share `left` of the steps that are still to come."""
    match kind:
        case "cosine":
            # sin² keeps the small values exact: (1 + cos π(1 − left)) / 2 loses them to cancellation.
            return math.sin(0.5 * math.pi * left) ** 2
        case "polynomial":
            return float(left**power)
        case _:
            return left
