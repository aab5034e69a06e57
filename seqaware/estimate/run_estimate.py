"""What a plan costs on given GPUs, as a person reads it: memory, time, what would still fit, and what to change."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from seqaware.errors import ConfigError
from seqaware.estimate.decoder import GUESSED
from seqaware.estimate.hardware import GIB, Device
from seqaware.estimate.layout import Layout
from seqaware.estimate.memory import MemoryEstimate, memory
from seqaware.estimate.run_totals import RunFigures
from seqaware.estimate.search import (
    LayoutChoice,
    Longest,
    cheapest,
    fits,
    largest_micro_batch,
    longest_sequences,
    nearest_fit,
)
from seqaware.estimate.step_time import ASSUMED, StepTime, micro_batches, step_time

_GB = 1e9
# Of what a device's figures may be replaced with: GiB and GB a second.
_LEAST, _MOST = 1e-3, 1e6


@dataclass(frozen=True)
class EstimateRequest:
    """What is asked about a layout.

    Attributes:
        model: its name. source: the DeepSpeed JSON the layout comes from, by name.
        others: the same run under other JSONs, by name.
        refused: JSONs that this run cannot have, and why. step_tokens: of a step over all ranks.
        mean_length: Σ L² / Σ L of the documents; None takes all as long as the longest.
        most_positions: the longest sequence the model itself knows, in tokens.
        run: of the whole run; None tells of a step alone.
    """

    model: str
    layout: Layout
    device: Device
    source: str
    step_tokens: int
    mean_length: float | None = None
    others: Sequence[tuple[str, Layout]] = ()
    refused: Mapping[str, str] | None = None
    most_positions: int | None = None
    run: RunFigures | None = None


def outlook(question: EstimateRequest) -> Iterator[tuple[str, str]]:
    """(label, text) of every line."""
    layout, device = question.layout, question.device
    estimate = memory(layout)
    time = step_time(layout, device, step_tokens=question.step_tokens, mean_length=question.mean_length)
    yield from _heading(question)
    yield from memory_lines(estimate, device)
    if not fits(layout, device):
        yield "change", nearest_fit(layout, device, others=question.others) or "nothing here makes it fit: more GPUs"
    yield from time_lines(layout, time)
    if question.run is not None:
        yield from question.run.costs(layout, time)
    yield from _largest(layout, device)
    yield from _cheapest(question)
    yield from _longest(question)
    yield "assumed", ASSUMED.format(device.link_efficiency, device.efficiency)
    if not layout.decoder.exact:
        yield "", GUESSED


def _heading(question: EstimateRequest) -> Iterator[tuple[str, str]]:
    layout, world = question.layout, question.layout.world
    trained = "all trained" if not layout.adapters else f"{layout.trained:,} more trained"
    yield "model", f"{question.model}: {layout.decoder.parameters:,} weights, {trained}"
    shared = f", {world.sequence} to a sequence" if world.sequence > 1 else ""
    yield "ranks", f"{world.size} {question.device.name} on {world.nodes} node(s){shared}"
    tiles = f", MLPs {layout.mlp_tile_tokens:,} tokens at a time" if layout.mlp_tile_tokens else ""
    yield (
        "layout",
        f"{question.source}, {layout.dtype}, {layout.optimizer}, "
        f"micro-batches of {layout.micro_batch_tokens:,} tokens, checkpointing {layout.checkpointing}{tiles}",
    )
    if question.run is not None:
        yield from question.run.heading()


def memory_lines(estimate: MemoryEstimate, device: Device) -> Iterator[tuple[str, str]]:
    """What a GPU holds when it is fullest, what the CPU's memory holds, and the disk."""
    verdict = "fits" if estimate.peak <= device.usable else "DOES NOT FIT"
    yield (
        "memory",
        f"{verdict}: {_gib(estimate.peak)} of the {_gib(device.usable)} that tensors may take on a {device.name}, "
        f"fullest at the {estimate.moment}",
    )
    yield "", _parts(estimate.moments[estimate.moment])
    if estimate.host:
        verdict = "" if estimate.host_peak <= device.host_memory else f", MORE THAN {_gib(device.host_memory)}"
        yield "cpu memory", f"{_gib(estimate.host_peak)} for each GPU{verdict}: {_parts(estimate.host)}"
    if estimate.nvme:
        yield "drive", f"{_gib(estimate.nvme)} for each GPU"
    yield "disk", f"{estimate.checkpoint / _GB:,.0f} GB a checkpoint"
    yield "", f"the export holds {_gib(estimate.export)} in rank 0's CPU memory"


def time_lines(layout: Layout, time: StepTime) -> Iterator[tuple[str, str]]:
    """Seconds of a step by part, and its traffic."""
    parts = {
        "products": time.products,
        "attention": time.attention,
        "communication": time.communication,
        "update": time.update,
    }
    shown = " + ".join(f"{name} {seconds:.2f}" for name, seconds in parts.items())
    count = micro_batches(layout, time.tokens)
    yield (
        "step",
        f"{time.tokens:,} tokens, {count} micro-batch(es) of each group: {time.seconds:.2f} s = {shown} "
        f"({time.hidden:.2f} s of communication behind the arithmetic)",
    )
    yield "", f"{time.tokens_per_second:,.0f} tokens a second, {time.utilisation:.0%} of the peak arithmetic"
    traffic = ", ".join(f"{each.kind} {each.bytes / _GB:,.1f} GB" for each in time.collectives) or "none"
    yield "traffic", f"a step, each rank: {traffic}"


def _largest(layout: Layout, device: Device) -> Iterator[tuple[str, str]]:
    tokens = largest_micro_batch(layout, device)
    yield "largest", f"micro_batch_tokens: {tokens:,}" if tokens else "not even one granule of tokens fits"


def _cheapest(question: EstimateRequest) -> Iterator[tuple[str, str]]:
    mine = (question.source, question.layout)
    best = cheapest(
        (mine, *question.others),
        question.device,
        step_tokens=question.step_tokens,
        mean_length=question.mean_length,
    )
    if best is None:
        yield "cheapest", "no DeepSpeed config here fits with these settings"
    else:
        yield "cheapest", _choice(best)
    for name, why in (question.refused or {}).items():
        yield "", f"not {name}: {why}"


def _choice(best: LayoutChoice) -> str:
    return f"{best.name}: {best.time.seconds:.2f} s a step, {best.traffic / _GB:,.1f} GB of traffic a rank"


def _longest(question: EstimateRequest) -> Iterator[tuple[str, str]]:
    label = "longest"
    for found in longest_sequences(question.layout, question.device, others=question.others):
        yield label, _stretch(found, question)
        label = ""
    if question.most_positions is not None:
        yield "", f"(the model's own positions end at {question.most_positions:,})"


def _stretch(found: Longest, question: EstimateRequest) -> str:
    if not found.tokens:
        return f"no sequence fits with {found.changes}"
    groups = found.layout.world.groups
    time = step_time(found.layout, question.device, step_tokens=found.tokens * groups)
    return f"{found.tokens:,} tokens with {found.changes}; {time.seconds:,.0f} s for one on each group"


def _parts(parts: Mapping[str, int]) -> str:
    return ", ".join(f"{name} {size / GIB:.1f}" for name, size in parts.items() if size >= GIB / 20)


def _gib(size: float) -> str:
    return f"{size / GIB:,.1f} GiB"


def overridden(device: Device, *, memory_gib: float | None, link_gb: float | None, network_gb: float | None) -> Device:
    """The device with figures of one's own: GiB of memory, GB a second one way of NVLink and of the network adapter.

    Raises:
        ConfigError: one of them is not a plausible number.
    """
    for name, value in (("--memory", memory_gib), ("--nvlink", link_gb), ("--network", network_gb)):
        if value is not None and not _LEAST <= value <= _MOST:
            raise ConfigError(f"{name} must be a number from {_LEAST:g} to {_MOST:g}", got=value)
    if memory_gib is not None and memory_gib * GIB <= device.reserve:
        least = f"{device.reserve / GIB:g} GiB, which contexts and communication take"
        raise ConfigError(f"--memory must be above {least}", got=memory_gib)
    changes: dict[str, float] = {}
    if memory_gib is not None:
        changes["memory"] = int(memory_gib * GIB)
    if link_gb is not None:
        changes["link_rate"] = link_gb * _GB
    if network_gb is not None:
        changes["network_rate"] = network_gb * _GB
    return replace(device, **changes)  # type: ignore[arg-type]
