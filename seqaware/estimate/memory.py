"""Bytes on each rank, by part and by moment of a step, as DeepSpeed 0.19 holds them.

Letters: P trained weights, N ranks, b bytes of the dtype, m bytes of the optimizer's moments of one weight (AdamW 8).

    stage 0            weights b·P, gradients 4·P, moments m·P
    stage 1            weights b·P, gradients 4·P (in bfloat16 2·P more from the backward on), (4 + m)·P/N
    stage 2            weights b·P, gradients 4·P/N (in float32 twice in a backward), (4 + m)·P/N
    stage 3            weights b·P/N, gradients 4·P/N, (4 + m)·P/N, and whole weights as `gathering` tells

Above stage 0 a float32 master copy is kept of float32 weights too. Offloaded states lie in CPU memory, or on the drive.
What is counted is what tensors hold. The allocator's own loss and the CUDA context are the device's `reserve`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from seqaware.estimate import disk
from seqaware.estimate.activations import Activations, LossMemory, activations, loss_memory
from seqaware.estimate.disk import checkpoint_bytes
from seqaware.estimate.layout import Layout, gathered
from seqaware.estimate.zero3_gathering import Gathering

PARTS = ("weights", "gradients", "optimizer", "gathered weights", "buckets", "activations", "loss", "temporary")
UPDATE = "optimizer step"
_FLOAT32 = 4
_NOTHING_GATHERED = Gathering(gathered=0, peak=0, at_loss=0, early_backward=0, persistent=0)
# DeepSpeed's all-reduce without ZeRO, and of its bfloat16 stage 1, flattens so many weights at once.
_ALLREDUCE_WEIGHTS = 500_000_000


@dataclass(frozen=True)
class MemoryEstimate:
    """Of the fullest rank.

    Attributes:
        moments: what the device holds at each moment of a step, by part (of PARTS), bytes.
        host: what the CPU's memory holds of one rank, by part; host_update: bytes more while it updates the weights.
        nvme: bytes on the drive, of one rank.
        checkpoint: bytes of one checkpoint on the disk, of all ranks. export: bytes of rank 0's CPU memory at the end.
    """

    moments: Mapping[str, Mapping[str, int]]
    host: Mapping[str, int]
    host_update: int
    nvme: int
    checkpoint: int
    export: int

    @property
    def moment(self) -> str:
        """When the device is fullest."""
        return max(self.moments, key=lambda name: sum(self.moments[name].values()))

    @property
    def peak(self) -> int:
        """The most bytes of tensors on the device."""
        return sum(self.moments[self.moment].values())

    @property
    def host_peak(self) -> int:
        """Of one rank, without the export."""
        return sum(self.host.values()) + self.host_update

    @property
    def together(self) -> int:
        """The peak where the device is the CPU, and both share one memory."""
        here = {moment: sum(parts.values()) for moment, parts in self.moments.items()}
        here[UPDATE] += self.host_update
        return max(here.values()) + sum(self.host.values())


@dataclass(frozen=True)
class _States:
    """What stays for the whole step, by part, and what comes at the optimizer's step and in the backward."""

    device: dict[str, int]
    host: dict[str, int]
    nvme: int
    backward_gradients: int
    backward_buckets: int
    step: dict[str, int]
    host_update: int = 0


def memory(layout: Layout) -> MemoryEstimate:
    """The memory of a step in which gradients of earlier micro-batches wait."""
    states = _states(layout)
    kept, loss = activations(layout), loss_memory(layout)
    whole = _gathered(layout)
    moments = {
        "end of the forward": _at_loss(layout, states, kept, loss.kept + loss.forward, whole),
        "start of the backward": _at_loss(layout, states, kept, loss.kept + loss.backward, whole),
        "gradient of the head": _at_head(layout, states, kept, loss, whole),
        "backward of a layer": _at_layer(layout, states, kept, whole),
        UPDATE: _sum(states.device, states.step),
    }
    weights = layout.decoder.parameters
    host = {**states.host, "activations": kept.on_host}
    return MemoryEstimate(
        moments=moments,
        host={part: size for part, size in host.items() if size},
        host_update=states.host_update,
        nvme=states.nvme,
        checkpoint=checkpoint_bytes(
            layout.trained, layout.dtype, moments=moment_bytes(layout), stage=layout.zero.stage
        ),
        export=weights * layout.itemsize,
    )


def moment_bytes(layout: Layout) -> int:
    """Bytes of the optimizer's moments of one weight."""
    on_cpu = layout.world.device == "cpu" or layout.zero.offload_optimizer is not None
    return disk.moment_bytes(layout.optimizer, on_cpu=on_cpu)


def _sum(*parts: Mapping[str, int]) -> dict[str, int]:
    return {part: total for part in PARTS if (total := sum(each.get(part, 0) for each in parts))}


def _gathered(layout: Layout) -> Gathering:
    if layout.zero.stage < 3:
        return _NOTHING_GATHERED
    return gathered(layout)


def _at_loss(layout: Layout, states: _States, kept: Activations, loss: int, whole: Gathering) -> dict[str, int]:
    here = {"activations": kept.at_loss, "loss": loss, "gathered weights": whole.at_loss * layout.itemsize}
    return _sum(states.device, here)


def _at_head(layout: Layout, states: _States, kept: Activations, loss: LossMemory, whole: Gathering) -> dict[str, int]:
    # The gradient is copied for its reduction, and the copy is gone when the rank's share gets its place.
    copied = loss.weight_gradient
    partition = states.backward_gradients
    here = {
        "activations": kept.at_loss,
        "loss": max(loss.weight_gradient, kept.norm),
        "gradients": partition,
        "temporary": max(0, copied - partition) if layout.zero.stage >= 2 else 0,
        "buckets": states.backward_buckets,
        "gathered weights": whole.at_loss * layout.itemsize,
    }
    return _sum(states.device, here)


def _at_layer(layout: Layout, states: _States, kept: Activations, whole: Gathering) -> dict[str, int]:
    decoder, zero = layout.decoder, layout.zero
    # One new gradient beside the bucket, and the bucket's copy for its reduction.
    largest = max(max(module.parameters) for module in decoder.layer)
    copy = min(layout.reduce_bucket, decoder.layer_parameters) if zero.stage >= 2 else 0
    new = (largest + copy) * layout.itemsize if not layout.adapters else 0
    beside = max(0, new - kept.work)
    here = {
        "activations": kept.in_backward,
        "gradients": states.backward_gradients,
        "temporary": beside,
        "buckets": states.backward_buckets,
        "gathered weights": whole.peak * layout.itemsize,
    }
    return _sum(states.device, here)


def _states(layout: Layout) -> _States:
    match layout.zero.stage:
        case 0:
            return _stage_0(layout)
        case 1 if layout.dtype == "bfloat16" and layout.zero.offload_optimizer is None:
            return _stage_1_bfloat16(layout)
        case 1 | 2:
            return _stage_1_or_2(layout)
        case _:
            return _stage_3(layout)


def _adam_copies(layout: Layout) -> int:
    """Tensors as large as the updated weights that the optimizer makes while it updates."""
    match layout.optimizer:
        case "adamw":
            # torch takes all tensors at once on a GPU (√v), and one at a time on a CPU (√v, and √v / correction).
            return 1 if layout.world.device == "cuda" and not layout.zero.offload_optimizer else 2
        case "muon":
            return 2
        case _:
            return 0


def _frozen(layout: Layout) -> int:
    return round(layout.frozen * (layout.frozen_bytes or layout.itemsize))


def _stage_0(layout: Layout) -> _States:
    P, flat = layout.trained, min(layout.trained, _ALLREDUCE_WEIGHTS) * _FLOAT32
    updated = P if layout.world.device == "cuda" else layout.decoder.largest
    temporary = max(flat if layout.world.size > 1 else 0, _adam_copies(layout) * updated * _FLOAT32)
    gradients = _FLOAT32 * P
    device = {"weights": _FLOAT32 * P + _frozen(layout), "optimizer": moment_bytes(layout) * P}
    waiting = gradients if layout.passes else 0
    return _States(
        {**device, "gradients": waiting}, {}, 0, gradients - waiting, 0,
        {"gradients": gradients - waiting, "temporary": temporary},
    )  # fmt: skip


def _stage_1_bfloat16(layout: Layout) -> _States:
    """DeepSpeed's BF16_Optimizer: float32 gradients of all weights, and bfloat16 ones from the backward to the step."""
    P, N = layout.trained, layout.world.size
    device = {
        "weights": 2 * P + _frozen(layout),
        "optimizer": (_FLOAT32 + moment_bytes(layout)) * P // N,
        "gradients": _FLOAT32 * P + (2 * P if layout.passes else 0),
    }
    new = 0 if layout.passes else 2 * P
    # The float32 gradients are flattened and sent in bfloat16.
    reduced = min(P, _ALLREDUCE_WEIGHTS) * (_FLOAT32 + 2) if N > 1 else 0
    temporary = max(reduced, _adam_copies(layout) * _FLOAT32 * P // N)
    return _States(device, {}, 0, new, 0, {"gradients": new, "temporary": temporary})


def _stage_1_or_2(layout: Layout) -> _States:
    P, N, b, zero = layout.trained, layout.world.size, layout.itemsize, layout.zero
    part = _FLOAT32 * P // N
    partitioned = zero.stage == 2
    # Stage 2 in a narrow dtype adds up in one float32 buffer; in float32 each backward fills a new one.
    compact = layout.narrow
    waiting = part if partitioned else _FLOAT32 * P
    new = part if partitioned and not compact else 0
    staged = _FLOAT32 if layout.narrow and not partitioned else b
    bucket = layout.reduce_bucket * staged * (2 if zero.overlap else 1) if zero.contiguous else 0
    moments = (_FLOAT32 + moment_bytes(layout)) * P // N
    device = {"weights": b * P + _frozen(layout), "gradients": waiting}
    host: dict[str, int] = {}
    copies, update = _adam_copies(layout) * part, 0
    if zero.offload_optimizer:
        # Pinned: master weights, gradients and moments, and a copy of the weights in their dtype on the way back.
        host = {"optimizer": moments, "gradients": part, "weights": b * P // N, "buckets": layout.decoder.largest * b}
        device["buckets"] = layout.decoder.largest * b
        if partitioned and not compact:
            # Earlier micro-batches wait in memory of the CPU.
            device["gradients"], new, host["gradients"] = 0, 0, 2 * part
        step, update = {}, copies
    else:
        device["optimizer"] = moments
        # The gathered gradients live on until the last group of weights is updated; a compact buffer is used as it is.
        step = {"temporary": copies if partitioned and compact else part + copies}
    if not partitioned:
        # Reduced at the step: the share of this rank is collected beside all gradients, which then go.
        collecting = part + bucket + layout.reduce_bucket * staged
        step["temporary"] = max(collecting, step.get("temporary", 0) + part - _FLOAT32 * P)
        device["buckets"] = device.get("buckets", 0) + bucket
    return _States(device, host, 0, new, bucket if partitioned else 0, step, update)


def _stage_3(layout: Layout) -> _States:
    P, N, b, zero = layout.trained, layout.world.size, layout.itemsize, layout.zero
    whole = _gathered(layout)
    part = _FLOAT32 * P // N
    moments = (_FLOAT32 + moment_bytes(layout)) * P // N
    weights = b * P // N + _frozen(layout) // N
    updated = min(part, zero.sub_group * _FLOAT32)
    copies = _adam_copies(layout) * updated
    device = {"buckets": layout.reduce_bucket * b if zero.contiguous else 0, "gathered weights": whole.persistent * b}
    host: dict[str, int] = {}
    nvme = 0
    if zero.secondary_partition > 1:
        device["gathered weights"] += b * P // min(zero.secondary_partition, N)
    match zero.offload_parameters:
        case None:
            device["weights"] = weights
        case "cpu":
            host["weights"] = weights
        case _:
            nvme += weights
            host["buckets"] = zero.parameter_buffers * b
    match zero.offload_optimizer:
        case None:
            device |= {"optimizer": moments, "gradients": part}
            step, update = {"temporary": updated + copies}, 0
        case "cpu":
            host |= {"optimizer": moments, "gradients": 2 * part}
            step, update = {}, copies
        case _:
            # Two sub-groups are on their way between drive and memory; their gradients wait in memory.
            nvme += moments + part
            moving = 2 * updated * (_FLOAT32 + moment_bytes(layout) + _FLOAT32) // _FLOAT32
            host |= {"optimizer": moving, "gradients": part}
            step, update = {}, copies
    return _States(device, host, nvme, 0, 0, step, update)
