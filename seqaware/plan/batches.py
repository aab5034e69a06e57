"""The size of a step, the number of steps, and how each figure came about.

A step is a set of sequences over all ranks. Its size comes from the configuration alone; the ranks only share it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

from seqaware.config.schema import (
    DEFAULT_ACCUMULATION_STEPS,
    DEFAULT_BATCH_SIZE,
    ParametersConfig,
    ScheduleConfig,
    TrainingConfig,
)
from seqaware.errors import ConfigError
from seqaware.plan.specs import DataFacts, ModelFacts, World

DEFAULT_MAX_SEQ_LENGTH = 2048
WHEN_TOKENISED = "not known before the data is tokenised; run `python launcher/prepare.py CONFIG`"


@dataclass(frozen=True)
class BatchPlan:
    """Steps and micro-batches.

    Attributes:
        global_batch_size, global_batch_tokens: the size of a step over all ranks; exactly one of them is None.
        micro_batch_tokens: what one rank holds at once. max_seq_length: tokens a document may have.
        length_known: False while the model's maximum, not known here, may make max_seq_length smaller.
        steps_per_epoch: of every epoch that is begun, up to max_steps; of the first alone where max_steps alone ends
            the run; None while the data is not known.
        total_steps, warmup_steps: of the run; None while they are not known.
        exact: the steps were counted, not guessed from rows or tokens.
        derivation: how each figure came about, a line each.
    """

    global_batch_size: int | None
    global_batch_tokens: int | None
    micro_batch_tokens: int
    max_seq_length: int
    length_known: bool
    steps_per_epoch: tuple[int, ...] | None
    total_steps: int | None
    warmup_steps: int | None
    exact: bool
    derivation: tuple[str, ...]


def derive_batches(
    training: TrainingConfig, *, world: World, model: ModelFacts | None, data: DataFacts | None
) -> BatchPlan:
    """Every figure about batches and steps that follows from what was written.

    Raises:
        ConfigError: a size contradicts the model, the ranks or another size.
    """
    length, why = max_seq_length(training.parameters, model)
    lines = [why]
    schedule = training.schedule
    known = training.parameters.max_seq_length is not None or _maximum_is_known(model)
    # A length that may yet become smaller refuses nothing.
    least = length if known else 1
    size, tokens = _step_size(schedule, least, lines)
    _check_shared(size, world, lines)
    micro = _micro_batch_tokens(schedule, length, least, lines)
    per_epoch = _steps_per_epoch(schedule, size, tokens, data)
    counted = data is not None and data.exact and (size is not None or data.steps_per_epoch is not None)
    exact = counted or schedule.epoch_limit is None
    total = _total_steps(schedule, per_epoch, exact=exact, lines=lines)
    warmup = _warmup_steps(schedule, total, exact=exact, lines=lines)
    return BatchPlan(size, tokens, micro, length, known, per_epoch, total, warmup, exact, tuple(lines))


def max_seq_length(parameters: ParametersConfig, model: ModelFacts | None) -> tuple[int, str]:
    """The tokens a document may have, and how that came about.

    Raises:
        ConfigError: more is written than the model can take.
    """
    written = parameters.max_seq_length
    maximum = model.max_positions if model else None
    if written is None:
        length = min(maximum or DEFAULT_MAX_SEQ_LENGTH, DEFAULT_MAX_SEQ_LENGTH)
        why = f"min(the model's maximum {maximum}, {DEFAULT_MAX_SEQ_LENGTH})" if maximum else _no_maximum(model)
        return length, f"sequence: at most {length} tokens = {why}"
    if maximum is not None and written > maximum:
        raise ConfigError(
            "training.parameters.max_seq_length is more than the model can take",
            got=f"{written}, and the model's maximum is {maximum}",
            do=f"write at most {maximum}, and set format.on_overlong for longer examples",
        )
    return written, f"sequence: at most {written} tokens, as written (the model's maximum: {maximum or 'not known'})"


def _maximum_is_known(model: ModelFacts | None) -> bool:
    return model is not None and (model.max_positions is not None or model.defaults_known)


def _no_maximum(model: ModelFacts | None) -> str:
    if model is None:
        return "default; the model's maximum is not known here"
    if model.defaults_known:
        return "default; the model names no maximum"
    return f"default, or less: model.from_scratch writes no maximum, {model.model_type}'s own decides, not known here"


def _step_size(schedule: ScheduleConfig, length: int, lines: list[str]) -> tuple[int | None, int | None]:
    if schedule.global_batch_tokens is not None:
        tokens = schedule.global_batch_tokens
        if tokens < length:
            raise ConfigError(
                "training.schedule.global_batch_tokens is less than one sequence may have",
                got=f"{tokens}, with max_seq_length {length}",
                do=f"write at least {length}, or a shorter training.parameters.max_seq_length",
            )
        lines.append(f"step: the next sequences that fit {tokens} tokens, over all ranks")
        return None, tokens
    if schedule.global_batch_size is not None:
        lines.append(f"step: {schedule.global_batch_size} sequences over all ranks, as written")
        return schedule.global_batch_size, None
    batch = schedule.batch_size or DEFAULT_BATCH_SIZE
    accumulation = schedule.grad_accumulation_steps or DEFAULT_ACCUMULATION_STEPS
    lines.append(
        f"step: {batch * accumulation} sequences over all ranks = "
        f"batch_size {batch} × grad_accumulation_steps {accumulation}, on any number of ranks"
    )
    return batch * accumulation, None


def _check_shared(size: int | None, world: World, lines: list[str]) -> None:
    where = f"{world.size} on {world.nodes} node(s)"
    if world.sequence > 1:
        where += f" = {world.groups} group(s) of {world.sequence} that share each sequence"
    if size is None:
        lines.append(f"ranks: {where}, which share the tokens of a step")
        return
    groups = world.groups
    if size < groups:
        per_group = "" if world.sequence == 1 else f" in {groups} groups of {world.sequence}"
        raise ConfigError(
            "a batch that the ranks cannot share: fewer sequences in a step than ranks",
            got=f"{size} sequences for {world.size} ranks{per_group}",
            do=f"write training.schedule.global_batch_size: {groups} (or more), "
            f"or start at most {size * world.sequence} ranks",
        )
    share = f"{size / groups:.4g} sequences each on average"
    lines.append(f"ranks: {where}, {share}, balanced by tokens and Σ length²")


def _micro_batch_tokens(schedule: ScheduleConfig, length: int, least: int, lines: list[str]) -> int:
    written = schedule.micro_batch_tokens
    if written is None:
        rows = schedule.batch_size or 1
        most = "" if least == length else "at most "
        lines.append(
            f"micro-batch: {most}{rows * length} tokens a rank holds at once = {rows} × max_seq_length {length}"
        )
        return rows * length
    if written < least:
        raise ConfigError(
            "training.schedule.micro_batch_tokens is less than one sequence may have",
            got=f"{written}, with max_seq_length {least}",
            do=f"write at least {least}, or a shorter training.parameters.max_seq_length",
        )
    lines.append(f"micro-batch: {written} tokens a rank holds at once, as written")
    return written


def _steps_per_epoch(
    schedule: ScheduleConfig, size: int | None, tokens: int | None, data: DataFacts | None
) -> tuple[int, ...] | None:
    if data is None:
        return None
    limit = schedule.epoch_limit
    epochs = 1 if limit is None else math.ceil(_exactly(limit))
    if data.steps_per_epoch is not None:
        return data.steps_per_epoch[:epochs]
    if size is not None:
        steps = -(-data.documents // size)
    elif data.tokens:
        assert tokens is not None, "a step has a size in sequences or in tokens"
        steps = -(-data.tokens // tokens)
    else:
        return None
    if schedule.max_steps is not None:
        epochs = min(epochs, -(-schedule.max_steps // steps))
    return (steps,) * epochs


def steps_of_epochs(num_epochs: float, steps_per_epoch: Sequence[int]) -> int:
    """Optimizer steps of whole epochs and of the begun part of the last one, rounded up to a whole step."""
    epochs = _exactly(num_epochs)
    whole, part = divmod(epochs, 1)
    steps = sum(steps_per_epoch[: int(whole)])
    return steps + (math.ceil(part * steps_per_epoch[int(whole)]) if part else 0)


def _exactly(number: float) -> Fraction:
    # As it was written: 0.1 is a tenth, so that 0.1 of 10 steps is one step and not two.
    return Fraction(repr(number))


def _total_steps(
    schedule: ScheduleConfig, per_epoch: tuple[int, ...] | None, *, exact: bool, lines: list[str]
) -> int | None:
    limit = schedule.epoch_limit
    if limit is None:
        lines.append(_as_many_epochs_as_needed(schedule.max_steps, per_epoch))
        return schedule.max_steps
    if per_epoch is None:
        lines.append(f"steps: {WHEN_TOKENISED}" if schedule.max_steps is None else _at_most(schedule.max_steps))
        return None
    enough = schedule.max_steps is not None and sum(per_epoch) >= schedule.max_steps
    known = len(per_epoch) >= math.ceil(_exactly(limit))
    assert known or enough, "steps_per_epoch covers every epoch that is begun, up to max_steps"
    in_epochs = steps_of_epochs(limit, per_epoch) if known else sum(per_epoch)
    total = in_epochs if schedule.max_steps is None else min(in_epochs, schedule.max_steps)
    about = "" if exact else "about "
    line = f"steps: {about}{total} = {limit:g} epoch(s) of {about}{_spread(per_epoch)} steps"
    if schedule.max_steps is not None:
        stops = total < in_epochs or not known
        line += f", max_steps {schedule.max_steps} {'stops the run first' if stops else 'is not exceeded'}"
    lines.append(line if exact else f"{line}; exact once the data is tokenised and in order, when the run starts")
    return total


def _as_many_epochs_as_needed(max_steps: int | None, per_epoch: tuple[int, ...] | None) -> str:
    assert max_steps is not None, "without max_steps an epoch ends the run"
    epochs = "in as many epochs as needed"
    if per_epoch is not None:
        epochs = f"about {max_steps / per_epoch[0]:.3g} epoch(s) of {per_epoch[0]} steps"
    return f"steps: {max_steps} (max_steps), {epochs}"


def _at_most(max_steps: int) -> str:
    return f"steps: at most {max_steps} (max_steps); how many the epochs have is {WHEN_TOKENISED}"


def _spread(per_epoch: Sequence[int]) -> str:
    low, high = min(per_epoch), max(per_epoch)
    return f"{low}" if low == high else f"{low} to {high}"


def _warmup_steps(schedule: ScheduleConfig, total: int | None, *, exact: bool, lines: list[str]) -> int | None:
    if schedule.warmup_ratio is not None:
        if total is None:
            lines.append(f"warm-up: {schedule.warmup_ratio:g} of all steps, which are {WHEN_TOKENISED}")
            return None
        steps = math.ceil(_exactly(schedule.warmup_ratio) * total)
        lines.append(f"warm-up: {steps} steps = warmup_ratio {schedule.warmup_ratio:g} × {total} steps, rounded up")
        return steps
    steps = schedule.warmup_steps or 0
    # No data makes a run longer than max_steps.
    total = total if exact else schedule.max_steps
    if total is not None and steps > total:
        raise ConfigError(
            "training.schedule.warmup_steps is more than the run has",
            got=f"{steps}, and the run has {'' if exact else 'at most '}{total} steps",
            do=f"write at most {total}, or a longer run",
        )
    lines.append(f"warm-up: {steps} steps, as written" if steps else "warm-up: none")
    return steps
