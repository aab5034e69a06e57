"""The training loop: the next step's examples, one optimizer step, what is due after it."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from seqaware.data.batch_loader import StepBatches, StepComing
from seqaware.data.collate import Batch
from seqaware.distributed.process_group import Votes
from seqaware.engine.engine import Engine, StepResult
from seqaware.metrics.step_metrics import PendingStep, StepReporter
from seqaware.plan.plan import Plan
from seqaware.schedule import learning_rate
from seqaware.training.divergence import SpikeDetector, SpikeError
from seqaware.training.preemption import PreemptedExit, PreemptionMonitor, ShutdownRequest
from seqaware.training.profiler import ProfileWindow
from seqaware.watchdog.heartbeat import Heartbeat

# The ranks' devices are compared now and then, first once they are warm.
_PACE_STEPS = 100
_PACE_FIRST = 20

Done = TypeVar("Done")


@dataclass
class TrainState:
    """Where a run stands.

    Attributes:
        done: the last step that is over. passed_over: steps that updated nothing, because their numbers went wrong.
    """

    done: int
    passed_over: list[int] = field(default_factory=list)


@dataclass(frozen=True)
class Due:
    """What happens between steps. Each is collective, so every rank calls it after the same step.

    Attributes:
        save: write a checkpoint. leave: write one, and leave (raises `Left`).
        evaluate: the held-out rows; returns whether the step is one of the best, which is saved then.
        pace: how fast each rank computes.
        not_finite: a step was not applied, because its loss or its gradient is not finite; course.done is before it.
        interrupts, votes: what this rank is asked to do, and what all are. spikes: holds losses against the usual.
        profile: records the steps that are to be looked at.
        hear_of_saving: tells what went wrong in the background. heartbeat: hears which step the training turns to.
    """

    save: Callable[[int], None]
    leave: Callable[[int], None]
    evaluate: Callable[[int], bool]
    pace: Callable[[int], None]
    not_finite: Callable[[int, StepResult, Sequence[Batch]], None]
    interrupts: PreemptionMonitor
    votes: Votes
    spikes: SpikeDetector
    hear_of_saving: Callable[[], None]
    profile: ProfileWindow
    heartbeat: Heartbeat


class TrainingLoop:
    """Runs the optimizer steps from course.done + 1 to the last, but for those that are passed over."""

    def __init__(
        self, plan: Plan, *, engine: Engine, batches: StepBatches, reporter: StepReporter, due: Due, course: TrainState
    ) -> None:
        assert plan.total_steps is not None, "the plan of a run knows its steps"
        self._plan = plan
        self._total = plan.total_steps
        self._engine = engine
        self._batches = batches
        self._reporter = reporter
        self._due = due
        self._course = course

    def run(self) -> None:
        """Train to the end.

        Raises:
            SpikeError: a loss is far above what it was; all steps so far are reported.
            Left: the run was asked to leave and has saved.
        """
        profile, first = self._due.profile, self._course.done + 1
        if profile.begins(first):
            profile.start(first)
        self._reporter.skip_time()
        try:
            for coming in self._batches.steps(first, self._total):
                with profile.named(coming.step):
                    asked = self._step(coming)
                self._after(coming.step, asked)
        except (PreemptedExit, SpikeError):
            profile.close()
            raise
        except BaseException:
            profile.drop()  # the word about what went wrong does not wait for a trace
            raise

    def _after(self, step: int, asked: ShutdownRequest) -> None:
        """What is due between this step and the next."""
        due, output, evaluation = self._due, self._plan.config.output, self._plan.config.evaluation
        due.hear_of_saving()
        if due.profile.ends(step):
            self._between_steps(lambda step: due.profile.close(), step)
        is_last = step == self._total
        evaluate = ShutdownRequest.EVALUATE in asked or (evaluation.every_steps and step % evaluation.every_steps == 0)
        best = bool(evaluate) and not is_last and self._between_steps(due.evaluate, step)
        if step % _PACE_STEPS == _PACE_FIRST:
            self._between_steps(due.pace, step)
        if ShutdownRequest.LEAVE in asked and not is_last:
            self._between_steps(due.leave, step)
        elif is_last or best or ShutdownRequest.SAVE in asked or (output.save_every and step % output.save_every == 0):
            self._between_steps(due.save, step)
        if due.profile.begins(step + 1):
            self._between_steps(due.profile.start, step + 1)

    def _step(self, coming: StepComing) -> ShutdownRequest:
        """One step, and what the ranks are asked to do after it."""
        due, course, step, micro_batches = self._due, self._course, coming.step, coming.micro_batches
        due.heartbeat.phase("batches", step)
        due.votes.cast(due.interrupts.asked())
        if step in course.passed_over:
            course.done = step
            return ShutdownRequest(due.votes.result())
        rate = scheduled_rate(self._plan, step)
        begun = time.perf_counter()
        result = self._engine.train_step(micro_batches, learning_rate=rate)
        asked = ShutdownRequest(due.votes.result())
        if result.applied:
            course.done = step
            epoch = self._batches.epoch_after(step)
            self._see(self._reporter.step(PendingStep(step, epoch, rate, result, coming.work, coming.waited)))
        else:
            self._between_steps(lambda step: due.not_finite(step, result, micro_batches), step, until=begun)
            course.done = step
        return asked

    def _see(self, reported: Sequence[dict[str, Any]]) -> None:
        self._due.heartbeat.reported(reported)
        self._due.spikes.see(reported)

    def _between_steps(self, action: Callable[[int], Done], step: int, *, until: float | None = None) -> Done:
        self._see(self._reporter.flush(until=until))
        done = action(step)
        self._reporter.skip_time()
        return done


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
