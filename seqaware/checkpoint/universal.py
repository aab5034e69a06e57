"""DeepSpeed's universal checkpoint out of any of ours: each parameter whole, in a folder of its own.

    zero/<parameter>/fp32.pt, exp_avg.pt, …   {"param": the whole tensor, "cat_dim": 0}
    zero/<parameter>/step.pt                  the optimizer's count of steps
    zero/optimizer_state.pt                   what belongs to no parameter: hyperparameters, loss scale
    (zero_pp_rank_0_)mp_rank_00_model_states.pt   counters, and at ZeRO-0 to 2 the weights

DeepSpeed reads it with `"checkpoint": {"load_universal": true}` on any ranks at ZeRO 1 to 3, and so does `--resume`.
"""

from __future__ import annotations

import shutil
import threading
from pathlib import Path
from typing import Any

import torch
from deepspeed.runtime.fp16.loss_scaler import LossScaler

from seqaware.checkpoint.manifest import PARTIAL, read_manifest, read_whole, told_if_removed
from seqaware.checkpoint.save import complete
from seqaware.checkpoint.shards import FP32, UNIVERSAL, Shards
from seqaware.checkpoint.tensor_files import as_written
from seqaware.checkpoint.writer import Share
from seqaware.data.store.store_writer import sync_to_disk
from seqaware.distributed.collective_errors import FAILURES
from seqaware.errors import CheckpointError, ConfigError

LATEST_UNIVERSAL = "latest_universal"


def convert(checkpoint: Path, folder: Path) -> tuple[int, int]:
    """Write `checkpoint` as a universal one, in one process; the weights are once in memory, for the file that has all.

    Args:
        folder: of the new checkpoint. Its parent gets the file by which DeepSpeed finds it.

    Returns:
        the number of parameters, and the bytes written.

    Raises:
        CheckpointError: the checkpoint is not whole, or could not be written. ConfigError: the folder is taken.
    """
    if folder.exists():
        raise ConfigError("the folder for the checkpoint is there already", got=folder, do="name another, or remove it")
    read_whole(checkpoint)
    with told_if_removed(checkpoint):
        manifest = read_manifest(checkpoint).model_dump(mode="json", exclude={"files", "checksum"})
    partial = folder.with_name(folder.name + PARTIAL)
    shutil.rmtree(partial, ignore_errors=True)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        share = Share(_made(partial / UNIVERSAL).parent, rank=0, at_once=True, stop=threading.Event())
        shards = Shards(checkpoint)
        with as_written(checkpoint):
            _write(shards, partial, share)
        size = complete(partial, folder, [share.vote()], manifest=manifest)
        (folder.parent / LATEST_UNIVERSAL).write_text(folder.name)
        sync_to_disk(folder.parent)
    except FAILURES as error:
        raise CheckpointError("the checkpoint could not be converted", got=str(error)) from error
    return len(shards.shapes), size


def _write(shards: Shards, partial: Path, share: Share) -> None:
    weights: dict[str, torch.Tensor] = {}
    for name, shape in shards.shapes.items():
        folder = f"{UNIVERSAL}/{name}"
        _made(partial / folder)
        for key in shards.keys(name):
            share.take(f"{folder}/{key}.pt", {"param": shards.read(name, key).view(shape), "cat_dim": 0})
        if "step" in (scalars := shards.scalars(name)):
            share.take(f"{folder}/step.pt", scalars["step"])
        weights[name] = torch.empty(0)
    share.take(f"{UNIVERSAL}/optimizer_state.pt", _common(shards))
    # DeepSpeed takes every weight from the folders above; of these it reads counters, buffers and what they hold.
    states = {**shards.model, "optimizer": None, "module": {**_whole(shards), **shards.buffers()}}
    share.take("mp_rank_00_model_states.pt", states)
    sharded = {**states, "module": {**weights, **shards.buffers()}}
    share.take("zero_pp_rank_0_mp_rank_00_model_states.pt", sharded)


def _whole(shards: Shards) -> dict[str, torch.Tensor]:
    """All weights, in the dtype that the model computed with, also under the names of those that are shared."""
    module = shards.model["module"]
    weights = {
        name: shards.read(name, FP32).view(shape).to(module[name].dtype if name in module else torch.float32)
        for name, shape in shards.shapes.items()
    }
    shared = shards.model.get("shared_params") or {}
    return weights | {name: weights[other] for name, other in shared.items() if other in weights}


def _common(shards: Shards) -> dict[str, Any]:
    """What DeepSpeed's loaders look for beside the parameters; ZeRO-3 looks one level deeper than ZeRO-1 and 2.

    Not the limit for clipping: its loader would prefer that to the config's, and at ZeRO-0 we clip ourselves.
    """
    groups = [{key: value for key, value in group.items() if key != "params"} for group in shards.groups]
    scalars = shards.scalars(next(iter(shards.shapes)))
    scaler = shards.loss_scaler if shards.loss_scaler is not None else LossScaler(scale=1.0)
    return {
        "loss_scaler": scaler,
        "dynamic_loss_scale": bool(scaler.dynamic),
        "overflow": False,
        "ds_version": shards.model["ds_version"],
        "param_groups": groups,
        "optimizer_state_dict": {"state": {0: scalars}, "param_groups": [{**group, "params": []} for group in groups]},
    }


def _made(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return folder
