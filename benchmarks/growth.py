"""How the cost of a step grows with the work, and what the plan says of it.

    python -m benchmarks.growth                results in benchmarks/results/growth.json

Real runs of the small Llama of memory.py, one figure of it growing at a time: the tokens of a step, the length of a
document, the width of the model, the ranks. CPU seconds of a step over all ranks (median of the steps after the
second, but for the one in which memory is counted), and the most bytes that tensors hold on a rank. Beside both stands
the plan's estimate, from the YAML and the DeepSpeed JSON, for a device that multiplies and copies as fast as one thread
here does in a trial: the plan knows products, attention and the update, and neither norms nor what a step costs in any
case. A curve's exponent is the slope of its logarithms. Documents are pieces of long rows; the last piece is shorter.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.machine import machine
from benchmarks.memory import MODEL, Case, build_counter, compared, planned, prepare, train
from benchmarks.timing import seconds
from seqaware.engine.device_metrics import seconds_of_product
from seqaware.estimate.hardware import GIB, Device
from seqaware.estimate.step_time import step_time

RESULTS = Path(__file__).parent / "results" / "growth.json"
STEPS, WARM_UP = 8, 2
_ANY_MEMORY = 24 * GIB  # whether it fits is not asked
LENGTHS = (256, 512, 1024, 2048, 4096)


@dataclass(frozen=True)
class Point:
    """One run. size: what grows, in the unit of its curve. width: of the model."""

    curve: str
    size: int
    case: Case
    width: int


def points() -> list[Point]:
    """Every curve's runs, ZeRO-2 but where the ranks grow."""
    cases = [
        *(("tokens of a step", 512 * passes, Case(1, "2", passes=passes)) for passes in (2, 4, 8, 16)),
        *(("tokens of a document", length, Case(1, "2", tokens=length, length=length)) for length in LENGTHS),
        *(("width", width, Case(1, "2")) for width in (256, 512, 768, 1024)),
        *(("ranks", ranks, Case(ranks, "3", tokens=2048 // ranks)) for ranks in (1, 2, 4)),
    ]
    base = MODEL["hidden_size"]
    return [
        Point(curve, size, replace(case, steps=STEPS), width=size if curve == "width" else base)
        for curve, size, case in cases
    ]


def this_thread() -> Device:
    """One thread of this CPU: the rates of a large product and of a copy."""
    source = torch.randn(2**25)
    target = torch.empty_like(source)
    product = 2 * 1024**3 / seconds_of_product(torch.device("cpu"), torch.float32, size=1024, repeats=9)
    copy = 2 * source.nbytes / min(seconds(lambda: target.copy_(source), "cpu") for _ in range(9))
    return Device("one thread", _ANY_MEMORY, product, product, copy, copy, copy, efficiency=1.0, link_efficiency=1.0)


def measure(wanted: list[Point], device: Device, folder: Path) -> list[dict[str, Any]]:
    """Runs with the same ranks share a launch."""
    library = build_counter(folder)
    for width in {point.width for point in wanted}:
        sizes = {"hidden_size": width, "intermediate_size": width * 11 // 4, "num_attention_heads": width // 64}
        sizes["num_key_value_heads"] = width // 128
        sizes["max_position_embeddings"] = max(LENGTHS)
        prepare(folder / f"model-{width}", words_of_a_row=60_000, rows=4, **sizes)
    rows = []
    for ranks in sorted({point.case.ranks for point in wanted}):
        chosen = [point for point in wanted if point.case.ranks == ranks]
        folders = [_folder(point, folder) for point in chosen]
        layouts = [planned(point.case, each) for point, each in zip(chosen, folders, strict=True)]
        for point, layout, measured in zip(chosen, layouts, train(folders, ranks, library), strict=True):
            spent = [sum(each) for each in zip(*(rank["cpu_seconds"] for rank in measured), strict=True)]
            tokens = point.case.tokens * point.case.passes * ranks
            time = step_time(layout, device, step_tokens=tokens, mean_length=point.case.length)
            peak = compared(point.case, layout, measured)["peak"]
            figures = {
                "curve": point.curve,
                "size": point.size,
                "weights": layout.decoder.parameters,
                "cpu_seconds": round(statistics.median(spent[WARM_UP:]), 4),
                "estimated_cpu_seconds": round(time.seconds * ranks, 4),
                "peak_bytes": peak["measured"],
                "estimated_peak_bytes": peak["estimated"],
            }
            print(json.dumps(figures), flush=True)
            rows.append(figures)
    return rows


def _folder(point: Point, folder: Path) -> Path:
    """Of its own, with the model and the texts of its width."""
    own = folder / f"{point.curve.replace(' ', '-')}-{point.size}"
    own.mkdir()
    for name in ("model", "rows.jsonl"):
        (own / name).symlink_to(folder / f"model-{point.width}" / name)
    return own


def exponents(rows: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Of every curve and figure."""
    found: dict[str, dict[str, float]] = {}
    for curve in dict.fromkeys(row["curve"] for row in rows):
        own = [row for row in rows if row["curve"] == curve]
        sizes = np.log([row["size"] for row in own])
        names = ("cpu_seconds", "estimated_cpu_seconds", "peak_bytes", "estimated_peak_bytes")
        found[curve] = {
            name: round(float(np.polyfit(sizes, np.log([row[name] for row in own]), 1)[0]), 2) for name in names
        }
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--curves", nargs="*", default=[], help="those whose names hold one of these")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    device = this_thread()
    wanted = [point for point in points() if not asked.curves or any(part in point.curve for part in asked.curves)]
    with tempfile.TemporaryDirectory(prefix="seqaware-growth-") as name:
        rows = measure(wanted, device, Path(name))
    rates = {"products_per_second": device.wide_flops, "bytes_per_second": device.memory_rate}
    result = {"machine": machine(), "thread": rates, "model": MODEL, "runs": rows, "exponents": exponents(rows)}
    asked.out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result["exponents"], indent=1))


if __name__ == "__main__":
    main()
