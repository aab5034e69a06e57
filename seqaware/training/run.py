"""A run, assembled: prepare, plan, claim the folder, connect the ranks, build the engine, train, evaluate, export."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

from seqaware.config.schema import Config
from seqaware.engine.address import RankAddress
from seqaware.engine.checkpoint.export import export_model
from seqaware.engine.checkpoint.load import load_checkpoint
from seqaware.engine.checkpoint.manifest import RunState, set_aside_later
from seqaware.engine.checkpoint.save import save_checkpoint
from seqaware.engine.engine import Engine
from seqaware.engine.first_step import check_losses
from seqaware.engine.operators import remove_swap_files
from seqaware.engine.probe import probe_head, probe_isolation
from seqaware.engine.ranks import Ranks, connect
from seqaware.errors import CheckpointError
from seqaware.plan.offload import swap_folders
from seqaware.plan.plan import Plan
from seqaware.report.metrics import MetricsFile
from seqaware.report.progress import ProgressDisplay, RowCounter
from seqaware.report.steps import StepReporter
from seqaware.training.assembly import Say, build_engine, model_source, probe_of, row_format, world_of
from seqaware.training.batches import StepBatches
from seqaware.training.folder import RunFolder, check_claim, check_disk, claim, finish, is_finished, resume_point
from seqaware.training.held_out import HeldOut
from seqaware.training.loop import Due, train_steps
from seqaware.training.prepare import Prepared, prepare
from seqaware.training.summary import model_card, summary_lines


@dataclass(frozen=True)
class RunRequest:
    """What the command line asks for.

    Attributes:
        deepspeed_path: the ZeRO json, or None for the config's.
        resume: "auto", "never" or a checkpoint's folder.
    """

    config: Config
    deepspeed_path: Path | None = None
    resume: str = "auto"


def run(request: RunRequest, *, address: RankAddress, say: Say) -> Path:
    """Train as the config says, on these ranks. Every rank calls it; returns the run's folder.

    Args:
        say: shows a line to the person (rank 0's goes to the screen).
    """
    prepared = prepare(
        request.config, world=world_of(address), deepspeed_path=request.deepspeed_path, progress=RowCounter(say)
    )
    plan = prepared.plan
    folder = RunFolder(Path(plan.config.output_dir))
    standing = _standing(request, prepared, folder) if address.rank == 0 else None
    ranks = connect(address)
    # Rank 0 alone decides where to go on: hosts may see different files.
    checkpoint, done, finished = ranks.agree(standing)
    if finished:
        say(f"complete: all {done} steps of this run are done; its model and results are in {folder.path}")
        return folder.path
    say(plan.render(settings=False))
    engine = build_engine(prepared, model_source(prepared, folder), ranks=ranks, say=say)
    _probe(engine, plan, say=say)
    if ranks.is_first:
        claim(folder, plan, address=address)
        set_aside_later(folder.checkpoints, done)
    ranks.barrier()
    if checkpoint:
        load_checkpoint(engine, checkpoint)
        say(f"resumed     after step {done}, from {checkpoint}")
    _train(prepared, engine, folder=folder, done=done, say=say)
    if address.local_rank == 0:
        remove_swap_files(plan)
    return folder.path


def _standing(request: RunRequest, prepared: Prepared, folder: RunFolder) -> tuple[Path | None, int, bool]:
    """The checkpoint to go on from, its step, and whether nothing is left to do; refuses a folder of another run."""
    plan = prepared.plan
    check_claim(folder, plan, resume=request.resume)
    checkpoint, done = resume_point(folder, plan, resume=request.resume)
    finished = done == plan.total_steps and is_finished(folder, plan)
    if checkpoint and not finished and swap_folders(plan.deepspeed["zero_optimization"]):
        # Measured: the steps after it are not those of a run that never stopped.
        raise CheckpointError(
            "DeepSpeed does not bring back what lay on a drive, so a run that offloads to nvme cannot be resumed",
            got=f"{checkpoint}, and nvme in {plan.deepspeed_path}",
            do="start anew in another output.dir, with ds_configs/zero3_offload_cpu.json if it must be resumable",
        )
    if not finished:
        check_disk(folder.path, plan, prepared.parameters, trained=prepared.trained_parameters)
    return checkpoint, done, finished


def _probe(engine: Engine, plan: Plan, *, say: Say) -> None:
    probe = probe_of(engine, plan)
    report = probe_isolation(engine.wrapped, probe)
    say(f"isolation   documents of one row do not see each other (change {report.leak:.1e} of {report.tolerance:.1e})")
    if plan.config.model.loss_kernel == "fused":
        probe_head(engine.wrapped, probe)


def _train(prepared: Prepared, engine: Engine, *, folder: RunFolder, done: int, say: Say) -> None:
    plan, ranks = prepared.plan, engine.ranks
    rows = row_format(plan, prepared)
    batches = StepBatches(prepared.store, prepared.order, rows=rows, rank=ranks.rank, size=ranks.size)
    held_out = HeldOut.of(prepared, engine, rows=rows)
    reporter = _reporter(plan, folder, batches=batches, ranks=ranks, done=done)
    started = time.monotonic()

    def save(step: int) -> None:
        epoch, _ = prepared.order.position(step)
        state = RunState(step, epoch, prepared.store.fingerprint, plan.mathematics())
        save_checkpoint(engine, folder.checkpoints, state=state, keep_last=plan.config.output.keep_last)

    def evaluate(step: int) -> None:
        if held_out is not None:
            reporter.event(held_out.evaluate(step, answers=None))

    try:
        if plan.total_steps is not None and done < plan.total_steps:
            check_losses(engine, batches.of_step(done + 1)[0])
        if held_out is not None and done == 0:
            reporter.event({"kind": "evaluation", "step": 0, **held_out.loss()})
        train_steps(plan, engine=engine, batches=batches, reporter=reporter, due=Due(save, evaluate), done=done)
        if plan.config.output.save_model:
            export_model(engine, folder.model, tokenizer=prepared.tokenizer, lora=plan.config.lora)
        if held_out is not None:
            reporter.event(held_out.evaluate(plan.total_steps or 0, answers=folder.answers))
    finally:
        reporter.close()
    if ranks.is_first:
        lines = summary_lines(plan, folder, seconds=time.monotonic() - started)
        finish(folder, plan, card=model_card(plan, lines))
        for line in lines:
            say(line)
    ranks.barrier()


def _reporter(plan: Plan, folder: RunFolder, *, batches: StepBatches, ranks: Ranks, done: int) -> StepReporter:
    assert plan.total_steps is not None
    first = ranks.is_first
    return StepReporter(
        normalize_by=plan.config.training.sft.normalize_by,
        log_every=plan.config.training.control.log_every,
        metrics=MetricsFile(folder.metrics, from_step=done) if first else None,
        progress=ProgressDisplay(plan.total_steps, done=done, style=plan.config.logging.progress) if first else None,
        blame=batches.names_of_step,
    )
