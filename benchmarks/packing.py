"""How fast and how full: packing a million lengths, laying out steps, ordering ten million documents.

    python -m benchmarks.packing [--out FILE]

Beside our packing runs a plain one: the same algorithm on a sorted Python list, which must need as many bins.
"""

from __future__ import annotations

import argparse
import json
import time
from bisect import bisect_left, insort
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from benchmarks.machine import machine
from seqaware.data.packing import layout_step, pack
from seqaware.data.sampler import Permutation, StepSampler

LENGTHS = 1_000_000
ORDERED = 10_000_000
# name, mean length, sigma of its logarithm, capacity: short worked problems, and chats with a long tail.
DISTRIBUTIONS: tuple[dict[str, Any], ...] = (
    {"name": "GSM8K-like", "mean": 188, "sigma": 0.45, "capacity": 2048},
    {"name": "chat-like", "mean": 978, "sigma": 1.0, "capacity": 8192},
)
STEPS = ((64, 2), (256, 8), (1024, 8), (4096, 8), (4096, 64))
REPEATS = 5


def draw(mean: float, sigma: float, *, count: int, longest: int) -> NDArray[np.int32]:
    """Log-normal lengths of this mean, between 2 and `longest`."""
    draws = np.random.default_rng(0).lognormal(np.log(mean) - sigma**2 / 2, sigma, count)
    return np.clip(np.round(draws), 2, longest).astype(np.int32)


def best_seconds(function: Callable[[], object]) -> dict[str, float]:
    """The fastest of REPEATS runs, after one that compiles: seconds on the wall and of the processor."""
    function()
    wall, cpu = [], []
    for _ in range(REPEATS):
        wall_start, cpu_start = time.perf_counter(), time.process_time()
        function()
        wall.append(time.perf_counter() - wall_start)
        cpu.append(time.process_time() - cpu_start)
    return {"seconds": round(min(wall), 4), "cpu_seconds": round(min(cpu), 4)}


def plain_bins(lengths: NDArray[np.int32], capacity: int) -> int:
    """Bins of best-fit decreasing with a sorted list of the distinct residuals."""
    held = [0] * (capacity + 1)
    residuals: list[int] = []
    bins = 0
    for length in sorted(lengths.tolist(), reverse=True):
        place = bisect_left(residuals, length)
        if place == len(residuals):
            bins += 1
            rest = capacity - length
        else:
            tightest = residuals[place]
            rest = tightest - length
            held[tightest] -= 1
            if not held[tightest]:
                del residuals[place]
        if not held[rest]:
            insort(residuals, rest)
        held[rest] += 1
    return bins


def measure_packing(name: str, *, mean: float, sigma: float, capacity: int) -> dict[str, Any]:
    lengths = draw(mean, sigma, count=LENGTHS, longest=capacity)
    bins = int(pack(lengths, capacity).max()) + 1
    start = time.perf_counter()
    plain = plain_bins(lengths, capacity)
    plain_seconds = time.perf_counter() - start
    return {
        "lengths": name,
        "mean": round(float(lengths.mean()), 1),
        "capacity": capacity,
        "bins": bins,
        "bins_plain": plain,
        "fill": round(int(lengths.sum()) / (bins * capacity), 5),
        **best_seconds(lambda: pack(lengths, capacity)),
        "plain_seconds": round(plain_seconds, 2),
    }


def measure_layouts(name: str, *, mean: float, sigma: float, capacity: int) -> list[dict[str, Any]]:
    lengths = draw(mean, sigma, count=LENGTHS, longest=capacity)
    rows = []
    for documents, ranks in STEPS:
        ids = np.random.default_rng(1).choice(LENGTHS, documents, replace=False)
        for packed in (True, False):
            arrange = partial(layout_step, ids, lengths[ids], capacity=capacity, ranks=ranks, packed=packed)
            layout = arrange()
            rows.append(
                {
                    "lengths": name,
                    "documents": documents,
                    "ranks": ranks,
                    "packed": packed,
                    "micro_batches_per_rank": len(layout.dealt),
                    "efficiency": round(layout.efficiency, 4),
                    "balance": round(layout.balance, 4),
                    "token_balance": round(layout.token_balance, 4),
                    "square_balance": round(layout.square_balance, 4),
                    **best_seconds(arrange),
                }
            )
    return rows


def measure_order() -> dict[str, Any]:
    lengths = draw(188, 0.45, count=ORDERED, longest=2048)
    every = np.arange(ORDERED)
    permutation = Permutation.keyed(ORDERED, "benchmark", 0, 0)

    def new_order() -> StepSampler:
        return StepSampler(lengths, fingerprint="benchmark", seed=0, global_batch_tokens=1 << 18)

    order = new_order()
    return {
        "documents": ORDERED,
        "permutation": best_seconds(lambda: permutation.at(every)),
        "boundaries_of_an_epoch": best_seconds(lambda: new_order().steps_in_epoch(0)),
        "steps": order.steps_in_epoch(0),
        "one_step": best_seconds(lambda: order.documents(0, order.steps_in_epoch(0) // 2)),
    }


def show(rows: list[dict[str, Any]], title: str, console: Console) -> None:
    table = Table(*rows[0], title=title)
    for row in rows:
        table.add_row(*map(str, row.values()))
    console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "packing.json")
    out: Path = parser.parse_args().out
    packing = [measure_packing(**distribution) for distribution in DISTRIBUTIONS]
    layouts = [row for distribution in DISTRIBUTIONS for row in measure_layouts(**distribution)]
    order = measure_order()
    console = Console(width=160)
    show(packing, f"packing {LENGTHS:,} lengths", console)
    show(layouts, "laying out a step", console)
    show([{"of": key, **value} for key, value in order.items() if isinstance(value, dict)], "order", console)
    results = {"machine": machine(), "repeats": REPEATS, "packing": packing, "layouts": layouts, "order": order}
    out.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
