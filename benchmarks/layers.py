"""What it costs to keep less of a layer for its backward, and what compiling its norms and MLP brings: time and memory.

    python -m benchmarks.layers                  results in benchmarks/results/layers.json

One rank, no ZeRO, the same micro-batch through the same Llama of 8 layers for every policy, a step of each in turn. CPU
seconds of the step, ratios as medians over the turns; memory is how far the process's resident memory rises in a step
above what it is between steps.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.overhead import ROOT, steps_of_ours

RESULTS = ROOT / "benchmarks" / "results" / "layers.json"
LENGTHS = {"mean": 188, "sigma": 0.45, "docs": 16, "capacity": 4096}
SHAPE = {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 8, "num_attention_heads": 4}
POLICIES = {
    "none": [],
    "one tile (mlp_tile_tokens: 4096)": ["model.mlp_tile_tokens=4096"],
    "the MLP alone, in tiles (mlp_tile_tokens: 1024)": ["model.mlp_tile_tokens=1024"],
    "selective": ["model.activation_checkpointing=selective"],
    "full": ["model.activation_checkpointing=full"],
    "offload": ["model.activation_checkpointing=offload"],
    "compile": ["model.compile=true"],
}


class Memory:
    """How far resident memory rises."""

    def __init__(self) -> None:
        gc.collect()
        ctypes.CDLL("libc.so.6").malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
        self._before = _status("VmRSS")

    def risen_mib(self) -> float:
        return (_status("VmHWM") - self._before) / 1024


def _status(name: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name + ":"))
    return int(line.split()[1])


def measure(folder: Path, *, turns: int, policies: list[str]) -> dict[str, Any]:
    from benchmarks import peers
    from seqaware.config.loading import load_config
    from seqaware.distributed.process_group import connect, disconnect, find_address, prepare_environment

    prepare_environment()
    from seqaware.data.batch_loader import StepBatches
    from seqaware.training.assembly import build_engine, row_format, world_of
    from seqaware.training.prepare import prepare

    peers.SHAPE, peers.VOCABULARY = SHAPE, 1024
    config, model = peers.build(folder, LENGTHS)
    address = find_address()
    ranks = connect(address)
    kinds = {}
    for name in policies:
        zero = ROOT / "ds_configs" / "zero0.json"
        settings = load_config(config, POLICIES[name])
        prepared = prepare(settings, world=world_of(address), deepspeed_path=zero, progress=None)
        engine = build_engine(prepared, str(model), ranks=ranks, say=lambda text: None)
        rows = row_format(prepared.plan, prepared)
        batches = StepBatches(prepared.store, prepared.order, rows=rows, rank=0, size=1)
        assert len(batches.of_step(1)) == 1, "the documents of a step fit one micro-batch"
        kinds[name] = steps_of_ours(engine, batches)
    spent: dict[str, list[float]] = {name: [] for name in kinds}
    risen: dict[str, list[float]] = {name: [] for name in kinds}
    for turn in range(turns + 1):
        for name, step in kinds.items():
            memory = Memory()
            begun = time.process_time()
            step(1)
            if turn:
                spent[name].append(time.process_time() - begun)
                risen[name].append(memory.risen_mib())
    disconnect()
    return {
        name: {
            "cpu_seconds": round(statistics.median(spent[name]), 3),
            "to_none": round(statistics.median(a / b for a, b in zip(spent[name], spent["none"], strict=True)), 3),
            "risen_mib": round(statistics.median(risen[name])),
        }
        for name in kinds
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=7)
    parser.add_argument("--policies", nargs="+", default=list(POLICIES), choices=list(POLICIES))
    parser.add_argument("--out", type=Path, default=RESULTS)
    asked = parser.parse_args()
    if os.environ.get("MALLOC_MMAP_THRESHOLD_") is None:
        # So that what is freed leaves the process: every tensor of some size is a mapping of its own.
        os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | {"MALLOC_MMAP_THRESHOLD_": "262144"})
    with tempfile.TemporaryDirectory() as name:
        found = measure(Path(name), turns=asked.turns, policies=asked.policies)
    from benchmarks.machine import machine

    shown = {"machine": machine(), "model": SHAPE, "lengths": LENGTHS, "turns": asked.turns, "policies": found}
    asked.out.write_text(json.dumps(shown, indent=1) + "\n")
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
