"""What a checkpoint costs: how long training stands still for it, and what memory an export takes.

    python -m benchmarks.checkpoints [--hidden 768] [--stages 1 3] [--rounds 3] [--out FILE]

A Llama from scratch is trained on two gloo ranks of one thread, with a checkpoint every other step, written at once
and written in the background, in turns; the run itself tells of each checkpoint how long it took and how long training
stood still for it. Then `launcher/export.py` makes a model's folder of the last one, and its memory is read twenty
times a second: anonymous memory is what it holds; pages of mapped files the kernel takes back when it needs them.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from transformers import AutoConfig, AutoModelForCausalLM

from benchmarks.machine import machine
from tests import launch, tiny

STEPS, VOCABULARY = 6, 16384
LOOKS_A_SECOND = 20


def build(folder: Path, hidden: int) -> tuple[tiny.Workshop, int]:
    """A workshop whose model is larger, and the number of its parameters."""
    workshop = tiny.build(folder)
    config = AutoConfig.from_pretrained(workshop.model)
    config.update({"hidden_size": hidden, "intermediate_size": 3 * hidden, "num_hidden_layers": 8, "head_dim": 64})
    config.update({"num_attention_heads": hidden // 64, "num_key_value_heads": hidden // 128})
    config.vocab_size = VOCABULARY
    model = AutoModelForCausalLM.from_config(config)
    model.save_pretrained(workshop.model)
    return workshop, sum(parameter.numel() for parameter in model.parameters())


def train(workshop: tiny.Workshop, name: str, *, stage: int, background: bool) -> list[dict[str, Any]]:
    """The run's own figures of its checkpoints, but for the last one, which nothing comes after."""
    schedule = {"num_epochs": 9, "max_steps": STEPS, "global_batch_size": 13, "scheduler_type": "constant"}
    settings = {"training__schedule": schedule, "output__dir": str(workshop.folder / name), "output__save_every": 2}
    settings |= {"output__async_save": background, "output__save_model": False, "output__keep_last": 1}
    path = workshop.write(name, workshop.config(**settings))
    zero = str(launch.DS_CONFIGS / f"zero{stage}.json")
    done = launch.deepspeed("launcher/train.py", str(path), "--deepspeed", zero, ranks=2)
    if done.returncode != 0:
        sys.exit(done.stderr[-4000:])
    lines = map(json.loads, (workshop.folder / name / "metrics.jsonl").read_text().splitlines())
    return [line for line in lines if line["kind"] == "checkpoint"][:-1]


def export(checkpoint: Path, folder: Path) -> dict[str, float]:
    """Peak memory of an export, in MB, above what the process held with its imports done."""
    command = [sys.executable, "launcher/export.py", str(checkpoint), str(folder)]
    process = subprocess.Popen(command, env=launch.environment(), cwd=launch.ROOT)
    anonymous: list[float] = []
    mapped: list[float] = []
    while process.poll() is None:
        status = Path(f"/proc/{process.pid}/status").read_text()
        if found := re.search(r"RssAnon:\s+(\d+) kB\nRssFile:\s+(\d+) kB", status):
            anonymous.append(int(found[1]) / 1e3)
            mapped.append(int(found[2]) / 1e3)
        time.sleep(1.0 / LOOKS_A_SECOND)
    if process.returncode != 0:
        sys.exit("the export failed")
    return {"anonymous_mb": max(anonymous), "mapped_mb": max(mapped)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=768)
    parser.add_argument("--stages", type=int, nargs="+", default=[1, 3])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    rows, exports = [], []
    with tempfile.TemporaryDirectory() as scratch:
        workshop, parameters = build(Path(scratch), arguments.hidden)
        small = tiny.build(Path(scratch, "small"))
        train(small, "small", stage=1, background=False)
        imports = export(_newest(small, "small"), Path(scratch, "small-model"))["anonymous_mb"]
        for stage in arguments.stages:
            rows.append({"zero": stage, **compare(workshop, stage, rounds=arguments.rounds)})
            peak = export(_newest(workshop, f"zero{stage}-0-False"), Path(scratch, f"model-{stage}"))
            own = peak["anonymous_mb"] - imports
            exports.append({"zero": stage, "model_mb": parameters * 4 / 1e6, "own_mb": own, **peak})
    result = {"parameters": parameters, "checkpoints": rows, "exports": exports, "machine": machine()}
    _show(result)
    if arguments.out:
        arguments.out.write_text(json.dumps(result, indent=1) + "\n")


def _newest(workshop: tiny.Workshop, name: str) -> Path:
    return max((workshop.folder / name / "checkpoints").glob("step-*[0-9]"))


def compare(workshop: tiny.Workshop, stage: int, *, rounds: int) -> dict[str, float]:
    """Medians over the checkpoints of runs that write them at once, and in the background, in turns."""
    seen: dict[bool, list[dict[str, Any]]] = {False: [], True: []}
    for turn in range(rounds):
        for background, lines in seen.items():
            lines += train(workshop, f"zero{stage}-{turn}-{background}", stage=stage, background=background)

    def median(background: bool, what: str) -> float:
        return statistics.median(float(line[what]) for line in seen[background])

    return {
        "bytes": median(False, "bytes"),
        "at_once_seconds": median(False, "stood_still"),
        "background_seconds": median(True, "seconds"),
        "background_stood_still": median(True, "stood_still"),
        "share": median(True, "stood_still") / median(False, "stood_still"),
    }


def _show(result: dict[str, Any]) -> None:
    console = Console()
    table = Table(
        "ZeRO", "checkpoint", "at once: stands still", "in the background: stands still", "written in", "share"
    )
    for row in result["checkpoints"]:
        size, still = f"{row['bytes'] / 1e6:,.0f} MB", f"{row['background_stood_still']:.2f} s"
        written = f"{row['background_seconds']:.2f} s"
        table.add_row(str(row["zero"]), size, f"{row['at_once_seconds']:.2f} s", still, written, f"{row['share']:.1%}")
    console.print(table)
    table = Table("ZeRO", "model", "the export's own memory", "of it times the model")
    for row in result["exports"]:
        times = row["own_mb"] / row["model_mb"]
        table.add_row(str(row["zero"]), f"{row['model_mb']:,.0f} MB", f"{row['own_mb']:,.0f} MB", f"{times:.2f}")
    console.print(table)


if __name__ == "__main__":
    main()
