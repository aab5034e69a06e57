"""End to end beside peers: TRL, Hugging Face's Trainer, a minimal DeepSpeed loop, and nothing at all round the model.

    python -m pip install --no-deps --target PEERS -r benchmarks/requirements.txt
    PYTHONPATH=PEERS python -m benchmarks.peers [--stages 1 2 3] [--lengths gsm8k chat] [--turns 3] [--out FILE]
    python -m benchmarks.peers --table FILE

Two gloo ranks with one thread each. TRL falls back to plain data parallelism where DeepSpeed is not set up for gloo;
here it is, and every step asserts it. CPU seconds are the figure to look at where others use the machine too. A turn is
a pair of ranks that runs all of them after each other; every second turn runs them the other way round.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from transformers import AutoConfig, AutoModelForCausalLM

from benchmarks.machine import machine
from benchmarks.packing import draw
from tests.launch import ROOT, environment, free_port
from tests.tiny import WORDS, train_tokenizer

# Mean tokens, sigma of the logarithm, documents a step, rows of a padded micro-batch, tokens of a packed one.
LENGTHS: dict[str, dict[str, Any]] = {
    "gsm8k": {"mean": 188, "sigma": 0.45, "docs": 24, "micro": 4, "capacity": 2048},
    "chat": {"mean": 978, "sigma": 1.0, "docs": 8, "micro": 2, "capacity": 4096},
    "chat, rows of 8k": {"mean": 978, "sigma": 1.0, "docs": 16, "micro": 2, "capacity": 8192},
}
SHAPE = {"hidden_size": 256, "intermediate_size": 688, "num_hidden_layers": 4, "num_attention_heads": 4}
VOCABULARY = 8192
STEPS = 5


def build(folder: Path, lengths: dict[str, Any]) -> tuple[Path, Path]:
    """A small Llama and rows of such lengths: the config's path, and the model's."""
    tokenizer = train_tokenizer()
    model = folder / "model"
    figures = {**SHAPE, "num_key_value_heads": 2, "vocab_size": VOCABULARY, "max_position_embeddings": 8192}
    config = AutoConfig.for_model("llama", **figures, eos_token_id=tokenizer.eos_token_id)
    AutoModelForCausalLM.from_config(config).save_pretrained(model)
    tokenizer.add_special_tokens({"pad_token": "<eos>"})
    tokenizer.save_pretrained(model)
    count = lengths["docs"] * STEPS
    choose = np.random.default_rng(1)
    rows = []
    for length in draw(lengths["mean"], lengths["sigma"], count=count, longest=lengths["capacity"] - 8):
        words = choose.choice(WORDS, int(length)).tolist()
        cut = max(1, len(words) // 3)
        rows.append({"question": " ".join(words[:cut]), "answer": " ".join(words[cut:]) or "one"})
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    run = {
        "model": {"base_name": str(model), "dtype": "float32", "dropout": 0.0},
        "dataset": {"name": str(folder / "rows.jsonl"), "store_dir": str(folder / "stores"), "workers": 1},
        "format": {"prompt_template": "Q: {question} A:"},
        "training": {
            "parameters": {"max_seq_length": lengths["capacity"]},
            "schedule": {"global_batch_size": lengths["docs"], "micro_batch_tokens": lengths["capacity"]},
        },
    }
    (folder / "run.yaml").write_text(json.dumps(run))
    return folder / "run.yaml", model


def measure(name: str, stage: int, *, turn: int, timeout: int, only: list[str]) -> dict[str, Any]:
    """What the ranks measured in one turn, as far as they came."""
    lengths = LENGTHS[name]
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        config, model = build(folder, lengths)
        command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
        command += ["--master-addr", "127.0.0.1", "--master-port", str(free_port()), "-m", "benchmarks.peer_ranks"]
        asked: dict[str, Any] = {"config": config, "model": model, "folder": folder, "out": folder / "out.json"}
        asked |= {"stage": stage, "turn": turn}
        asked |= {key: lengths[key] for key in ("docs", "micro", "capacity")}
        for key, value in asked.items():
            command += [f"--{key}", str(value)]
        command += ["--only", *only] if only else []
        # DeepSpeed's operators lie where the trainer keeps them; peers would else compile them once more.
        operators = str(Path(sys.prefix).resolve() / "torch_extensions")
        paths = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
        try:
            subprocess.run(
                command,
                cwd=ROOT,
                env=environment(PYTHONPATH=paths, TORCH_EXTENSIONS_DIR=operators),
                timeout=timeout,
                check=False,
            )
        except subprocess.TimeoutExpired:
            print(f"{name}, stage {stage}: stopped after {timeout} s")
        out = folder / "out.json"
        return json.loads(out.read_text()) if out.exists() else {}


def tables(results: dict[str, Any]) -> str:
    """How many times a contestant's document tokens a CPU second ours trains on: medians over the turns."""
    settings = [(run["lengths"], run["zero"], run["turns"]) for run in results["runs"]]
    names = list(dict.fromkeys(name for *_, turns in settings for turn in turns for name in sorted(turn)))
    lines = []
    for ours in [name for name in names if name.startswith("seqaware")]:
        lines.append(
            " | ".join([f"| {ours}, beside", *(f"{lengths}, ZeRO-{zero}" for lengths, zero, _ in settings), "median |"])
        )
        lines.append("|---" * (len(settings) + 2) + "|")
        for name in names:
            ratios = [_median_ratio(turns, ours, name) for *_, turns in settings]
            known = [ratio for ratio in ratios if ratio is not None]
            cells = ["–" if ratio is None else f"{ratio:.2f}" for ratio in [*ratios, statistics.median(known)]]
            lines.append(f"| {name} | " + " | ".join(cells) + " |")
        lines.append("")
    return "\n".join(lines)


def _median_ratio(turns: list[dict[str, Any]], ours: str, name: str) -> float | None:
    """None: no turn came so far as to measure both."""
    figure = "tokens_per_cpu_second"
    ratios = [turn[ours][figure] / turn[name][figure] for turn in turns if ours in turn and name in turn]
    return statistics.median(ratios) if ratios else None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stages", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--lengths", nargs="+", default=list(LENGTHS), choices=list(LENGTHS))
    parser.add_argument("--only", nargs="*", default=[])
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--timeout", type=int, default=900, help="seconds a turn may take")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/peers.json"))
    parser.add_argument("--table", type=Path, help="only the tables of results that are there")
    asked = parser.parse_args()
    if asked.table:
        print(tables(json.loads(asked.table.read_text())))
        return
    results: dict[str, Any] = {
        "machine": machine(),
        "model": {**SHAPE, "vocab_size": VOCABULARY},
        "lengths": LENGTHS,
        "runs": [{"lengths": name, "zero": stage, "turns": []} for name in asked.lengths for stage in asked.stages],
    }
    for turn in range(asked.turns):
        for run in results["runs"]:
            figures = measure(run["lengths"], run["zero"], turn=turn, timeout=asked.timeout, only=asked.only)
            run["turns"].append(figures)
            asked.out.write_text(json.dumps(results, indent=1) + "\n")
    print(tables(results))


if __name__ == "__main__":
    main()
