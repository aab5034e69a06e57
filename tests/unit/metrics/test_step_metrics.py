"""Rates of steps that are reported together: their tokens over their time, on every line the same."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from seqaware.data.packing import StepWork
from seqaware.metrics.step_metrics import PendingStep, StepReporter


class Shown:
    """What goes to metrics.jsonl, and what to the screen."""

    def __init__(self) -> None:
        self.written: list[dict[str, Any]] = []
        self.shown: list[dict[str, Any]] = []

    def write(self, line: dict[str, Any]) -> None:
        self.written.append(line)

    def step(self, line: dict[str, Any]) -> None:
        self.shown.append(line)


class TokensPerSecond:
    """A speedometer whose mfu is the tokens a second of the works that it is given."""

    def figures(self, works: list[StepWork], *, seconds: float) -> dict[str, float]:
        return {"mfu": sum(work.tokens for work in works) / seconds, "peak_memory_gb": 1.0}


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Iterator[SimpleNamespace]:
    now = SimpleNamespace(time=100.0)
    monkeypatch.setattr("seqaware.metrics.step_metrics.time.perf_counter", lambda: now.time)
    yield now


def _reporter(shown: Shown, *, log_every: int) -> StepReporter:
    return StepReporter(
        normalize_by="weight",
        log_every=log_every,
        speedometer=TokensPerSecond(),  # type: ignore[arg-type]
        metrics=shown,  # type: ignore[arg-type]
        progress=shown,  # type: ignore[arg-type]
    )


def _pending(step: int, *, tokens: int, waited: float = 0.0) -> PendingStep:
    values = {"sequences": 1, "supervised_tokens": tokens // 2, "tokens": tokens, "loss": 1.0}
    values |= {"unweighted_loss": 1.0, "weight_sum": 1.0, "accuracy": 0.0}
    result: Any = SimpleNamespace(sums=SimpleNamespace(metrics=lambda normalize_by: values), grad_norm=1.0)
    return PendingStep(step, 0.1, 1e-3, result, StepWork(tokens, tokens, 2 * tokens), waited)


def test_steps_that_are_reported_together_have_the_rates_of_all_of_them(clock: SimpleNamespace) -> None:
    shown = Shown()
    reporter = _reporter(shown, log_every=2)
    assert reporter.step(_pending(1, tokens=300, waited=0.5)) == []
    clock.time += 4.0
    first, second = reporter.step(_pending(2, tokens=100))
    for line in (first, second):
        assert (line["step_seconds"], line["tokens_per_second"], line["mfu"]) == (2.0, 100.0, 100.0)
        assert (line["supervised_tokens_per_second"], line["wait_share"], line["padding_share"]) == (50.0, 0.125, 0.5)
    assert (first["tokens"], second["tokens"]) == (300, 100)
    assert shown.written == [first, second] and shown.shown == [second], "the screen has the newest step"


def test_steps_end_when_the_one_after_them_began(clock: SimpleNamespace) -> None:
    reporter = _reporter(Shown(), log_every=5)
    reporter.step(_pending(1, tokens=100))
    clock.time += 10.0
    (line,) = reporter.flush(until=102.0)
    assert line["step_seconds"] == 2.0
    assert reporter.flush() == []
