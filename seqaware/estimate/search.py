"""What fits a device: the largest micro-batch, the longest sequence, and the cheapest of several layouts."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

from seqaware.estimate.hardware import Device
from seqaware.estimate.layout import Layout
from seqaware.estimate.memory import memory
from seqaware.estimate.step_time import StepTime, step_time
from seqaware.plan.specs import divisors

# Kernels like whole tiles of tokens, and nobody plans finer.
GRANULE = 256
_MOST_TOKENS = 2**28
_TILE_TOKENS = 4096


@dataclass(frozen=True)
class LayoutChoice:
    """A layout that fits, and how long its step takes. name: the file it comes from, or what it changes."""

    name: str
    layout: Layout
    time: StepTime

    @property
    def traffic(self) -> int:
        """Bytes that a rank hands to collectives in a step."""
        return sum(each.bytes for each in self.time.collectives)


def fits(layout: Layout, device: Device) -> bool:
    """Whether tensors fit the GPU, and what is offloaded the CPU's memory."""
    estimate = memory(layout)
    return estimate.peak <= device.usable and estimate.host_peak <= device.host_memory


def largest_micro_batch(layout: Layout, device: Device) -> int:
    """The most tokens that a sequence group holds at once, in whole granules for each rank; 0 if not even one fits."""
    granule = GRANULE * layout.world.sequence

    def tokens_fit(granules: int) -> bool:
        return fits(replace(layout, micro_batch_tokens=granules * granule), device)

    low, high = 0, _MOST_TOKENS // granule
    if tokens_fit(high):
        return high * granule
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if tokens_fit(middle) else (low, middle)
    return low * granule


@dataclass(frozen=True)
class Longest:
    """tokens: of one document, 0 where none fits. layout: with what it takes; changes: the same in words."""

    tokens: int
    layout: Layout
    changes: str


def longest_sequences(
    layout: Layout, device: Device, *, others: Iterable[tuple[str, Layout]] = ()
) -> Iterator[Longest]:
    """The longest document that the ranks can hold, by what is done for it: one for each way of saving activations.

    Of each the best number of ranks to a sequence is taken, and the best of the DeepSpeed JSONs.

    Args:
        others: the same model under other DeepSpeed JSONs, by name.
    """
    bases = [("", layout), *others]
    for saving, settings in _SAVINGS.items():
        words = _named(saving, settings, layout)
        best = Longest(0, layout, words)
        for source, candidate in _variants(bases, settings):
            tokens = largest_micro_batch(candidate, device)
            if tokens > best.tokens:
                stretched = replace(candidate, micro_batch_tokens=tokens, longest=tokens)
                best = Longest(tokens, stretched, _words(source, candidate.world.sequence, words))
        yield best


_SAVINGS: dict[str, dict[str, Any]] = {
    "activation_checkpointing: none": {"checkpointing": "none", "mlp_tile_tokens": None},
    # Compiled layers hide their products.
    "activation_checkpointing: selective": {"checkpointing": "selective", "mlp_tile_tokens": None, "compiled": False},
    "activation_checkpointing: full": {"checkpointing": "full", "mlp_tile_tokens": None},
    f"activation_checkpointing: full, mlp_tile_tokens: {_TILE_TOKENS}": {
        "checkpointing": "full",
        "mlp_tile_tokens": _TILE_TOKENS,
    },
    f"activation_checkpointing: offload, mlp_tile_tokens: {_TILE_TOKENS}": {
        "checkpointing": "offload",
        "mlp_tile_tokens": _TILE_TOKENS,
    },
}


def _variants(bases: Iterable[tuple[str, Layout]], settings: dict[str, Any]) -> Iterator[tuple[str, Layout]]:
    """Each layout with these settings, and with every number of ranks that can share a sequence."""
    for source, base in bases:
        world = base.world
        for ranks in divisors(math.gcd(world.size, base.decoder.heads)):
            yield source, replace(base, **settings, world=replace(world, sequence=ranks))


def _named(saving: str, settings: dict[str, Any], layout: Layout) -> str:
    given_up = layout.compiled and not settings.get("compiled", True)
    return f"{saving}, model.compile: false" if given_up else saving


def _words(*parts: object) -> str:
    source, ranks, saving = parts
    return ", ".join(str(part) for part in (source, f"parallel.sequence: {ranks}", saving) if part)


def nearest_fit(layout: Layout, device: Device, *, others: Iterable[tuple[str, Layout]] = ()) -> str | None:
    """The least change that makes a layout fit, in words; None where nothing here does.

    In this order: a smaller micro-batch that still holds the longest document, another DeepSpeed JSON, another way of
    saving activations, more ranks to a sequence, and then two of them.
    """
    tokens = largest_micro_batch(layout, device)
    if tokens >= layout.longest:
        return f"training.schedule.micro_batch_tokens: {tokens}"
    bases = [("", layout), *others]
    for source, base in bases:
        if fits(base, device):
            return f"--deepspeed {source}"
    for (source, base), (saving, settings) in product(bases, _SAVINGS.items()):
        words = _named(saving, settings, base)
        for _, candidate in _variants([(source, base)], settings):
            if candidate.world.sequence >= layout.world.sequence and fits(candidate, device):
                return _words(source and f"--deepspeed {source}", candidate.world.sequence, words)
    return None


def cheapest(
    candidates: Iterable[tuple[str, Layout]], device: Device, *, step_tokens: int, mean_length: float | None = None
) -> LayoutChoice | None:
    """Of the layouts that fit, the one with the shortest step; among equals the one that communicates least."""
    choices = [
        LayoutChoice(name, layout, step_time(layout, device, step_tokens=step_tokens, mean_length=mean_length))
        for name, layout in candidates
        if fits(layout, device)
    ]
    # Steps that differ by less than the model can tell are equals.
    return min(choices, key=lambda choice: (round(choice.time.seconds, 2), choice.traffic), default=None)
