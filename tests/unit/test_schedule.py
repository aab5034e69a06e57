"""The learning rate's shape and its exact end values."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from seqaware.schedule import Curve, Kind, learning_rate

DECAYING: tuple[Kind, ...] = ("linear", "cosine", "polynomial", "wsd")
PLAIN: Curve = {
    "peak": 1.0,
    "total_steps": 10,
    "warmup_steps": 0,
    "kind": "constant",
    "min_ratio": 0.0,
    "power": 1.0,
    "decay_ratio": 0.1,
}
KINDS: tuple[Kind, ...] = ("constant", *DECAYING)


def rate(step: int, **changes: Any) -> float:
    curve: Curve = {**PLAIN, **changes}  # type: ignore[typeddict-item]
    return learning_rate(step, **curve)


@pytest.mark.parametrize("kind", KINDS)
def test_warm_up_rises_linearly_from_peak_over_warmup_to_the_peak(kind: Kind) -> None:
    rates = [rate(step, peak=8.0, total_steps=20, warmup_steps=4, kind=kind) for step in range(1, 5)]
    assert rates == [2.0, 4.0, 6.0, 8.0]


@pytest.mark.parametrize("kind", KINDS)
def test_without_warm_up_the_first_step_has_the_peak(kind: Kind) -> None:
    assert rate(1, peak=3e-4, total_steps=10, kind=kind) == 3e-4


@pytest.mark.parametrize("kind", DECAYING)
@pytest.mark.parametrize("min_ratio", [0.0, 0.1, 1.0])
def test_the_lowest_rate_would_come_one_step_after_the_last(kind: Kind, min_ratio: float) -> None:
    """The last examples are trained on too: a run to zero still has a rate above zero at its last step."""
    curve = {"peak": 3e-4, "warmup_steps": 5, "kind": kind, "min_ratio": min_ratio, "power": 2.0, "decay_ratio": 0.5}
    last, before = rate(50, total_steps=50, **curve), rate(49, total_steps=50, **curve)
    assert last >= 3e-4 * min_ratio and (last > 0.0)
    assert before > last or min_ratio == 1.0
    # wsd decays over the last 25 steps, the others over 45; the steepest, power 2, ends at a share of (1/46)².
    share = {"linear": 1 / 46, "wsd": 1 / 26, "polynomial": (1 / 46) ** 2, "cosine": math.sin(math.pi / 92) ** 2}[kind]
    assert last == pytest.approx(3e-4 * (min_ratio + (1 - min_ratio) * share))


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_of_one_step_trains_at_the_peak(kind: Kind) -> None:
    assert rate(1, peak=1e-3, total_steps=1, kind=kind) == 1e-3


def test_constant_stays_at_the_peak_to_the_end() -> None:
    assert {rate(step, peak=0.5, total_steps=9, warmup_steps=2) for step in range(2, 10)} == {0.5}


# 10 steps without a warm-up: step 1 is the peak, step 11 would be the end, step 6 is exactly the middle.
@pytest.mark.parametrize(
    ("kind", "middle"),
    # cos: (1 + cos(π/2)) / 2 = 1/2 within one rounding of sin(π/4)² in float64, hence approx at its default 1e-6.
    [("linear", 0.5), ("cosine", 0.5), ("polynomial", 0.125)],
)
def test_the_middle_of_the_decay(kind: Kind, middle: float) -> None:
    assert rate(6, peak=1.0, total_steps=10, kind=kind, power=3.0) == pytest.approx(middle)


def test_cosine_is_the_cosine() -> None:
    for step in range(1, 101):
        expected = 0.1 + 0.9 * (1 + math.cos(math.pi * (step - 1) / 100)) / 2
        assert rate(step, peak=1.0, total_steps=100, kind="cosine", min_ratio=0.1) == pytest.approx(expected)


def test_wsd_is_stable_and_then_decays_over_its_share() -> None:
    rates = [
        rate(step, peak=1.0, total_steps=20, warmup_steps=2, kind="wsd", decay_ratio=0.25) for step in range(1, 21)
    ]
    assert rates[:2] == [0.5, 1.0]
    assert rates[2:15] == [1.0] * 13
    assert rates[15:] == pytest.approx([5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6])


def test_wsd_decays_after_a_warm_up_that_reaches_into_its_share() -> None:
    rates = [rate(step, peak=1.0, total_steps=10, warmup_steps=6, kind="wsd", decay_ratio=1.0) for step in range(6, 11)]
    assert rates == pytest.approx([1.0, 0.8, 0.6, 0.4, 0.2])


@given(
    total=st.integers(1, 300),
    warmup_share=st.floats(0, 1),
    kind=st.sampled_from(KINDS),
    min_ratio=st.floats(0, 1),
    power=st.floats(0.1, 4),
    decay_ratio=st.floats(0.01, 1),
)
def test_it_rises_to_the_peak_and_never_rises_again(
    total: int, warmup_share: float, kind: Kind, min_ratio: float, power: float, decay_ratio: float
) -> None:
    warmup = int(warmup_share * total)
    rates = [
        rate(
            step,
            peak=2.0,
            total_steps=total,
            warmup_steps=warmup,
            kind=kind,
            min_ratio=min_ratio,
            power=power,
            decay_ratio=decay_ratio,
        )
        for step in range(1, total + 1)
    ]
    top = max(warmup, 1) - 1
    assert rates[top] == 2.0
    assert all(before < after for before, after in pairwise(rates[: top + 1]))
    # min + (1 − min) · share rounds twice, so equal shares may differ by two units in the last place.
    assert all(before >= after - 1e-15 for before, after in pairwise(rates[top:]))
    assert all(2.0 * min_ratio - 1e-15 <= rate <= 2.0 + 1e-15 for rate in rates[top:])


@pytest.mark.parametrize("step", [0, 11])
def test_a_step_outside_the_run_is_our_own_error(step: int) -> None:
    with pytest.raises(AssertionError):
        rate(step, peak=1.0, total_steps=10)
