"""A run, assembled: prepare, plan, claim the folder, connect the ranks, build the engine, train, evaluate, export."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from seqaware.config.schema import Config
from seqaware.engine.attention import choose_backend
from seqaware.engine.checkpoint import RunState, export_model, load_checkpoint, save_checkpoint, set_aside_later
from seqaware.engine.engine import Engine
from seqaware.engine.model import DTYPES, LoadOptions, WeightedCausalLM, build_initial_model, load_model, local_or_hub
from seqaware.engine.probe import Probe, probe_head, probe_isolation
from seqaware.engine.ranks import RankAddress, Ranks, connect, gpu_is_visible
from seqaware.plan.facts import World
from seqaware.plan.plan import Plan
from seqaware.report.metrics import MetricsFile
from seqaware.report.progress import ProgressDisplay, RowCounter
from seqaware.report.steps import StepReporter
from seqaware.training.batches import RowFormat, StepBatches
from seqaware.training.folder import RunFolder, check_claim, check_disk, claim, finish, is_finished, resume_point
from seqaware.training.held_out import HeldOut
from seqaware.training.loop import Due, train_steps
from seqaware.training.prepare import Prepared, prepare
from seqaware.training.summary import model_card, summary_lines

Say = Callable[[str], None]


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


def world_of(address: RankAddress) -> World:
    """The ranks as the Plan counts them."""
    cuda = gpu_is_visible()
    bf16 = True
    if cuda:
        import torch

        bf16 = torch.cuda.is_bf16_supported()
    return World(address.size, address.local_size, address.nodes, "cuda" if cuda else "cpu", bf16)


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
    engine = _build_engine(prepared, _model_source(prepared, folder), ranks=ranks, say=say)
    if ranks.is_first:
        claim(folder, plan, address=address)
        set_aside_later(folder.checkpoints, done)
    ranks.barrier()
    if checkpoint:
        load_checkpoint(engine, checkpoint)
        say(f"resumed     after step {done}, from {checkpoint}")
    _train(prepared, engine, folder=folder, done=done, say=say)
    return folder.path


def _standing(request: RunRequest, prepared: Prepared, folder: RunFolder) -> tuple[Path | None, int, bool]:
    """The checkpoint to go on from, its step, and whether nothing is left to do; refuses a folder of another run."""
    plan = prepared.plan
    check_claim(folder, plan, resume=request.resume)
    checkpoint, done = resume_point(folder, plan, resume=request.resume)
    finished = done == plan.total_steps and is_finished(folder, plan)
    if not finished:
        check_disk(folder.path, plan, prepared.parameters)
    return checkpoint, done, finished


def _model_source(prepared: Prepared, folder: RunFolder) -> str:
    model = prepared.plan.config.model
    if model.from_scratch is None:
        assert model.base_name is not None
        return local_or_hub(model.base_name)
    folder.path.mkdir(parents=True, exist_ok=True)
    built = build_initial_model(
        model.from_scratch,
        seed=prepared.plan.config.training.control.seed,
        tokenizer=prepared.tokenizer,
        folder=folder.initial,
    )
    return str(built)


def _build_engine(prepared: Prepared, source: str, *, ranks: Ranks, say: Say) -> Engine:
    plan = prepared.plan
    config = plan.config.model
    options = LoadOptions(
        dtype=DTYPES[plan.dtype],
        dropout=config.dropout,
        activation_checkpointing=config.activation_checkpointing,
        revision=config.revision if config.from_scratch is None else None,
        trust_remote_code=config.trust_remote_code,
        deepspeed=plan.deepspeed,
    )
    model = WeightedCausalLM(load_model(source, options), loss_kernel=config.loss_kernel)
    text_config = model.model.config.get_text_config()
    head_dim = getattr(text_config, "head_dim", None) or text_config.hidden_size // text_config.num_attention_heads
    choice = choose_backend(config.attention, device=ranks.device.type, dtype=options.dtype, head_dim=head_dim)
    say(f"attention   {choice.backend} ({choice.reason})")
    engine = Engine(plan, ranks=ranks, model=model, weighting=prepared.weighting, attention_backend=choice.backend)
    vocabulary = text_config.vocab_size
    probe = Probe(choice.backend, vocabulary, ranks.device, packed=plan.config.packing.enabled)
    report = probe_isolation(model, probe)
    say(f"isolation   documents of one row do not see each other (change {report.leak:.1e} of {report.tolerance:.1e})")
    if config.loss_kernel == "fused":
        probe_head(model, probe)
    return engine


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
        if held_out is not None and done == 0:
            reporter.event({"kind": "evaluation", "step": 0, **held_out.loss()})
        train_steps(plan, engine=engine, batches=batches, reporter=reporter, due=Due(save, evaluate), done=done)
        if plan.config.output.save_model:
            export_model(engine, folder.model, tokenizer=prepared.tokenizer)
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


def row_format(plan: Plan, prepared: Prepared) -> RowFormat:
    """How this run lays documents into rows."""
    tokenizer, sft = prepared.tokenizer, plan.config.training.sft
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    return RowFormat(
        capacity=plan.batches.micro_batch_tokens,
        packed=plan.config.packing.enabled,
        positions=sft.positions,
        on_split=sft.on_split,
        pad_id=int(pad),
    )


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
