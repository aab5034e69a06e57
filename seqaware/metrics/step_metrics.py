"""From an optimizer step's sums to a line of `metrics.jsonl` and a line of progress."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from seqaware.data.packing import StepWork
from seqaware.engine.engine import StepResult
from seqaware.metrics.metrics_file import MetricsWriter
from seqaware.metrics.progress import ProgressDisplay
from seqaware.metrics.throughput import Speedometer
from seqaware.objective.sums import NormalizeBy

Figures = Mapping[str, float]


@dataclass(frozen=True)
class PendingStep:
    """A step that ran but whose figures are still on the device.

    Attributes:
        waited: seconds it waited for its micro-batches, on this rank.
    """

    step: int
    epoch: float
    learning_rate: float
    result: StepResult
    work: StepWork
    waited: float


class StepReporter:
    """Collects steps and reports them every `log_every` steps: only then does the host wait for the device.

    Every rank has one, so that every rank knows the losses; only rank 0's has outputs.

    Args:
        speedometer: tells how well the time was used. metrics, progress: where lines go; None on the other ranks.
    """

    def __init__(
        self,
        *,
        normalize_by: NormalizeBy,
        log_every: int,
        speedometer: Speedometer,
        metrics: MetricsWriter | None,
        progress: ProgressDisplay | None,
    ) -> None:
        self._normalize_by = normalize_by
        self._log_every = log_every
        self._speedometer = speedometer
        self._metrics = metrics
        self._progress = progress
        self._pending: list[PendingStep] = []
        self._clock = time.perf_counter()

    def step(self, pending: PendingStep) -> list[dict[str, Any]]:
        """Take in a step; report all that wait when their time has come. Returns the lines that were reported."""
        self._pending.append(pending)
        return self.flush() if pending.step % self._log_every == 0 else []

    def flush(self, *, until: float | None = None) -> list[dict[str, Any]]:
        """Report the steps that wait, and return their lines.

        Args:
            until: when they were over, by time.perf_counter; None: now.
        """
        if not self._pending:
            return []
        figures = [waiting.result.sums.metrics(self._normalize_by) for waiting in self._pending]
        norms = [float(waiting.result.grad_norm) for waiting in self._pending]
        now = time.perf_counter() if until is None else until
        speed = self._speed(figures, seconds=now - self._clock)
        self._clock = now
        lines = [
            {**self._line(waiting, values, norm=norm), **speed, "padding_share": waiting.work.padding_share}
            for waiting, values, norm in zip(self._pending, figures, norms, strict=True)
        ]
        self._pending.clear()
        self._report(lines)
        return lines

    def _speed(self, figures: Sequence[Figures], *, seconds: float) -> dict[str, float]:
        """One for all the steps that wait: the host cannot tell how their time went over to the device's queue."""
        tokens, supervised = (sum(each[name] for each in figures) for name in ("tokens", "supervised_tokens"))
        waited = sum(waiting.waited for waiting in self._pending)
        return {
            "step_seconds": round(seconds / len(self._pending), 6),
            "tokens_per_second": round(tokens / seconds, 3),
            "supervised_tokens_per_second": round(supervised / seconds, 3),
            **self._speedometer.figures([waiting.work for waiting in self._pending], seconds=seconds),
            "wait_share": round(min(1.0, waited / seconds), 6),
        }

    def _line(self, waiting: PendingStep, values: Figures, *, norm: float) -> dict[str, Any]:
        counts = {name: int(values[name]) for name in ("sequences", "supervised_tokens", "tokens")}
        return {
            "kind": "step",
            "step": waiting.step,
            "epoch": round(waiting.epoch, 6),
            "loss": values["loss"],
            "unweighted_loss": values["unweighted_loss"],
            "grad_norm": norm,
            "lr": waiting.learning_rate,
            **counts,
            "weight_sum": values["weight_sum"],
            "accuracy": values["accuracy"],
        }

    def _report(self, lines: list[dict[str, Any]]) -> None:
        if self._metrics is not None:
            for line in lines:
                self._metrics.write(line)
        if self._progress is not None:
            self._progress.step(lines[-1])

    def skip_time(self) -> None:
        """Forget the time since the last report: an evaluation or a checkpoint is no part of a step."""
        self._clock = time.perf_counter()

    def event(self, line: Mapping[str, Any]) -> None:
        """Write a line that is not a step (an evaluation, say)."""
        if self._metrics is not None:
            self._metrics.write(line)

    def go_back(self, step: int) -> None:
        """The run goes back to `step`: its later steps are told anew."""
        if self._metrics is not None:
            self._metrics.go_back(step)
        if self._progress is not None:
            self._progress.go_back()

    def say(self, text: str) -> None:
        if self._progress is not None:
            self._progress.say(text)

    def close(self) -> None:
        if self._progress is not None:
            self._progress.close()
        if self._metrics is not None:
            self._metrics.close()
