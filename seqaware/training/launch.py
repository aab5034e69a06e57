"""A run, assembled: prepare, plan, claim the folder, connect the ranks, build the engine, train, evaluate, export."""

from __future__ import annotations

import time
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path

from seqaware.checkpoint.checkpointer import Checkpoints
from seqaware.checkpoint.manifest import Listing, RunState
from seqaware.checkpoint.retention import Retention, set_aside_later
from seqaware.compat.operators import remove_swap_files
from seqaware.config.schema import Config
from seqaware.distributed.collective_errors import not_written, raise_collectively
from seqaware.distributed.launch_environment import LaunchEnvironment
from seqaware.distributed.process_group import Ranks, connect, environment, group_timeout_minutes
from seqaware.distributed.rendezvous import Patience
from seqaware.engine.engine import Engine
from seqaware.engine.random_state import begin_randomness
from seqaware.errors import CheckpointError, StorageError
from seqaware.estimate.render_plan import render_plan
from seqaware.metrics.progress import RowCounter
from seqaware.metrics.trackers import check_trackers
from seqaware.models.isolation_check import probe_head, probe_isolation
from seqaware.plan.offload import swap_folders
from seqaware.plan.plan import Plan
from seqaware.training.assembly import build_engine, model_source, probe_of, world_of
from seqaware.training.loop import TrainState
from seqaware.training.preemption import Signals
from seqaware.training.prepare import Prepared, prepare
from seqaware.training.process import Process, Say
from seqaware.training.resume import (
    ResumePoints,
    ResumeRequest,
    check_names,
    first_valid,
    refuse_different_plans,
    resume_points,
    unrecorded,
)
from seqaware.training.run_directory import (
    RunDirectory,
    allowed_before,
    attempts_before,
    check_claim,
    check_disk,
    claim,
    finish,
    is_finished,
)
from seqaware.training.run_lock import locked_run
from seqaware.training.session import Session
from seqaware.training.summary import model_card, summary_lines
from seqaware.watchdog.heartbeat import Heartbeat


@dataclass(frozen=True)
class RunRequest:
    """What the command line asks for.

    Attributes:
        deepspeed_path: the ZeRO json, or None for the config's.
        resume: "auto", "never" or a checkpoint's folder.
        resume_anyway: names of `Plan.mathematics()` that may differ from those of the run that is resumed.
    """

    config: Config
    deepspeed_path: Path | None = None
    resume: str = "auto"
    resume_anyway: tuple[str, ...] = ()

    @property
    def wish(self) -> ResumeRequest:
        """`resume`, and whose start this is."""
        return ResumeRequest.of(self.resume, environment())


def run(
    request: RunRequest,
    *,
    address: LaunchEnvironment,
    say: Say,
    signals: Signals | None = None,
    heartbeat: Heartbeat | None = None,
) -> Path:
    """Train as the config says, on these ranks. Every rank calls it; returns the run's folder.

    Args:
        say: shows a line to the person (rank 0's goes to the screen). signals: those that this process catches.
        heartbeat: hears what the run turns to.

    Raises:
        Left: the run was asked to leave; the same command goes on.
        SeqawareError: something a person has to mend.
    """
    check_names(request.resume_anyway)
    process = Process(address, say, signals or Signals(), heartbeat or Heartbeat())
    phase = process.heartbeat.phase
    if address.alone is not None:
        say(f"warning     {address.alone}")
    if address.rank == 0:
        check_trackers(request.config.logging, environment())
    phase("tokenising")
    counter = RowCounter(say)

    def rows_done(rows: int) -> None:
        process.heartbeat.pulse()
        counter(rows)

    prepared = prepare(
        request.config, world=world_of(address), deepspeed_path=request.deepspeed_path, progress=rows_done
    )
    folder = RunDirectory(Path(prepared.plan.config.output_dir))
    with ExitStack() as stack:
        standing = _standing(request, prepared, process, stack=stack) if address.rank == 0 else None
        phase("connecting")
        faults = prepared.plan.config.faults
        patience = Patience(faults.connect_minutes, tell=process.tell)
        ranks = connect(address, timeout_minutes=group_timeout_minutes(faults.hang_minutes), patience=patience)
        # Rank 0 alone decides where to go on: hosts may see different files.
        points: ResumePoints | None = ranks.agree(standing)
        refuse_different_plans(prepared.plan, ranks)
        if points is None:
            total = prepared.plan.total_steps
            say(f"complete: all {total} steps of this run are done; its model and results are in {folder.path}")
            return folder.path
        checkpoint = first_valid(points, prepared.plan, ranks, say=say)
        _work(request, prepared, checkpoint, ranks=ranks, process=process)
    return folder.path


def _work(
    request: RunRequest, prepared: Prepared, checkpoint: Listing | None, *, ranks: Ranks, process: Process
) -> None:
    plan, say, phase = prepared.plan, process.say, process.heartbeat.phase
    folder = RunDirectory(Path(plan.config.output_dir))
    say(render_plan(plan, settings=False))
    phase("loading the model")
    engine = build_engine(prepared, model_source(prepared, folder), ranks=ranks, say=say)
    engine.phase = phase
    _probe(engine, plan, say=say)
    state = None if checkpoint is None else checkpoint.state
    course = TrainState(0) if state is None else TrainState(state.step, list(state.passed_over))
    _begin_attempt(folder, plan, state, wish=request.wish, ranks=ranks, heartbeat=process.heartbeat)
    output = plan.config.output
    keep = Retention(output.keep_last, output.keep_every, output.keep_best)
    checkpoints = Checkpoints(engine, folder.checkpoints, keep=keep, asynchronous=output.async_save)
    begin_randomness(plan.config.training.control.seed, step=course.done, rank=ranks.rank)
    if checkpoint is not None:
        phase("loading the checkpoint", course.done)
        checkpoints.load(checkpoint)
        say(f"resumed     after step {course.done}, from {checkpoint.path}")
        if gap := unrecorded(checkpoint.state, plan):
            say(f"warning     {gap}")
    try:
        _train(Session(prepared, engine, folder=folder, course=course, checkpoints=checkpoints, process=process))
    finally:
        checkpoints.close()
    if ranks.address.local_rank == 0:
        remove_swap_files(plan)


def _begin_attempt(
    folder: RunDirectory, plan: Plan, state: RunState | None, *, wish: ResumeRequest, ranks: Ranks, heartbeat: Heartbeat
) -> None:
    """Claim the folder, and let every rank's log go on in it. Collective."""

    def begin() -> int:
        number = claim(folder, plan, address=ranks.address, resumed=state, asked=wish)
        if state is None:
            set_aside_later(folder.checkpoints, 0)  # else loading the checkpoint does
        return number

    error = not_written(str(folder.path))
    number: int = ranks.agree(raise_collectively(ranks, begin, on_first_only=True, error=error))
    # Here a rank meets the folder first whose host does not share it, or may not write there.
    raise_collectively(ranks, lambda: heartbeat.settle(folder.path, number), on_first_only=False, error=error)


def _standing(request: RunRequest, prepared: Prepared, process: Process, *, stack: ExitStack) -> ResumePoints | None:
    """Where the run may go on, or None where nothing is left to do; refuses a folder of another run.

    Args:
        stack: holds the folder's lock from now on, if there is something to do.
    """
    plan = prepared.plan
    folder = RunDirectory(Path(plan.config.output_dir))
    if _points(request, plan, folder) is None:
        return None
    check_disk(folder.path, plan, prepared.parameters, trained=prepared.trained_parameters)
    stack.enter_context(locked_run(folder.path, process.address, say=process.say))
    # Again: until just now another run may have been at work here.
    points = _points(request, plan, folder)
    if request.wish.now(attempts_before(folder)) != request.resume:
        process.say(f"resume      started again by itself: the run goes on; --resume {request.resume} has been done")
    return points


def _points(request: RunRequest, plan: Plan, folder: RunDirectory) -> ResumePoints | None:
    """Where the run may go on, or None where it is done. Changes nothing."""
    anyway = request.resume_anyway
    resume = request.wish.now(attempts_before(folder))
    check_claim(folder, plan, resume=resume, anyway=anyway)
    allowed = allowed_before(folder)
    points = resume_points(folder.checkpoints, plan, resume=resume, anyway=anyway, allowed=allowed)
    if points.newest is None:
        return points
    newest = points.newest.path
    if points.newest.manifest.step == plan.total_steps and is_finished(folder, plan):
        return None
    if swap_folders(plan.deepspeed["zero_optimization"]):
        # Measured: the steps after it are not those of a run that never stopped.
        raise CheckpointError(
            "DeepSpeed does not bring back what lay on a drive, so a run that offloads to nvme cannot be resumed",
            got=f"{newest}, and nvme in {plan.deepspeed_path}",
            do="start anew in another output.dir, with ds_configs/zero3_offload_cpu.json if it must be resumable",
        )
    return points


def _probe(engine: Engine, plan: Plan, *, say: Say) -> None:
    probe = probe_of(engine, plan)
    with engine.forward_only():
        report = probe_isolation(engine.wrapped, probe)
    say(
        f"isolation   packed documents of up to {report.tokens:,} tokens do not attend to each other "
        f"(change {report.leak:.1e} of {report.tolerance:.1e})"
    )
    if plan.config.model.loss_kernel == "fused":
        with engine.forward_only():
            probe_head(engine.wrapped, probe)


def _train(session: Session) -> None:
    started = time.monotonic()
    session.process.signals.hold()
    try:
        session.train()
        session.finish()
    except BaseException:
        with suppress(StorageError):  # on a full disk the metrics fail as well, and why the run ends is to be told
            session.reporter.close()
        raise
    for line in _end(session, seconds=time.monotonic() - started):
        session.process.say(line)


def _end(session: Session, *, seconds: float) -> list[str]:
    """Note that the run is complete; what there is to say of it. Collective."""
    plan, folder = session.plan, session.folder

    def note() -> list[str]:
        session.reporter.close()
        if not session.ranks.is_first:
            return []
        lines = summary_lines(plan, folder, seconds=seconds)
        finish(folder, plan, card=model_card(plan, lines))
        return lines

    return raise_collectively(session.ranks, note, on_first_only=False, error=not_written(str(folder.path))) or []
