"""The plan as text: what will happen, how each figure came about, and what is not known yet."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from typing import Any

from seqaware.estimate.decoder import GUESSED
from seqaware.estimate.layout import layout_of
from seqaware.estimate.memory import memory
from seqaware.estimate.step_time import collectives
from seqaware.plan.batches import WHEN_TOKENISED
from seqaware.plan.plan import Plan

_LABEL_WIDTH = 12
_GIB = 2**30


def render_plan(plan: Plan, *, settings: bool = True) -> str:
    """The plan as a person reads it, in lines `label  text`; `--dry-run` prints it.

    Args:
        settings: DeepSpeed's too, key by key.
    """
    lines = [
        _line("model", _model(plan)),
        _line("precision", _precision(plan)),
        _line("objective", _objective(plan)),
        *(_line(*line.split(": ", 1)) for line in plan.batches.derivation),
        _line("data", _data(plan)),
        _line("rows", _rows(plan)),
        _line("optimizer", _optimizer(plan)),
        _line("schedule", _schedule(plan)),
        _line("evaluation", _evaluation(plan)),
        _line("output", plan.config.output_dir),
        _line("deepspeed", f"ZeRO stage {plan.zero_stage}, from {plan.deepspeed_path}"),
        *(_line("", f"{key} = {value}") for key, value in _flat(plan.deepspeed) if settings),
        *(_line(label, text) for label, text in _cost(plan)),
        *(_line("note", note) for note in plan.notes),
        _line("identity", _identity(plan)),
    ]
    return "\n".join(lines)


def _line(label: str, text: str) -> str:
    return f"{label:<{_LABEL_WIDTH}}{text}"


def _model(plan: Plan) -> str:
    model, facts = plan.config.model, plan.model
    origin = (
        model.base_name if model.base_name is not None else f"from scratch, seed {plan.config.training.control.seed}"
    )
    if facts is None:
        return f"{origin} (its sizes are not known before its configuration comes from the hub)"
    sizes = {
        "vocabulary": facts.vocab_size,
        "layers": facts.layers,
        "hidden size": facts.hidden_size,
        "at most (tokens)": facts.max_positions,
        "parameters": facts.parameters,
    }
    known = [f"{name} {size:,}" for name, size in sizes.items() if size is not None]
    return f"{origin} ({', '.join([facts.model_type, *known])})"


def _precision(plan: Plan) -> str:
    world, model = plan.world, plan.config.model
    how = "as written" if model.dtype == plan.dtype else f"{model.dtype} on {world.device}"
    extra = {
        "none": "",
        "selective": ", selective activation checkpointing",
        "full": ", activation checkpointing",
        "offload": ", activation checkpointing on the CPU",
    }
    tiles = f", MLPs {model.mlp_tile_tokens} tokens at a time" if model.mlp_tile_tokens else ""
    compiled = ", layers compiled" if model.compile else ""
    return (
        f"{plan.dtype} ({how}), attention {plan.attention}, loss kernel {model.loss_kernel}"
        f"{extra[model.activation_checkpointing]}{tiles}{compiled}"
    )


def _objective(plan: Plan) -> str:
    sft = plan.config.training.sft
    gamma = sft.discount
    others = f"half-life {math.log(0.5) / math.log(gamma):.4g} tokens, " if 0 < gamma < 1 else ""
    others += f"horizon {1 / (1 - gamma):.4g} tokens" if gamma < 1 else "horizon without end"
    return (
        f"{sft.weighting}, γ = {gamma:.6g} ({others}), positions {sft.positions}, scale {sft.scale}, "
        f"divided by {sft.normalize_by} of the whole step"
    )


def _data(plan: Plan) -> str:
    dataset, data = plan.config.dataset, plan.data
    name = dataset.name or " + ".join(part.name for part in dataset.mixture or ())
    if data is None:
        return f"{name}: {WHEN_TOKENISED}"
    if not data.exact:
        return f"{name}: about {data.documents:,} rows; tokens: {WHEN_TOKENISED}"
    # A mixture with proportions draws other documents in every epoch.
    each, about = ("", "") if data.tokens_exact else (" an epoch", "about ")
    return (
        f"{name}: {data.documents:,} sequences{each}, {about}{data.tokens:,} tokens, "
        f"{about}{data.supervised_tokens:,} of them supervised, "
        f"the longest {data.longest:,}; fingerprint {data.fingerprint[:16]}"
    )


def _rows(plan: Plan) -> str:
    data, batches = plan.data, plan.batches
    packed = (
        "packed: documents share rows and never see each other" if plan.config.packing.enabled else "one document a row"
    )
    if data is None or not data.exact or not batches.steps_per_epoch:
        return f"{packed}; tokens of a step: {WHEN_TOKENISED}"
    tokens = data.tokens / batches.steps_per_epoch[0]
    least = max(plan.world.groups, math.ceil(tokens / batches.micro_batch_tokens))
    return f"{packed}; a step has about {tokens:,.0f} tokens, in {least:,} micro-batches or more over all ranks"


def _optimizer(plan: Plan) -> str:
    optimizer = plan.config.training.optimizer
    clipping = f"gradient clipped to norm {optimizer.max_grad_norm:g}" if optimizer.max_grad_norm else "no clipping"
    match optimizer.type:
        case "muon":
            shape = f"momentum {optimizer.momentum:g}, AdamW {_betas(optimizer.betas)} for all but hidden matrices"
        case "lion":
            shape = _betas(optimizer.betas)
        case _:
            shape = f"{_betas(optimizer.betas)}, ε {optimizer.eps:g}"
    return f"{optimizer.type}, lr {optimizer.lr:g}, weight decay {optimizer.weight_decay:g}, {shape}, {clipping}"


def _betas(betas: tuple[float, float]) -> str:
    return f"β {betas[0]:g}, {betas[1]:g}"


def _schedule(plan: Plan) -> str:
    schedule, peak = plan.config.training.schedule, plan.config.training.optimizer.lr
    match schedule.scheduler_type:
        case "constant":
            return f"constant at {peak:g}"
        case "wsd":
            shape = f"wsd, decaying over the last {schedule.decay_ratio:.0%} of the steps"
        case "polynomial":
            shape = f"polynomial of power {schedule.power:g}"
        case kind:
            shape = kind
    return f"{shape}, from {peak:g} towards {peak * schedule.min_lr_ratio:g}"


def _evaluation(plan: Plan) -> str:
    evaluation = plan.config.evaluation
    if evaluation.dataset is None:
        return "none (write evaluation.dataset to have one)"
    often = [f"every {evaluation.every_steps} steps"] if evaluation.every_steps else []
    often += [f"every {evaluation.every_minutes:g} minutes"] if evaluation.every_minutes else []
    when = " and ".join([*often, "at the end"])
    what = "loss" if evaluation.metric == "none" else f"loss and {evaluation.metric.replace('_', ' ')}"
    return f"{what} over {evaluation.dataset.name or 'a mixture'} ({evaluation.dataset.split}), {when}"


def _cost(plan: Plan) -> Iterator[tuple[str, str]]:
    """What a rank holds and sends, where the model's sizes are known."""
    layout = layout_of(plan)
    if layout is None:
        return
    estimate = memory(layout)
    fullest = estimate.moments[estimate.moment]
    parts = ", ".join(f"{part} {size / _GIB:.2f}" for part, size in fullest.items() if size >= _GIB / 200)
    yield "memory", f"about {estimate.peak / _GIB:.2f} GiB of tensors a rank at the {estimate.moment}: {parts}"
    if estimate.host:
        yield "", f"and {estimate.host_peak / _GIB:.2f} GiB offloaded to the CPU"
    if not layout.decoder.exact:
        yield "", GUESSED
    traffic = collectives(layout, micro_batches=1)
    if traffic:
        sent = ", ".join(f"{each.kind} {each.bytes / 1e9:.3g} GB" for each in traffic)
        yield "traffic", f"a step of one micro-batch, each rank: {sent}"


def _identity(plan: Plan) -> str:
    digest = f"{plan.mathematics_hash()[:16]} (objective, model, data, tokenizer, batch, seed, optimizer, schedule)"
    unknown = plan.unknown_mathematics()
    return f"{digest}; not final: {' and '.join(unknown)} will change it" if unknown else digest


def _flat(settings: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    for key, value in settings.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", json.dumps(value)
