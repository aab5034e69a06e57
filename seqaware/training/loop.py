"""The training loop: the next step's examples, one optimizer step, what is due after it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from seqaware.engine.engine import Engine
from seqaware.plan.plan import Plan
from seqaware.report.steps import PendingStep, StepReporter
from seqaware.schedule import learning_rate
from seqaware.training.batches import StepBatches


@dataclass(frozen=True)
class Due:
    """What happens between steps: each is collective, so every rank calls it after the same step."""

    save: Callable[[int], None]
    evaluate: Callable[[int], None]


def train_steps(
    plan: Plan, *, engine: Engine, batches: StepBatches, reporter: StepReporter, due: Due, done: int
) -> None:
    """Run optimizer steps done + 1 … total_steps."""
    total = plan.total_steps
    assert total is not None, "the plan of a run knows its steps"
    save_every = plan.config.output.save_every
    evaluate_every = plan.config.evaluation.every_steps
    reporter.skip_time()
    for step, micro_batches in batches.steps(done + 1, total):
        rate = scheduled_rate(plan, step)
        result = engine.train_step(micro_batches, learning_rate=rate)
        reporter.step(PendingStep(step, batches.epoch_after(step), rate, result))
        is_last = step == total
        if evaluate_every and step % evaluate_every == 0 and not is_last:
            _between_steps(reporter, due.evaluate, step)
        if is_last or (save_every and step % save_every == 0):
            _between_steps(reporter, due.save, step)
    reporter.flush()


def scheduled_rate(plan: Plan, step: int) -> float:
    """The learning rate of a step (from 1)."""
    schedule = plan.config.training.schedule
    assert plan.total_steps is not None and plan.batches.warmup_steps is not None
    return learning_rate(
        step,
        peak=plan.config.training.optimizer.lr,
        total_steps=plan.total_steps,
        warmup_steps=plan.batches.warmup_steps,
        kind=schedule.scheduler_type,
        min_ratio=schedule.min_lr_ratio,
        power=schedule.power,
        decay_ratio=schedule.decay_ratio,
    )


def _between_steps(reporter: StepReporter, action: Callable[[int], None], step: int) -> None:
    reporter.flush()
    action(step)
    reporter.skip_time()
