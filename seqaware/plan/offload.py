"""What offloading to the CPU or to a drive, and ZeRO++, can do with these ranks, and what a drive must hold.

DeepSpeed takes each of the settings refused here, and then fails while the model loads, or trains something else.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Iterator, Mapping
from ctypes.util import find_library
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from seqaware.errors import ConfigError
from seqaware.files import MalformedError, checked_path
from seqaware.plan.specs import World

# The weight, two moments and the gradient of a sub-group are in memory at once; a pipeline also has the next one's.
_BUFFERS, _PIPELINED_BUFFERS = 4, 8
# Float32 master weight and two moments, and the gradient on its way to the update. A checkpoint copies the first three.
_BYTES_OF_OPTIMIZER = 16
_PREFIX = "zero_optimization"
_HALF = ("float16", "fp16")


@dataclass(frozen=True)
class SwapSizes:
    """What may be put on a drive.

    Attributes:
        parameters: weights of the model; trained: of those, the trained ones; largest: of the largest parameter.
        itemsize: bytes of a weight while computing.
    """

    parameters: int
    trained: int
    largest: int
    itemsize: int


def offload_device(zero: Mapping[str, Any], what: str) -> str | None:
    """Where `offload_optimizer` or `offload_param` puts the states: cpu, nvme or None."""
    block = zero.get(what)
    device = block.get("device", "none") if isinstance(block, Mapping) else "none"
    return None if device == "none" else str(device)


def offload_contradictions(
    zero: Mapping[str, Any], *, optimizer: str, elsewhere: bool = False
) -> Iterator[ConfigError]:
    """Offloading that cannot work, or would train something else.

    Args:
        optimizer: its type. elsewhere: the drives are not this machine's.
    """
    stage = zero.get("stage", 0)
    for what, lowest in (("offload_optimizer", 1), ("offload_param", 3)):
        key = f"{_PREFIX}.{what}"
        block = zero.get(what)
        if block is not None and not isinstance(block, Mapping):
            yield ConfigError(f"{key} must be an object with a device", got=repr(block))
            continue
        device = offload_device(zero, what)
        if device is None:
            continue
        if device not in ("cpu", "nvme"):
            yield ConfigError(f"{key}.device must be cpu, nvme or none", got=device)
        if stage < lowest:
            yield ConfigError(f"{key} needs ZeRO stage {lowest} or more", got=f"stage {stage}")
        if device == "nvme":
            yield from _of_nvme(key, stage, zero[what].get("nvme_path"), elsewhere=elsewhere)
    if offload_device(zero, "offload_optimizer"):
        yield from _of_optimizer_block(zero["offload_optimizer"], optimizer)
    if zero.get("zenflow") is not None:
        yield ConfigError(
            f"{_PREFIX}.zenflow applies most of a gradient steps later, so a run is no longer that of its config",
            do="delete zenflow from the DeepSpeed config",
        )


def _of_nvme(key: str, stage: int, path: object, *, elsewhere: bool) -> Iterator[ConfigError]:
    if stage != 3:
        yield ConfigError(f"{key}.device nvme needs ZeRO stage 3", got=f"stage {stage}")
    if not isinstance(path, str):
        yield ConfigError(f"{key}.nvme_path is missing", do=_name_a_folder(key))
    elif not elsewhere:
        yield from _of_drive(key, path)


def _of_drive(key: str, path: str) -> Iterator[ConfigError]:
    try:
        checked_path(Path(path))
    except MalformedError as error:
        yield ConfigError(f"{key}.nvme_path: {error}", do=_name_a_folder(key))
        return
    if not Path(path).is_dir():
        yield ConfigError(f"{key}.nvme_path is not a folder on this machine", got=path, do=_name_a_folder(key))
    elif not os.access(path, os.W_OK | os.X_OK):
        yield ConfigError(f"{key}.nvme_path cannot be written", got=path, do=_name_a_folder(key))
    if find_library("aio") is None:
        yield ConfigError(f"{key}.device nvme needs libaio, which is not installed", do="apt install libaio-dev")


def _name_a_folder(key: str) -> str:
    return f"write {key}.nvme_path: a folder on the drive"


def _of_optimizer_block(block: Mapping[str, Any], optimizer: str) -> Iterator[ConfigError]:
    key = f"{_PREFIX}.offload_optimizer"
    if block.get("ratio", 1) != 1:
        yield ConfigError(
            f"{key}.ratio: the optimizer of the part that stays keeps the first step's learning rate",
            got=block["ratio"],
            do="delete it: all of the optimizer is offloaded",
        )
    if block.get("super_offload"):
        yield ConfigError(f"{key}.super_offload is not known to train rightly", do="delete it")
    if block["device"] != "nvme":
        return
    if optimizer not in ("adamw", "cpu_adam"):
        yield ConfigError(
            f"training.optimizer.type {optimizer} with {key}.device nvme is not known to train rightly",
            do=f"write cpu_adam, or {key}.device: cpu",
        )
    if block.get("fast_init"):
        yield ConfigError(f"{key}.fast_init is not known to train rightly", do="delete it")
    pipelined = block.get("pipeline_read") or block.get("pipeline_write")
    buffers = _PIPELINED_BUFFERS if pipelined else _BUFFERS
    if block.get("buffer_count", 4) < buffers:
        yield ConfigError(
            f"{key}.buffer_count is too small: a weight, its two moments and its gradient"
            f"{', and the next sub-group in the pipeline,' if pipelined else ''} need one each",
            got=block.get("buffer_count", 4),
            do=f"write {buffers} or more",
        )


def communication_contradictions(raw: Mapping[str, Any], world: World, *, dtype: str) -> Iterator[ConfigError]:
    """ZeRO++ that cannot work on these ranks.

    Args:
        raw: the person's DeepSpeed JSON. dtype: float32, bfloat16 or float16.
    """
    zero = raw.get("zero_optimization", {})
    stage = zero.get("stage", 0)
    partition = zero.get("zero_hpz_partition_size", 1)
    if isinstance(partition, int) and partition > 1:
        size = min(partition, world.size)
        if stage != 3:
            yield ConfigError(f"{_PREFIX}.zero_hpz_partition_size needs ZeRO stage 3", got=f"stage {stage}")
        elif world.size % size:
            yield ConfigError(
                f"{_PREFIX}.zero_hpz_partition_size must divide the number of ranks",
                got=f"{partition} for {world.size} ranks",
                do=f"write the ranks of one node: {world.local_size}",
            )
    names = ("zero_quantized_weights", "zero_quantized_gradients", "zero_quantized_nontrainable_weights")
    quantized = [key for key in names if zero.get(key)]
    if quantized and world.device == "cpu":
        yield ConfigError(
            f"{_PREFIX}.{quantized[0]} needs GPUs: DeepSpeed quantises in CUDA kernels only", do="set it to false"
        )
    elif quantized and stage != 3:
        yield ConfigError(f"{_PREFIX}.{quantized[0]} needs ZeRO stage 3", got=f"stage {stage}", do="set it to false")
    elif "zero_quantized_gradients" in quantized and (raw.get("communication_data_type") or dtype) not in _HALF:
        yield ConfigError(
            f"{_PREFIX}.zero_quantized_gradients: between nodes, DeepSpeed's kernel reads the bits of every gradient"
            " as float16",
            got=f"gradients in {raw.get('communication_data_type') or dtype}",
            do='set it to false, or write "communication_data_type": "fp16"',
        )


def with_own_swap_folder(zero: Mapping[str, Any], output_dir: str) -> dict[str, Any]:
    """`zero` with a folder of this run's own under each `nvme_path`.

    DeepSpeed names its files by rank alone: two runs that share a drive would overwrite each other's states.
    """
    own = dict(zero)
    run = hashlib.sha256(str(Path(output_dir).absolute()).encode()).hexdigest()[:12]
    for what in ("offload_optimizer", "offload_param"):
        if offload_device(zero, what) == "nvme":
            own[what] = {**zero[what], "nvme_path": str(Path(zero[what]["nvme_path"]) / f"seqaware-{run}")}
    return own


def swap_folders(zero: Mapping[str, Any]) -> set[Path]:
    """This run's own folders on drives, of a complete DeepSpeed configuration."""
    blocks = [zero[what] for what in ("offload_optimizer", "offload_param") if offload_device(zero, what) == "nvme"]
    return {Path(block["nvme_path"]) for block in blocks}


def check_swap_space(zero: Mapping[str, Any], sizes: SwapSizes, *, world: World) -> None:
    """Refuse drives that cannot hold what this node's ranks will put on them, and buffers that are too small.

    What this run left there before counts as free: it is overwritten.

    Args:
        zero: of a complete DeepSpeed configuration.

    Raises:
        ConfigError: names the drive, the bytes needed and the bytes free; or the buffer's size.
    """
    here = world.local_size / world.size
    needed: dict[Path, float] = {}
    if offload_device(zero, "offload_optimizer") == "nvme":
        folder = Path(zero["offload_optimizer"]["nvme_path"])
        needed[folder] = _BYTES_OF_OPTIMIZER * sizes.trained * here
    if offload_device(zero, "offload_param") == "nvme":
        _check_buffer(zero["offload_param"], sizes, world)
        folder = Path(zero["offload_param"]["nvme_path"])
        needed[folder] = needed.get(folder, 0.0) + sizes.itemsize * sizes.parameters * here
    for drive in {folder.parent.stat().st_dev for folder in needed}:
        folders = [folder for folder in needed if folder.parent.stat().st_dev == drive]
        wanted = sum(needed[folder] for folder in folders)
        free = shutil.disk_usage(folders[0].parent).free + sum(_size_of(folder) for folder in folders)
        if wanted > free:
            raise ConfigError(
                "not enough space on the drive that takes the offloaded states",
                got=f"{free:,} bytes free at {folders[0].parent}, about {wanted:,.0f} bytes needed on this node",
                do="free some space, name another nvme_path, or offload to cpu",
            )


def _check_buffer(block: Mapping[str, Any], sizes: SwapSizes, world: World) -> None:
    shard = -(-sizes.largest // world.size)
    size = int(block.get("buffer_size", 1e8))
    if shard > size:
        raise ConfigError(
            f"{_PREFIX}.offload_param.buffer_size must hold a rank's share of the largest parameter",
            got=f"{size:,} for {shard:,} weights",
            do=f"write {shard} or more, or start more ranks",
        )


def _size_of(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
