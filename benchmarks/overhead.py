"""What a step costs beyond the model: our engine, beside DeepSpeed alone, and beside forward, backward and AdamW alone.

    python -m benchmarks.overhead                results in benchmarks/results/overhead.json

All train the same small Llama on the same micro-batches with the same attention and loss in the same processes, a step
of one after a step of the other, in an order that turns about. DeepSpeed alone is its engine with backward and step, as
its manual has it; bare is torch's all-reduce, clip and AdamW. Neither makes a batch or a denominator. Ours makes its
micro-batches inside its step, and reads its sums as a step that reports. CPU seconds of all ranks and all their
threads; ratios are medians over the turns. What is proportional to the weights and not to the tokens (ZeRO's copies of
gradients) weighs less in a larger step: --docs.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "overhead.json"


def steps_of_ours(engine: Any, batches: Any) -> Callable[[int], None]:
    def step(number: int) -> None:
        result = engine.train_step(batches.of_step(number), learning_rate=1e-4)
        assert result.applied
        result.sums.vector.tolist()

    return step


def steps_of_deepspeed(engine: Any, made: list[Any]) -> Callable[[int], None]:
    """The same DeepSpeed engine without us: no denominator, no sums, no look at the norm."""

    def step(number: int) -> None:
        for batch in made[number - 1]:
            loss, _ = engine._forward(batch, engine.weights(batch))
            engine.deepspeed.backward(loss / 1000.0, scale_wrt_gas=False)
        engine.deepspeed.step()

    return step


def steps_of_bare(engine: Any, made: list[Any]) -> Callable[[int], None]:
    """The wrapped model alone, with what a plain data-parallel loop does."""
    import torch
    import torch.distributed as dist

    from seqaware.models.layers import torchs_linear

    model = engine.wrapped
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    engine.deepspeed = model

    def step(number: int) -> None:
        with torchs_linear():
            for batch in made[number - 1]:
                loss, _ = engine._forward(batch, engine.weights(batch))
                (loss / 1000.0).backward()
        if engine.ranks.size > 1:
            gradients = [p.grad for p in model.parameters()]
            flat = torch.cat([each.flatten() for each in gradients])
            dist.all_reduce(flat)
            for gradient, part in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
                gradient.copy_(part.view_as(gradient))
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


def measure_here(config: Path, model: str, stage: int, *, turns: int) -> dict[str, Any]:
    """On every rank; what the first one returns holds for all."""
    from seqaware.config.loading import load_config
    from seqaware.distributed.process_group import connect, disconnect, find_address, prepare_environment

    prepare_environment()
    from seqaware.data.batch_loader import StepBatches
    from seqaware.training.assembly import build_engine, row_format, world_of
    from seqaware.training.prepare import prepare

    address = find_address()
    prepared = [
        prepare(
            load_config(config, [f"training.optimizer.type={optimizer}"]),
            world=world_of(address),
            deepspeed_path=ROOT / "ds_configs" / f"zero{each}.json",
            progress=None,
        )
        for each, optimizer in ((stage, "adamw"), (stage, "adamw_fused"), (stage, "adamw"), (0, "adamw"))
    ]
    ranks = connect(address)
    engines = [build_engine(each, model, ranks=ranks, say=lambda text: None) for each in prepared]
    rows = row_format(prepared[0].plan, prepared[0])
    batches = StepBatches(prepared[0].store, prepared[0].order, rows=rows, rank=ranks.rank, size=ranks.size)
    made = [batches.of_step(step) for step in range(1, turns + 2)]
    kinds = {
        "ours": steps_of_ours(engines[0], batches),
        "ours, AdamW fused": steps_of_ours(engines[1], batches),
        "DeepSpeed alone": steps_of_deepspeed(engines[2], made),
        "bare": steps_of_bare(engines[3], made),
    }
    spent: dict[str, list[float]] = {name: [] for name in kinds}
    names = list(kinds)
    for turn in range(1, turns + 2):
        names = [*names[1:], names[0]]
        for name in names:
            ranks.barrier()
            begun = time.process_time()
            kinds[name](turn)
            used = sum(ranks.gather(time.process_time() - begun))
            if turn > 1:
                spent[name].append(used)
    disconnect()
    return {name: _figures(each, spent) for name, each in spent.items()}


def _figures(mine: list[float], spent: dict[str, list[float]]) -> dict[str, Any]:
    return {
        "cpu_seconds": round(statistics.median(mine), 3),
        "least_cpu_seconds": round(min(mine), 3),
        "to_bare": _ratios(mine, spent["bare"]),
        "to_deepspeed_alone": _ratios(mine, spent["DeepSpeed alone"]),
        "turns": len(mine),
    }


def _ratios(mine: list[float], other: list[float]) -> list[float]:
    """First quartile, median and third quartile over the turns."""
    return [round(each, 3) for each in statistics.quantiles([a / b for a, b in zip(mine, other, strict=True)], n=4)]


def measure(stage: int, ranks: int, *, docs: int, turns: int) -> dict[str, Any]:
    from benchmarks.peers import LENGTHS, build
    from tests.launch import environment, free_port

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        lengths = LENGTHS["gsm8k"]
        # A larger step has larger micro-batches, not more of them.
        capacity = lengths["capacity"] * max(1, docs // lengths["docs"])
        config, model = build(folder, {**lengths, "docs": docs, "capacity": capacity})
        out = folder / "out.json"
        launcher = ["-m", "torch.distributed.run", "--nproc-per-node", str(ranks), "--master-port", str(free_port())]
        command = [
            sys.executable,
            *launcher,
            "-m",
            "benchmarks.overhead",
            "--rank",
            str(config),
            str(model),
            str(stage),
            str(turns),
            str(out),
        ]
        operators = str(Path(sys.prefix).resolve() / "torch_extensions")
        subprocess.run(command, cwd=ROOT, env=environment(TORCH_EXTENSIONS_DIR=operators), check=True)
        figures: dict[str, Any] = json.loads(out.read_text())
        return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stages", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--docs", type=int, default=24, help="documents a step")
    parser.add_argument("--turns", type=int, default=11)
    parser.add_argument("--rank", nargs=5, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.rank:
        config, model, stage, turns, out = asked.rank
        figures = measure_here(Path(config), model, int(stage), turns=int(turns))
        if os.environ["RANK"] == "0":
            Path(out).write_text(json.dumps(figures))
        return
    from benchmarks.machine import machine

    found: dict[str, Any] = json.loads(RESULTS.read_text()) if RESULTS.exists() else {"runs": {}}
    found["machine"] = machine()
    for ranks in asked.ranks:
        for stage in asked.stages:
            name = f"ZeRO-{stage}, {ranks} ranks, {asked.docs} documents a step"
            found["runs"][name] = measure(stage, ranks, docs=asked.docs, turns=asked.turns)
            print(name, json.dumps(found["runs"][name]), flush=True)
            RESULTS.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
