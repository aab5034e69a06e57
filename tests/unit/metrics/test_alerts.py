"""Alerts speak once, in words, and not about what is usual."""

from __future__ import annotations

import random
from typing import Any

import pytest

from seqaware.metrics.alerts import Alerts, Limits
from tests.unit.report.runs import step_line


def _heard(lines: list[dict[str, Any]], *, limits: Limits | None = None) -> list[str]:
    alerts = Alerts(limits or Limits(max_grad_norm=1.0, total_steps=400))
    return [text for line in lines for text in alerts.see(line)]


def _falling(steps: int, **changes: Any) -> list[dict[str, Any]]:
    noise = random.Random(0)
    return [step_line(i, loss=0.3 + 3 / i + noise.uniform(-0.05, 0.05), **changes) for i in range(1, steps + 1)]


def test_a_healthy_run_hears_nothing_even_where_its_rate_ends_at_zero() -> None:
    lines = _falling(400)
    for line in lines[-4:]:
        line["lr"] = 0.0
    assert _heard(lines) == []


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"grad_norm": 3.0}, "clipped at each of the last 50 steps (median norm 3, max_grad_norm 1)"),
        ({"grad_norm": 0.0}, "the gradient was 0"),
        ({"lr": 0.0}, "the learning rate is 0, and 395 steps are left"),
    ],
)
def test_what_is_wrong_is_said_once(changes: dict[str, Any], word: str) -> None:
    heard = _heard(_falling(150, **changes))
    assert len(heard) == 1 and word in heard[0]


def test_a_rank_that_is_slower_than_the_rest_is_named_until_it_is_not() -> None:
    def pace(*seconds: float) -> dict[str, Any]:
        return {"kind": "pace", "step": 20, "seconds": seconds, "hosts": ["a", "a", "b", "b"]}

    slow = pace(0.010, 0.011, 0.010, 0.020)
    heard = _heard([pace(0.010, 0.011, 0.010, 0.012), slow, slow, step_line(21, loss=1.0), slow])
    assert len(heard) == 1 and "rank 3 on b computes 2.0 times slower" in heard[0]
    assert len(_heard([slow, pace(0.01, 0.01, 0.01, 0.01), slow])) == 2
    assert _heard([pace(0.010, 0.015)]) != []  # of two, the faster one is what a rank can do
    assert _heard([pace(0.0, 0.0), pace(0.0, 1.0)]) == []  # a damaged line


def test_one_step_without_clipping_is_enough() -> None:
    lines = _falling(400, grad_norm=3.0)
    for line in lines[::49]:
        line["grad_norm"] = 0.9
    assert _heard(lines) == []
    assert _heard(_falling(150, grad_norm=3.0), limits=Limits(0.0, 400)) == []


def test_a_loss_that_rises_for_good_is_divergence_and_a_single_spike_is_none() -> None:
    lines = _falling(200)
    lines[150]["unweighted_loss"] = 50.0
    assert _heard(lines) == []
    lines += [step_line(step, loss=2.0) for step in range(201, 260)]
    heard = _heard(lines)
    assert len(heard) == 1 and "the loss rises" in heard[0]
