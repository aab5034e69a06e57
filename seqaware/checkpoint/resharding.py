"""Loading a checkpoint of another topology: each rank reads those elements that it holds now, and no others.

What the weights' owners keep in float32 is filled, with every tensor of the optimizer; then the weights that the model
computes with follow from it, as they do after every step.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from seqaware.checkpoint.shards import FP32, Shards
from seqaware.engine.engine import Engine
from seqaware.engine.optimizer import shape_of


@dataclass(frozen=True)
class _Held:
    """Elements [start, stop) of the parameter `name`, which lie from `offset` on in a flat vector of this rank."""

    name: str
    start: int
    stop: int
    offset: int

    @property
    def place(self) -> slice:
        return slice(self.offset, self.offset + self.stop - self.start)


@torch.no_grad()
def fill(engine: Engine, checkpoint: Path) -> None:
    """Put a checkpoint's weights and optimizer state into this rank's part of the engine. Not collective.

    Raises:
        CheckpointError: its parameters are not the engine's, or its files cannot be cut.
    """
    shards = Shards(checkpoint)
    named = engine.deepspeed.param_names.items()
    shards.check({name: shape_of(parameter) for parameter, name in named if parameter.requires_grad})
    if engine.zero_stage == 3:
        engine.deepspeed.optimizer.checkpoint_event_prologue()
    for owner, held in _owned(engine):
        _fill_one(engine, owner, held, shards)
    _follow(engine, shards)
    buffers, kept = dict(engine.deepspeed.module.named_buffers()), shards.buffers()
    for name in buffers.keys() & kept.keys():
        buffers[name].copy_(kept[name])
    for counter in ("global_steps", "global_samples", "skipped_steps"):
        setattr(engine.deepspeed, counter, shards.model[counter])
    if shards.loss_scaler is not None and hasattr(engine.deepspeed.optimizer, "loss_scaler"):
        engine.deepspeed.optimizer.loss_scaler = shards.loss_scaler


def settle(engine: Engine) -> None:
    """After `fill` on every rank: ZeRO-3 gathers the weights that it keeps whole. Collective."""
    if engine.zero_stage == 3:
        engine.deepspeed.optimizer.checkpoint_event_epilogue()


def _owned(engine: Engine) -> Iterator[tuple[Tensor, list[_Held]]]:
    """Every tensor that the optimizer updates on this rank, and the parameters' elements in it."""
    names, optimizer = engine.deepspeed.param_names, engine.deepspeed.optimizer
    if engine.zero_stage == 0:
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                yield parameter, [_Held(names[parameter], 0, parameter.numel(), 0)]
    elif engine.zero_stage == 3:
        for flat, group in zip(optimizer.fp32_partitioned_groups_flat, optimizer.fp16_groups, strict=True):
            yield flat, _held_of_each(group, names, rank=engine.ranks.rank)
    else:
        for flat, group in _rows(optimizer):
            yield flat, _held_of_row(group, names)


def _rows(optimizer: Any) -> Iterator[tuple[Tensor, list[Any]]]:
    """ZeRO-1 and 2: this rank's part of each group's row, and the group. In bfloat16 ZeRO-1 is a class of its own."""
    if hasattr(optimizer, "fp32_groups_flat_partition"):
        return zip(optimizer.fp32_groups_flat_partition, optimizer.bf16_groups, strict=True)
    return zip(optimizer.single_partition_of_fp32_groups, optimizer.bit16_groups, strict=True)


def _held_of_each(group: list[Any], names: dict[Any, str], *, rank: int) -> list[_Held]:
    held, offset = [], 0
    for parameter in group:
        part, numel = parameter.ds_tensor.ds_numel, parameter.ds_numel
        start = min(rank * part, numel)
        held.append(_Held(names[parameter], start, min(start + part, numel), offset))
        offset += part
    return held


def _held_of_row(group: list[Any], names: dict[Any, str]) -> list[_Held]:
    held = []
    for parameter in group:
        mapping = parameter._hp_mapping
        if mapping is not None:
            own, flat = mapping.lp_fragment_address, mapping.hp_fragment_address
            held.append(_Held(names[parameter], own.start, own.start + own.numel, flat.start))
    return held


def _fill_one(engine: Engine, owner: Tensor, held: list[_Held], shards: Shards) -> None:
    """`owner` and the optimizer's tensors beside it. What only fills up the vector stays zero in those."""
    optimizer = engine.deepspeed.optimizer
    base = getattr(optimizer, "optimizer", optimizer)
    if not held:
        return
    first = held[0].name
    state: dict[str, Any] = {}
    for key in shards.keys(first):
        if key != FP32:
            state[key] = torch.zeros_like(owner)
        target = (owner.data if key == FP32 else state[key]).view(-1)
        for each in held:
            target[each.place].copy_(shards.read(each.name, key, start=each.start, stop=each.stop))
    group = next(g for g in base.param_groups if any(p is owner for p in g["params"])) if engine.zero_stage < 3 else {}
    for key, value in shards.scalars(first).items():
        state[key] = _placed(value, owner, fused=bool(group.get("fused") or base.defaults.get("fused")))
    base.state[owner].update(state)


def _placed(value: Any, owner: Tensor, *, fused: bool) -> Any:
    """A scalar of the optimizer's state where it wants it: a fused step reads it on the device."""
    if not isinstance(value, Tensor):
        return value
    return value.clone().to(owner.device) if fused else value.clone()


def _follow(engine: Engine, shards: Shards) -> None:
    """The weights that the model computes with, from the float32 ones."""
    optimizer, names = engine.deepspeed.optimizer, engine.deepspeed.param_names
    if engine.zero_stage in (1, 2):
        for _, group in _rows(optimizer):
            for parameter in group:
                parameter.data.copy_(shards.read(names[parameter], FP32).view_as(parameter))
    if engine.zero_stage == 3:
        for index, flat in enumerate(optimizer.fp32_partitioned_groups_flat):
            computing = optimizer.fp16_partitioned_groups_flat[index]
            computing.data.copy_(flat.data)
            parts = optimizer.fp16_partitioned_groups[index]
            for part, values in zip(parts, optimizer.unflatten(computing, parts), strict=True):
                part.data = values.data
