"""What a run and its verification are made of, and both make alike: ranks, rows, the model and its engine."""

from __future__ import annotations

import torch
from transformers import PreTrainedModel

from seqaware.checkpoint.engine_export import end_answers
from seqaware.data.batch_loader import RowFormat
from seqaware.distributed.launch_environment import LaunchEnvironment
from seqaware.distributed.process_group import Ranks, gpu_is_visible
from seqaware.engine.engine import Engine
from seqaware.models.attention_choice import attention_of
from seqaware.models.isolation_check import IsolationProbe
from seqaware.models.layers import arrange_layers
from seqaware.models.lora import Adapters
from seqaware.models.model import DTYPES, LoadOptions, WeightedCausalLM, build_initial_model, load_model, local_or_hub
from seqaware.objective.products import wide_dtype
from seqaware.objective.softmax_pass import choose_kernel
from seqaware.plan.plan import Plan
from seqaware.plan.specs import World
from seqaware.training.prepare import Prepared
from seqaware.training.process import Say
from seqaware.training.run_directory import RunDirectory


def world_of(address: LaunchEnvironment) -> World:
    """The ranks as the Plan counts them."""
    cuda = gpu_is_visible()
    bf16 = True
    if cuda:
        bf16 = torch.cuda.is_bf16_supported()
    return World(address.size, address.local_size, address.nodes, "cuda" if cuda else "cpu", bf16)


def model_source(prepared: Prepared, folder: RunDirectory) -> str:
    """The folder or hub id that every rank loads; a model from scratch is made first, in the run's folder."""
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


def build_engine(prepared: Prepared, source: str, *, ranks: Ranks, say: Say) -> Engine:
    """Load the model as config and ZeRO stage ask, and put the engine round it. Collective; nothing is probed."""
    plan = prepared.plan
    config = plan.config.model
    options = LoadOptions(
        dtype=DTYPES[plan.dtype],
        dropout=config.dropout,
        revision=config.revision if config.from_scratch is None else None,
        trust_remote_code=config.trust_remote_code,
        deepspeed=plan.deepspeed,
        lora=plan.config.lora,
        allow_missing=config.allow_missing,
        seed=plan.config.training.control.seed,
    )
    loaded = load_model(source, options, say=say)
    if loaded.generation_config is not None:
        end_answers(loaded.generation_config, prepared.inference.answer_ends)
    adapters = _adapters(plan, loaded, options)
    if adapters is not None:
        trained = f"{prepared.trained_parameters:,} trained weights to the model's {prepared.parameters:,}"
        say(f"adapters    on {len(adapters.targets.linear)} layers, {trained}")
    arrange_layers(loaded, config, sharded=plan.zero_stage == 3)
    model = WeightedCausalLM(loaded, loss_kernel=config.loss_kernel, adapters=adapters)
    choice = attention_of(model.model, config.attention, device=ranks.device, dtype=options.dtype)
    say(f"attention   {choice.backend} ({choice.reason})")
    say(f"loss        {_loss_words(config.loss_kernel, ranks.device, options.dtype)}")
    return Engine(plan, ranks=ranks, model=model, weighting=prepared.weighting, attention_backend=choice.backend)


def _loss_words(kernel: str, device: torch.device, dtype: torch.dtype) -> str:
    if kernel == "plain":
        return "plain (as the config says: all logits at once, by the model's own head)"
    choice = choose_kernel(device, wide_dtype(dtype))
    return f"fused with its head, softmax by {choice.kernel} ({choice.reason})"


def probe_of(engine: Engine, plan: Plan) -> IsolationProbe:
    """What the start-up probes need to know of this run."""
    vocabulary = engine.wrapped.model.config.get_text_config().vocab_size
    assert plan.data is not None, "the data of a run is prepared by now"
    return IsolationProbe(
        engine.attention_backend,
        vocabulary,
        engine.ranks.device,
        packed=plan.config.packing.enabled,
        longest=min(plan.data.longest, plan.batches.max_seq_length),
        capacity=plan.batches.micro_batch_tokens,
        sequence=engine.sequence,
    )


def _adapters(plan: Plan, model: PreTrainedModel, options: LoadOptions) -> Adapters | None:
    if plan.config.lora is None:
        return None
    seed = plan.config.training.control.seed
    return Adapters(model, plan.config.lora, seed=seed, revision=options.revision, deepspeed=options.deepspeed)


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
        sequence=plan.world.sequence,
    )
