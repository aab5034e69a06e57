"""The longest document that one GPU can train on, for gpu.py.

A step over one document is measured at doubling lengths, with every way of saving activations that stays on the GPU.
Beside each stands what `seqaware plan` reckons for it. First of all comes the length at which the plan takes the GPU
for full, which needs none; at the end, the same by the line through the two longest that were measured.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace

import torch

from benchmarks.gpu_training import Found, Work, batches_of, plan_device, synchronize
from benchmarks.timing import first_line
from seqaware.data.collate import Batch
from seqaware.distributed.process_group import connect, find_address
from seqaware.estimate.hardware import Device
from seqaware.estimate.layout import Layout, layout_of
from seqaware.estimate.memory import memory
from seqaware.estimate.search import largest_micro_batch
from seqaware.estimate.step_time import step_time
from seqaware.training.assembly import build_engine
from seqaware.training.prepare import Prepared

SAVING = {"activation_checkpointing": "full", "mlp_tile_tokens": 4096}


def longest(work: Work, found: Found, *, until: float) -> None:
    """Steps over one document of doubling length, as long as the next one would end by then (by time.monotonic).

    The shortest comes twice: in the first, which is not told of, kernels are compiled and the optimizer's states made.
    How much longer the next one takes is taken from the plan.
    """
    prepared, _ = batches_of(work, min(work.rows), **SAVING)
    layout, device = layout_of(prepared.plan), plan_device(work.device)
    assert layout is not None, "the model's sizes are known"
    found({"longest_planned": largest_micro_batch(layout, device)})
    step, tokens = step_over_one_document(work, prepared), min(work.rows)
    step(tokens)
    points: list[tuple[int, int]] = []
    reckoned, ends = estimate(layout, device, tokens), 0.0
    while len(points) < (2 if work.device == "cpu" else 8) and ends < until:
        begun = time.monotonic()
        try:
            points.append((tokens, step(tokens)))
        except torch.OutOfMemoryError as error:
            found({"tokens": tokens, "failed": first_line(error)})
            break
        seconds = time.monotonic() - begun
        found({"tokens": tokens, "peak_bytes": points[-1][1], "seconds": seconds, **reckoned})
        tokens *= 2
        before, reckoned = reckoned, estimate(layout, device, tokens)
        ends = time.monotonic() + seconds * reckoned["planned_seconds"] / before["planned_seconds"]
    if work.device == "cuda" and len(points) > 1:
        (few, low), (many, high) = points[-2:]
        by_line = int(many + (device.usable - high) * (many - few) / (high - low))
        found({"longest_measured": many, "longest_by_extrapolation": by_line})


def estimate(layout: Layout, device: Device, tokens: int) -> dict[str, float]:
    """The plan's for a step over one document of so many tokens."""
    stretched = replace(layout, micro_batch_tokens=tokens, longest=tokens)
    seconds = step_time(stretched, device, step_tokens=tokens).seconds
    return {"planned_peak_bytes": memory(stretched).peak, "planned_seconds": seconds}


def step_over_one_document(work: Work, prepared: Prepared) -> Callable[[int], int]:
    """A training step over one document of so many tokens; bytes at its peak, 0 on a CPU."""
    engine = build_engine(prepared, str(work.model), ranks=connect(find_address()), say=lambda text: None)

    def step(tokens: int) -> int:
        if work.device == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        engine.train_step([one_document(tokens, work.shape.vocabulary)], learning_rate=1e-5)
        synchronize(work.device)
        return torch.cuda.max_memory_allocated() if work.device == "cuda" else 0

    return step


def one_document(tokens: int, vocabulary: int) -> Batch:
    """A micro-batch of random tokens that are all one document."""
    places = torch.arange(tokens).unsqueeze(0)
    ids = torch.randint(0, vocabulary, (1, tokens))
    labels = torch.cat((ids[:, 1:], torch.full((1, 1), -100)), dim=1)
    k = torch.where(labels >= 0, places + 1, 0).int()
    borders = torch.tensor([0, tokens])
    return Batch(
        input_ids=ids,
        position_ids=places,
        labels=labels,
        k=k,
        length=torch.where(k > 0, tokens - 1, 0).int(),
        token_weight=None,
        cu_seqlens=borders.int(),
        sequence_offsets=borders,
        loss_rows=torch.arange(tokens - 1),
        lengths=(tokens,),
        sequences=1,
        tokens=tokens,
        supervised_tokens=tokens - 1,
        document_names=("one",),
    )
