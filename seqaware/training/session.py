"""A run under way: what its ranks do between the steps, and where they go when something goes wrong."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import NoReturn

from seqaware.checkpoint.checkpointer import Checkpoints
from seqaware.checkpoint.engine_export import export_model
from seqaware.checkpoint.manifest import Listing, RunState, inspect, named_checkpoints, step_of
from seqaware.data.batch_loader import StepBatches
from seqaware.data.collate import Batch
from seqaware.distributed.collective_errors import not_written, raise_collectively
from seqaware.distributed.process_group import Votes, environment
from seqaware.engine.engine import Engine, StepResult
from seqaware.engine.loss_check import check_losses
from seqaware.errors import CheckpointError
from seqaware.evaluation.evaluator import Evaluator
from seqaware.metrics.alerts import Alerts, Limits
from seqaware.metrics.metrics_file import MetricsWriter, read_metrics
from seqaware.metrics.progress import ProgressDisplay
from seqaware.metrics.sinks import ReportingMetricsWriter
from seqaware.metrics.step_metrics import StepReporter
from seqaware.metrics.throughput import Speedometer
from seqaware.metrics.tracker_services import TrackedRun, openings
from seqaware.metrics.trackers import Trackers, secrets_in
from seqaware.training.assembly import row_format
from seqaware.training.divergence import DivergenceError, SpikeDetector, SpikeError, not_finite, suspect_documents
from seqaware.training.loop import Due, TrainingLoop, TrainState
from seqaware.training.preemption import (
    Minutes,
    PreemptedExit,
    PreemptionMonitor,
    ShutdownRequest,
    clock_ahead_of_job,
    seconds_until_shutdown,
)
from seqaware.training.prepare import Prepared
from seqaware.training.process import Process, Say
from seqaware.training.profiler import ProfileWindow
from seqaware.training.run_directory import RunDirectory
from seqaware.watchdog.stragglers import measure_stragglers

_NAMED = 8


class Session:
    """Trains, and does what is due between steps. Every method is collective, and so is making one.

    Args:
        course: where the run stands: a checkpoint that was loaded, or the beginning.
    """

    def __init__(
        self,
        prepared: Prepared,
        engine: Engine,
        *,
        folder: RunDirectory,
        course: TrainState,
        checkpoints: Checkpoints,
        process: Process,
    ) -> None:
        self.plan = plan = prepared.plan
        assert plan.total_steps is not None, "the plan of a run knows its steps"
        self.total = plan.total_steps
        self.prepared = prepared
        self.engine, self.ranks = engine, engine.ranks
        self.folder = folder
        self.course = course
        self.checkpoints = checkpoints
        self.process = process
        rows = row_format(plan, prepared)
        self.batches = StepBatches(
            prepared.store,
            prepared.order,
            rows=rows,
            rank=self.ranks.rank,
            size=self.ranks.size,
            pinned=self.ranks.device.type == "cuda",
        )
        self.held_out = Evaluator.of(prepared, engine, rows=rows)
        self.votes = Votes(self.ranks)
        self.spikes = SpikeDetector(plan.config.faults)
        self._metrics_error = not_written(str(folder.metrics))
        reporter = raise_collectively(
            self.ranks, lambda: _reporter(self), on_first_only=False, error=self._metrics_error
        )
        assert reporter is not None, "every rank has made one"
        self.reporter = reporter
        self.interrupts = _interrupts(self)

    def train(self) -> None:
        """From where the run stands to its last step, and that step's checkpoint.

        Raises:
            Left: the run was asked to leave; its checkpoint is complete.
            DivergenceError: the losses went wrong more often than the config allows.
            CheckpointError: the last checkpoint could not be written.
            StorageError: the run's folder cannot be written.
        """
        due = Due(
            save=self.save,
            leave=self.leave,
            evaluate=self.evaluate,
            pace=self.pace,
            not_finite=self.not_finite,
            interrupts=self.interrupts,
            votes=self.votes,
            spikes=self.spikes,
            hear_of_saving=self.hear_of_saving,
            profile=_profile(self),
            heartbeat=self.process.heartbeat,
        )
        loop = TrainingLoop(
            self.plan, engine=self.engine, batches=self.batches, reporter=self.reporter, due=due, course=self.course
        )
        self._begin()
        while self.course.done < self.total:
            try:
                loop.run()
            except SpikeError as spike:
                self.go_back(spike)
        self._save(self.total, must=True)
        self._finish_saving()

    def _begin(self) -> None:
        if self.plan.config.faults.spike_factor is not None:
            self.spikes.remember(self.ranks.agree(_reported_steps(self.folder) if self.ranks.is_first else None))
        if self.course.done < self.total:
            check_losses(self.engine, self.batches.of_step(self.course.done + 1)[0])
        held_out, done = self.held_out, self.course.done
        if held_out is not None and done == 0:
            self.process.heartbeat.phase("evaluating", 0)
            loss = held_out.loss(leaving=self.leaving)
            if loss is None:
                raise self._left(0)
            self.reporter.event({"kind": "evaluation", "step": 0, **loss})
        elif (
            held_out is not None
            and held_out.owes(done, self.total, metrics=self.folder.metrics)
            and self.evaluate(done)
        ):
            self.save(done)

    def finish(self) -> None:
        """After the last step: the model's folder, and the last look at the held-out rows.

        Raises:
            Left: the run was asked to leave; the same command does again what is left to do.
        """
        if self.plan.config.output.save_model:
            self.process.heartbeat.phase("exporting", self.total)
            export_model(self.engine, self.folder.model, tokenizer=self.prepared.inference, lora=self.plan.config.lora)
        held_out, metrics = self.held_out, self.folder.metrics
        if held_out is None or held_out.was_reported(self.total, metrics=metrics, answers=self.folder.answers):
            return
        self.process.heartbeat.phase("evaluating", self.total)
        line = held_out.evaluate(self.total, answers=self.folder.answers, leaving=self.leaving)
        if line is None:
            raise self._left(self.total)
        self.reporter.event(line)
        self.checkpoints.note_evaluation(self.total, line["loss"])

    def save(self, step: int) -> None:
        """Write a checkpoint. One that cannot be written is told and tried again later, but for the last."""
        self._save(step, must=step == self.total)

    def leave(self, step: int) -> NoReturn:
        """Save and leave.

        Raises:
            Left: always. CheckpointError: the checkpoint could not be written; the one before it stands.
        """
        self._save(step, must=True)
        self._finish_saving()
        raise self._left(step)

    def _left(self, step: int) -> PreemptedExit:
        """All is saved that is to be: tell that the run leaves, and take back what has asked for it. Collective."""
        reason = self._reason()
        self.interrupts.left()
        self.reporter.event({"kind": "left", "step": step, "reason": reason})
        where = f"after step {step} ({reason}); it is saved, and" if step else f"before the first step ({reason});"
        self.process.say(f"left        {where} the same command goes on from there")
        return PreemptedExit(reason, together=True)

    def leaving(self) -> bool:
        """Whether a rank was asked to leave meanwhile: asked between the parts of a long evaluation."""
        self.process.heartbeat.pulse()
        self.votes.cast(self.interrupts.asked())
        return self.votes.result() == ShutdownRequest.LEAVE

    def evaluate(self, step: int) -> bool:
        """Evaluate the held-out rows; a shutdown request meanwhile ends the run here, and the next one evaluates.

        Returns:
            whether the step is to be saved, because it is among the best (`output.keep_best`).
        """
        if self.held_out is None:
            return False
        self.process.heartbeat.phase("evaluating", step)
        line = self.held_out.evaluate(step, answers=None, leaving=self.leaving)
        if line is None:
            self.leave(step)
        self.reporter.event(line)
        self.interrupts.evaluated()
        return self.checkpoints.note_evaluation(step, line["loss"])

    def pace(self, step: int) -> None:
        """How fast each rank's device computes, where there are several."""
        if self.ranks.size > 1:
            self.reporter.event({"kind": "pace", "step": step, **measure_stragglers(self.ranks)})

    def not_finite(self, step: int, result: StepResult, micro_batches: Sequence[Batch]) -> None:
        """A step was not applied: pass over it, or stop and name its documents.

        Raises:
            DivergenceError: the config says stop, or there have been too many.
        """
        faults, course = self.plan.config.faults, self.course
        documents = suspect_documents(self.engine, result, micro_batches, batches=self.batches, step=step)
        if faults.nonfinite == "skip" and len(course.passed_over) < faults.max_skipped_steps:
            course.passed_over.append(step)
            self.reporter.event({"kind": "skipped", "step": step, "documents": documents})
            self.process.say(
                f"warning     the loss or gradient of step {step} is not finite: it is passed over "
                f"({len(course.passed_over)} of {faults.max_skipped_steps} such steps that are allowed); documents: "
                f"{', '.join(documents[:_NAMED])}"
            )
            return
        if course.done:
            self._save(course.done, must=False)
            self.checkpoints.wait()
            self.hear_of_saving()
        whole = self.checkpoints.complete
        saved = f"step {whole}, the last good one that is saved, is in {self.folder.checkpoints}"
        raise not_finite(step, result, documents, kept=saved if whole else "nothing is saved yet")

    def go_back(self, spike: SpikeError) -> None:
        """Load the checkpoint before a spike, and pass over its step from now on.

        Raises:
            DivergenceError: there have been too many.
        """
        self.checkpoints.wait()
        self.hear_of_saving()
        earlier = self._checkpoint_before(spike.step) if self.ranks.is_first else None
        checkpoint: Listing | None = self.ranks.agree(earlier)
        if checkpoint is None:
            self.process.say(f"warning     {spike}; there is no checkpoint to go back to, so training goes on")
            return
        course, allowed = self.course, self.plan.config.faults.max_skipped_steps
        if len(course.passed_over) >= allowed:
            steps = ", ".join(map(str, [*course.passed_over, spike.step]))
            raise DivergenceError(
                str(spike),
                got=f"{allowed} steps passed over before it, which is all that faults.max_skipped_steps allows",
                do=f"lower training.optimizer.lr, or look at the data of the steps {steps}",
            )
        self.process.heartbeat.phase("loading the checkpoint", spike.step)
        self.checkpoints.load(checkpoint)
        step = checkpoint.manifest.step
        course.passed_over.append(spike.step)
        course.done = step
        self.spikes.forget_after(step)
        raise_collectively(
            self.ranks, lambda: self.reporter.go_back(step), on_first_only=False, error=self._metrics_error
        )
        self.reporter.event(
            {"kind": "rewind", "step": step, "spike": spike.step, "loss": spike.loss, "median": spike.usual}
        )
        self.process.say(
            f"warning     {spike}; back to the checkpoint of step {step}, and step {spike.step} is passed over"
        )

    def _save(self, step: int, *, must: bool) -> None:
        course = self.course
        self.process.heartbeat.phase("saving", step)
        epoch, _ = self.prepared.order.position(step)
        state = RunState.of(self.plan, step=step, epoch=epoch, passed_over=tuple(course.passed_over))
        try:
            self.checkpoints.save(state)
        except CheckpointError as error:
            if must:
                raise
            self._not_saved(step, str(error))
        self.interrupts.saved()  # or not: the next is due in due time, not after every step
        self.hear_of_saving()

    def hear_of_saving(self) -> None:
        """Tell how the checkpoints came out that were written meanwhile. Asked after every step; costs nothing."""
        for outcome in self.checkpoints.poll():
            for warning in outcome.warnings:
                self.process.say(f"warning     {warning}")
            if outcome.problem is not None:
                what = f"the checkpoint of step {outcome.step} could not be written"
                self._not_saved(outcome.step, f"{what}; got {outcome.problem}")
            else:
                self.reporter.event({"kind": "checkpoint", **outcome.figures})

    def _finish_saving(self) -> None:
        self.checkpoints.finish()
        self.hear_of_saving()

    def _not_saved(self, step: int, problem: str) -> None:
        self.reporter.event({"kind": "save_failed", "step": step, "problem": problem})
        self.process.say(f"warning     {problem}; training goes on, and saves again when it is due")

    def _checkpoint_before(self, step: int) -> Listing | None:
        earlier = (path for path in named_checkpoints(self.folder.checkpoints) if step_of(path) < step)
        return next((found for found in map(inspect, earlier) if isinstance(found, Listing)), None)

    def _reason(self) -> str:
        reasons: list[str | None] = self.ranks.gather(self.interrupts.reason)
        return next((reason for reason in reasons if reason), "asked to")


def _profile(session: Session) -> ProfileWindow:
    config, say = session.plan.config.logging.profile, session.process.say
    if config is not None and config.first > session.total:
        ends = f"the run ends with step {session.total}"
        say(f"warning     logging.profile.from is step {config.first}, and {ends}: nothing is recorded")
    folder = session.folder.path / "profile" if session.ranks.is_first else None
    return ProfileWindow(config, folder, last=session.total, device=session.ranks.device, say=say)


def _reported_steps(folder: RunDirectory) -> list[dict[str, object]]:
    return [line for line in read_metrics(folder.metrics) if line["kind"] == "step"] if folder.metrics.exists() else []


def _reporter(session: Session) -> StepReporter:
    plan, done, first = session.plan, session.course.done, session.ranks.is_first
    progress = ProgressDisplay(session.total, done=done, style=plan.config.logging.progress) if first else None
    return StepReporter(
        normalize_by=plan.config.training.sft.normalize_by,
        log_every=plan.config.training.control.log_every,
        speedometer=Speedometer(plan, session.ranks.device),
        metrics=None if progress is None else _metrics_file(session, say=progress.say),
        progress=progress,
    )


def _metrics_file(session: Session, *, say: Say) -> MetricsWriter:
    folder, config, done = session.folder, session.plan.config, session.course.done
    env = environment()
    run = TrackedRun(folder.path, done, config.model_dump(mode="json"))
    return ReportingMetricsWriter(
        folder.metrics,
        from_step=done,
        trackers=Trackers(openings(run, config.logging, env), warn=say, secrets=secrets_in(env)),
        alerts=Alerts(Limits(config.training.optimizer.max_grad_norm, session.total)),
        say=say,
    )


def _interrupts(session: Session) -> PreemptionMonitor:
    process, config = session.process, session.plan.config
    now = time.time()
    if ahead := clock_ahead_of_job(process.address, now=now):
        off = f"{abs(ahead):,.0f} s {'ahead of' if ahead > 0 else 'behind'} the batch system's"
        process.say(f"warning     this host's clock is {off}: its signal alone tells that the time limit is near")
    return PreemptionMonitor(
        process.signals,
        session.folder.path,
        first=session.ranks.is_first,
        seconds_left=seconds_until_shutdown(config.faults, process.address, now=now),
        minutes=Minutes(save=config.output.save_every_minutes, evaluate=config.evaluation.every_minutes),
    )
