"""What planning and reading cost as the documents grow: seconds, and memory that is the process's own or only mapped.

    python -m benchmarks.scaling                 results in benchmarks/results/scaling.json

Stores of 10⁵, 10⁶ and 10⁷ documents of 20 tokens in the mean. Each is opened in a process of its own, after a small one
has warmed up what numba keeps. Own memory is what the kernel calls anonymous; mapped pages are the file's, and go when
others need the room.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from seqaware.config.schema import ScheduleConfig
from seqaware.data.packing import layout_step
from seqaware.data.sampler import StepSampler
from seqaware.data.store.store_specs import data_facts
from seqaware.data.store.store_writer import Block
from seqaware.data.store.token_store import StoreWriter, TokenStore

RESULTS = Path(__file__).parent / "results" / "scaling.json"
SIZES = (10**5, 10**6, 10**7)
MEAN_TOKENS = 20
STEP_DOCUMENTS = 256
STEP_TOKENS = STEP_DOCUMENTS * MEAN_TOKENS
STEPS_READ = 400
BLOCK = 50_000


def write(folder: Path, documents: int) -> Path:
    draw = np.random.default_rng(0)
    with StoreWriter(folder, vocab_size=50_257, eos_id=0) as writer:
        for first in range(0, documents, BLOCK):
            count = min(BLOCK, documents - first)
            lengths = np.clip(draw.lognormal(np.log(MEAN_TOKENS) - 0.1, 0.45, count), 2, 256).astype(np.int64)
            tokens = int(lengths.sum())
            writer.append_block(
                Block(
                    tokens=draw.integers(0, 50_257, tokens, dtype=np.uint32),
                    supervised=np.ones(tokens, dtype=np.bool_),
                    turn_start=np.zeros(tokens, dtype=np.bool_),
                    weights=None,
                    lengths=lengths,
                    rows=np.arange(first, first + count),
                    counted=None,
                    prefix="rows",
                )
            )
        return writer.finish()


class Parts:
    """CPU seconds of the parts of planning, and what they leave of memory."""

    def __init__(self) -> None:
        Path("/proc/self/clear_refs").write_text("5")
        self._before = _memory()
        self.cpu_seconds: dict[str, float] = {}
        self._clock = time.process_time()

    def done(self, name: str) -> None:
        now = time.process_time()
        self.cpu_seconds[name] = round(now - self._clock, 4)
        self._clock = time.process_time()

    def memory(self) -> dict[str, float]:
        after = _memory()
        return {name: round((after[name] - self._before[name]) / 1024, 1) for name in after}


def _memory() -> dict[str, int]:
    """KiB: anonymous now, mapped files now, and the most of both together since `Parts` began."""
    lines = Path("/proc/self/status").read_text().splitlines()
    told = {name: int(value.split()[0]) for name, value in (line.split(":", 1) for line in lines if " kB" in line)}
    return {"own_mib": told["RssAnon"], "mapped_mib": told["RssFile"], "most_mib": told["VmHWM"]}


def plan_and_read(path: Path) -> dict[str, Any]:
    parts = Parts()
    store = TokenStore.open(path)
    parts.done("open")
    by_size = StepSampler(store.lengths, fingerprint=store.fingerprint, seed=0, global_batch_size=STEP_DOCUMENTS)
    facts = data_facts(store, by_size, ScheduleConfig(global_batch_size=STEP_DOCUMENTS))
    parts.done("figures of the plan")
    steps = np.random.default_rng(1).integers(0, by_size.steps_in_epoch(0), STEPS_READ).tolist()
    chosen = [by_size.documents(0, step) for step in steps]
    parts.done(f"documents of {STEPS_READ} steps")
    for ids in chosen:
        layout_step(ids, store.lengths[ids], capacity=2048, ranks=8, packed=True)
    parts.done(f"layouts of {STEPS_READ} steps")
    for ids in chosen:
        store.documents(ids)
    parts.done(f"reading {STEPS_READ * STEP_DOCUMENTS} documents")
    without_budget = parts.memory()
    by_tokens = StepSampler(store.lengths, fingerprint=store.fingerprint, seed=0, global_batch_tokens=STEP_TOKENS)
    found = by_tokens.steps_in_epoch(0)
    parts.done("where an epoch's steps begin, by a budget of tokens")
    return {
        "documents": facts.documents,
        "cpu_seconds": parts.cpu_seconds,
        "memory_above_start": without_budget,
        "memory_above_start_with_a_budget": parts.memory(),
        "steps_by_budget": found,
    }


def exponents(runs: list[dict[str, Any]]) -> dict[str, float]:
    """Of each part's CPU seconds in the number of documents, between the two largest stores."""
    small, large = runs[-2:]
    factor = math.log(large["documents"] / small["documents"])
    names = large["cpu_seconds"]
    spent = {name: (max(small["cpu_seconds"][name], 1e-4), max(large["cpu_seconds"][name], 1e-4)) for name in names}
    return {name: round(math.log(after / before) / factor, 2) for name, (before, after) in spent.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--read", nargs=2, type=Path, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.read:
        plan_and_read(asked.read[0])
        print(json.dumps(plan_and_read(asked.read[1])))
        return
    runs = []
    for size in SIZES:
        with tempfile.TemporaryDirectory() as name:
            small, path = write(Path(name) / "small", 1000), write(Path(name) / "store", size)
            command = [sys.executable, "-m", "benchmarks.scaling", "--read", str(small), str(path)]
            printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        runs.append(json.loads(printed.splitlines()[-1]))
        print(json.dumps(runs[-1], indent=1), flush=True)
    from benchmarks.machine import machine

    shown = {"machine": machine(), "mean_tokens": MEAN_TOKENS, "runs": runs, "exponents": exponents(runs)}
    RESULTS.write_text(json.dumps(shown, indent=1) + "\n")


if __name__ == "__main__":
    main()
