"""Seconds of an optimizer step: arithmetic, communication, and what of it hides behind what.

Letters: T tokens of a step over all ranks, M weights that multiply every token, N ranks, Λ layers, L tokens of a
document, b bytes of the dtype, n ranks of a sequence group, P trained weights.

    matrix products   6·M·T (of frozen weights 4·M·T); layers that are computed again in full 2·M·T more
    attention         causal, forward 2·Λ·A·D·Σ L², backward 2.5 times as much; computed again: once more
    stage 0           all-reduce 4·P a step
    stage 1           all-reduce b·P, all-gather b·P a step
    stage 2           all-reduce b·P a micro-batch, all-gather b·P a step (DeepSpeed all-reduces its buckets)
    stage 3           all-gather what `gathering` tells, reduce-scatter b·P, a micro-batch
    Ulysses           all-to-all of q, k, v and of the output, in every layer, forward and backward

Assumed: an all-gather or reduce-scatter of S bytes moves S·(N − 1)/N past each GPU, an all-reduce twice that, over
NVLink inside a node and over all network adapters of a node between nodes. With `overlap_comm`, ZeRO-3's traffic hides
behind the whole arithmetic of a micro-batch and ZeRO-2's behind its backward; all else waits its turn. The update is
bound by memory, PCIe or the drive. Kernels reach a share of the peak that `hardware` names; start-up times of
collectives, data loading, imbalance and the norms and activations that selective checkpointing computes again are left
out, so small runs are slower than this says.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import lcm

from seqaware.estimate.hardware import Device
from seqaware.estimate.layout import Layout, gathered
from seqaware.estimate.memory import moment_bytes

ASSUMED = "collectives at {:.0%} of the links, products at {:.0%} of the peak, overlap as overlap_comm says"
_BACKWARD_SHARE = 2 / 3
_MOVED = {"all_reduce": 2, "all_gather": 1, "reduce_scatter": 1, "all_to_all": 1}


@dataclass(frozen=True)
class Collective:
    """Traffic of one kind. bytes: of the whole tensors, as one rank hands them over in a step.

    hides: nothing, the backward, or the micro-batch, which is computed meanwhile.
    """

    kind: str
    bytes: int
    hides: str = "nothing"


@dataclass(frozen=True)
class StepTime:
    """Seconds of a step by part.

    Attributes:
        products, attention: arithmetic. communication: what nothing hides; hidden: what arithmetic hides.
        update: of the weights. utilisation: share of the peak that the model's own arithmetic reaches (MFU).
    """

    products: float
    attention: float
    communication: float
    hidden: float
    update: float
    tokens: int
    utilisation: float
    collectives: tuple[Collective, ...]

    @property
    def seconds(self) -> float:
        return self.products + self.attention + self.communication + self.update

    @property
    def tokens_per_second(self) -> float:
        """Over all ranks."""
        return self.tokens / self.seconds


def step_time(layout: Layout, device: Device, *, step_tokens: int, mean_length: float | None = None) -> StepTime:
    """Of a step of so many tokens over all ranks.

    Args:
        mean_length: Σ L² / Σ L of the documents, in tokens; None: all of them are as long as the longest.
    """
    length = mean_length or layout.longest
    products = _product_flops(layout, step_tokens)
    attention = _attention_flops(layout, step_tokens, length)
    speed = device.flops(layout.dtype) * layout.world.size
    seconds = (sum(products) / speed, sum(attention) / speed)
    traffic = collectives(layout, micro_batches=micro_batches(layout, step_tokens))
    visible = hidden = 0.0
    for hides, share in (("nothing", 0.0), ("backward", _BACKWARD_SHARE), ("micro-batch", 1.0)):
        needed = sum(_seconds(each, layout, device) for each in traffic if each.hides == hides)
        covered = min(needed, share * sum(seconds))
        visible, hidden = visible + needed - covered, hidden + covered
    total = sum(seconds) + visible + (update := _update_seconds(layout, device))
    peak = device.wide_flops if layout.dtype == "float32" else device.narrow_flops
    useful = useful_flops(layout, tokens=step_tokens, squares=round(step_tokens * length))
    utilisation = useful / (total * layout.world.size * peak)
    return StepTime(*seconds, visible, hidden, update, step_tokens, utilisation, traffic)


def micro_batches(layout: Layout, step_tokens: int) -> int:
    """Micro-batches of each rank in a step, if every one is full."""
    return max(1, -(-step_tokens // (layout.world.groups * layout.micro_batch_tokens)))


def useful_flops(layout: Layout, *, tokens: int, squares: int) -> float:
    """Arithmetic that a model needs for so many tokens and this Σ length²; what is computed again is not in it.

    MFU (Chowdhery et al. 2022, appendix B) is this over seconds, ranks and the peak; here attention is counted causal.
    """
    return _product_flops(layout, tokens)[0] + _attention_flops(layout, tokens, squares / tokens)[0]


def _product_flops(layout: Layout, tokens: int) -> tuple[float, float]:
    """(the model's own, those of computing again)."""
    decoder = layout.decoder
    weights, layers = decoder.matrix_parameters, decoder.matrix_parameters - decoder.vocabulary * decoder.hidden
    per_token = 6 * weights
    if layout.adapters:
        per_token = 4 * weights + 6 * layout.adapters + 2 * layout.whole_modules
    again = 2 * layers if layout.products_again else 0
    if layout.mlp_tile_tokens:
        again += 2 * decoder.layers * decoder.hidden * decoder.intermediate * (2 if decoder.family == "gpt2" else 3)
    return float(per_token * tokens), float(again * tokens)


def _attention_flops(layout: Layout, tokens: int, length: float) -> tuple[float, float]:
    forward = 2 * layout.decoder.layers * layout.decoder.query_width * tokens * length
    # The kernels compute the scores once more in the backward: 2.5 times the forward, of which half a time is again.
    return 3 * forward, (0.5 + layout.products_again) * forward


def collectives(layout: Layout, *, micro_batches: int) -> tuple[Collective, ...]:
    """What one rank hands to the collectives in a step, in bytes of whole tensors; scalars are left out."""
    P, b, zero = layout.trained, layout.itemsize, layout.zero
    traffic: list[Collective] = []
    backward = "backward" if zero.overlap else "nothing"
    if layout.world.size > 1:
        match zero.stage:
            case 0:
                traffic.append(Collective("all_reduce", 4 * P))
            case 1:
                traffic += [Collective("all_reduce", b * P), Collective("all_gather", b * P)]
            case 2:
                traffic.append(Collective("all_reduce", b * P * micro_batches, backward))
                traffic.append(Collective("all_gather", b * P))
            case _:
                whole = gathered(layout)
                hides = "micro-batch" if zero.overlap else "nothing"
                size = b * (whole.gathered * micro_batches + whole.persistent)
                traffic.append(Collective("all_gather", size, hides))
                traffic.append(Collective("reduce_scatter", b * P * micro_batches, hides))
    if layout.world.sequence > 1:
        traffic.append(Collective("all_to_all", micro_batches * exchanged_bytes(layout)))
    return tuple(traffic)


def exchanged_bytes(layout: Layout) -> int:
    """Of Ulysses' all-to-alls in one micro-batch."""
    decoder, ranks = layout.decoder, layout.world.sequence
    keys = lcm(decoder.key_value_heads, ranks) * decoder.head_dim
    widths = 2 * decoder.query_width + 2 * keys
    passes = 3 if layout.recomputed else 2
    return passes * decoder.layers * layout.tokens * widths * layout.itemsize


def _seconds(collective: Collective, layout: Layout, device: Device) -> float:
    world = layout.world
    ranks = world.sequence if collective.kind == "all_to_all" else world.size
    rate = device.link_rate
    if ranks > world.local_size:
        # All adapters of a node work for one ring; an exchange between all ranks has each GPU's own.
        adapters = 1 if collective.kind == "all_to_all" else world.local_size
        rate = min(rate, adapters * device.network_rate)
    moved = _MOVED[collective.kind] * collective.bytes * (ranks - 1) / ranks
    return moved / (rate * device.link_efficiency)


def _update_seconds(layout: Layout, device: Device) -> float:
    zero, moments = layout.zero, moment_bytes(layout)
    mine = layout.trained / (layout.world.size if zero.stage else 1)
    if not zero.offload_optimizer:
        # Gradient, master weight and moments are read, the last two and the weight written.
        return mine * (4 + 2 * (4 + moments) + layout.itemsize) / device.memory_rate
    across = mine * (4 + layout.itemsize) / device.host_rate
    # DeepSpeed's CPU Adam reads and writes as much; a CPU's memory has about the rate of one PCIe link for each GPU.
    across += mine * (4 + 2 * (4 + moments)) / device.host_rate
    drive = 2 * mine * (4 + moments) / device.drive_rate if zero.offload_optimizer == "nvme" else 0.0
    return across + drive
