"""Seconds and bytes of a piece of work on a GPU, or on a CPU where a benchmark only shows that it runs."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable

import torch

# What stops one contestant and says nothing about the others.
FAILURES = (RuntimeError, ValueError, TypeError, ImportError, AttributeError, AssertionError, OSError)

# Some five milliseconds.
_PAUSE_CYCLES = 10_000_000


def seconds(work: Callable[[], object], device: str) -> float:
    """Of one run: between two events on a GPU, of wall time on a CPU.

    The GPU pauses before the first event. So the host is ahead when the work begins, as it is in a training step, and
    what counts is the GPU's time and not how soon the first kernels come.
    """
    if device == "cpu":
        start = time.perf_counter()
        work()
        return time.perf_counter() - start
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(_PAUSE_CYCLES)
    first.record()
    work()
    last.record()
    torch.cuda.synchronize()
    return float(first.elapsed_time(last)) / 1e3


def taking_turns(contestants: dict[str, Callable[[], object]], device: str, *, repeats: int) -> dict[str, float]:
    """Median seconds of each, after one run that is not counted."""
    measured: dict[str, list[float]] = {name: [] for name in contestants}
    for turn in range(repeats + 1):
        for name, work in contestants.items():
            spent = seconds(work, device)
            if turn:
                measured[name].append(spent)
    return {name: statistics.median(each) for name, each in measured.items()}


def peak_bytes(work: Callable[[], object], device: str) -> int | None:
    """The most that tensors took during `work` above what they took before; None on a CPU."""
    if device == "cpu":
        work()
        return None
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    work()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0][:300]}"
