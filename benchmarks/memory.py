"""Is the plan's estimate of memory and communication right? Real runs on gloo ranks, measured and compared.

    python -m benchmarks.memory [--only NAME …] [--out FILE]

A Llama of 20 million weights is trained for four steps of two micro-batches in every layout below. In the last step
the ranks count every byte that tensors hold, at its peak in the forwards, the backwards and the update, and every byte
that goes into a collective. The estimate comes from the same YAML and DeepSpeed JSON, without running anything. The
process's resident set is shown beside: it holds libraries, gloo's buffers and freed memory too.
Needs a C++ compiler.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import socket
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from benchmarks.machine import machine
from seqaware.config.loading import load_config
from seqaware.estimate.layout import Layout, layout_of
from seqaware.estimate.memory import UPDATE, MemoryEstimate, memory
from seqaware.estimate.step_time import collectives
from seqaware.tools.dry_run import plan_without_torch

HERE = Path(__file__).parent
TOKENIZER = HERE.parent / "demo" / "tokenizer"
MICRO_TOKENS, LENGTH = 512, 256
MODEL = {
    "vocab_size": 8192,
    "hidden_size": 512,
    "intermediate_size": 1408,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": False,
}
# Buckets in proportion to the model: at their defaults they would be all that is measured.
BUCKETS = {"reduce_bucket_size": 2_000_000}
GATHERS = {
    "stage3_prefetch_bucket_size": 1_000_000,
    "stage3_param_persistence_threshold": 10_000,
    "stage3_max_live_parameters": 5_000_000,
    "stage3_max_reuse_distance": 5_000_000,
}
ZERO: dict[str, dict[str, Any]] = {
    "0": {"stage": 0},
    "1": {"stage": 1, **BUCKETS},
    "2": {"stage": 2, "overlap_comm": True, **BUCKETS},
    "3": {"stage": 3, "overlap_comm": True, **BUCKETS, **GATHERS},
    "3 all live": {"stage": 3, "overlap_comm": True, **BUCKETS},
    "2 offload": {"stage": 2, "overlap_comm": True, **BUCKETS, "offload_optimizer": {"device": "cpu"}},
    "3 offload": {
        **{"stage": 3, "overlap_comm": True, **BUCKETS, **GATHERS},
        **{"offload_optimizer": {"device": "cpu"}, "offload_param": {"device": "cpu"}},
    },
}
CHECKPOINTING = {"model": {"activation_checkpointing": "full"}}
SELECTIVE = {"model": {"activation_checkpointing": "selective"}}
COMPILED = {"model": {"compile": True}}
BFLOAT16 = {"model": {"dtype": "bfloat16"}}


@dataclass(frozen=True)
class Case:
    """A layout, and what it trains on.

    zero: a key of ZERO. settings: sections of the YAML. tokens: of a sequence group's micro-batch, in documents of
    `length`. passes: micro-batches of a rank in a step.
    """

    ranks: int
    zero: str
    name: str = ""
    settings: dict[str, dict[str, Any]] = field(default_factory=dict)
    tokens: int = MICRO_TOKENS
    length: int = LENGTH
    passes: int = 2
    steps: int = 4

    @property
    def title(self) -> str:
        return f"{self.ranks} ranks, ZeRO-{self.zero}" + (f", {self.name}" if self.name else "")


def _shared(ranks: int) -> dict[str, dict[str, Any]]:
    return {"parallel": {"sequence": ranks}}


def _tiled(ranks: int) -> dict[str, dict[str, Any]]:
    """What a long sequence is trained with: shared, and MLPs in tiles."""
    return _shared(ranks) | {"model": {"mlp_tile_tokens": 64}}


CASES = (
    *(Case(2, zero) for zero in ZERO),
    Case(2, "3", "1024 tokens, sequence 2", _shared(2), 1024),
    Case(4, "3", "1024 tokens, sequence 4", _shared(4), 1024),
    Case(4, "2", "1024 tokens, sequence 4, checkpointing", _shared(4) | CHECKPOINTING, 1024),
    Case(2, "2", "checkpointing, 1024 tokens", CHECKPOINTING, 1024),
    *(Case(2, zero, "checkpointing", CHECKPOINTING) for zero in ("2", "3")),
    *(Case(2, zero, "selective, 1024 tokens", SELECTIVE, 1024) for zero in ("2", "3")),
    Case(2, "3", "selective, 1024 tokens, sequence 2", _shared(2) | SELECTIVE, 1024),
    Case(2, "2", "selective, bfloat16, 1024 tokens", {"model": {**SELECTIVE["model"], **BFLOAT16["model"]}}, 1024),
    *(Case(2, zero, "compiled, 1024 tokens", COMPILED, 1024) for zero in ("2", "3")),
    Case(2, "2", "compiled, bfloat16, 1024 tokens", {"model": {**COMPILED["model"], **BFLOAT16["model"]}}, 1024),
    Case(2, "3", "plain loss", {"model": {"loss_kernel": "plain"}}),
    *(Case(4, zero) for zero in ("1", "2", "3")),
    # The same weights and states on every rank, and activations that fall with the ranks of a sequence.
    *(Case(4, "3", f"2048 tokens in tiles, sequence {ranks}", _tiled(ranks), 2048) for ranks in (1, 2, 4)),
    *(Case(2, zero, "bfloat16", BFLOAT16) for zero in ("1", "2", "3")),
)


def build_counter(folder: Path) -> Path:
    """Compile the counting allocator against this torch."""
    root = Path(torch.__file__).parent
    library = folder / "counting_allocator.so"
    source = HERE / "counting_allocator.cpp"
    flags = ["-O2", "-shared", "-fPIC", "-std=c++20", f"-I{root / 'include'}"]
    links = [f"-L{root / 'lib'}", "-lc10", "-o", str(library)]
    subprocess.run(["g++", *flags, str(source), *links], check=True)
    return library


def prepare(folder: Path, *, words_of_a_row: int = 3000, rows: int = 40, **sizes: int) -> None:
    """The model with fresh weights, its tokenizer, and rows that fill every micro-batch to the last token."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **MODEL | sizes), dtype=torch.float32)
    model.save_pretrained(folder / "model")
    AutoTokenizer.from_pretrained(TOKENIZER).save_pretrained(folder / "model")
    draw = random.Random(0)
    words = ("keys", "books", "apples", "pens", "coins", "cards", "has", "buys", "gives", "left", "more", "total")
    texts = (json.dumps({"text": " ".join(draw.choices(words, k=words_of_a_row))}) for _ in range(rows))
    (folder / "rows.jsonl").write_text("\n".join(texts))


def written(case: Case, folder: Path) -> tuple[Path, Path]:
    """The case as a YAML and a DeepSpeed JSON."""
    groups = case.ranks // case.settings.get("parallel", {}).get("sequence", 1)
    schedule = {
        "global_batch_size": case.passes * groups * case.tokens // case.length,
        "max_steps": case.steps,
        "micro_batch_tokens": case.tokens,
        "scheduler_type": "constant",
    }
    config: dict[str, Any] = {
        "model": {"base_name": str(folder / "model"), "dtype": "float32", **case.settings.get("model", {})},
        "parallel": case.settings.get("parallel", {}),
        "dataset": {"name": str(folder / "rows.jsonl"), "store_dir": str(folder / "stores"), "workers": 1},
        "format": {"on_overlong": "split"},
        "training": {"parameters": {"max_seq_length": case.length}, "schedule": schedule},
        "output": {"dir": str(folder / "run"), "save_model": False},
        "logging": {"progress": "off"},
    }
    yaml, deepspeed = folder / "run.yaml", folder / "zero.json"
    yaml.write_text(json.dumps(config))
    deepspeed.write_text(json.dumps({"zero_optimization": ZERO[case.zero]}))
    return yaml, deepspeed


def measure(case: Case, folder: Path, library: Path) -> dict[str, Any]:
    """Run the case and compare; the fullest rank counts."""
    layout = planned(case, folder)
    (measured,) = train([folder], case.ranks, library)
    shutil.rmtree(folder / "run")
    return compared(case, layout, measured)


def planned(case: Case, folder: Path) -> Layout:
    """What the plan knows of the case, whose files are written into the folder."""
    yaml, deepspeed = written(case, folder)
    layout = layout_of(plan_without_torch(load_config(yaml), deepspeed_path=deepspeed, ranks=case.ranks, gpu=False))
    assert layout is not None
    return layout


def train(folders: list[Path], ranks: int, library: Path) -> list[list[dict[str, Any]]]:
    """Train what was written into each folder, after each other in the same ranks: what every rank measured of each."""
    files = {"config": "run.yaml", "deepspeed": "zero.json", "result": "result"}
    requests = folders[0] / "requests.json"
    requests.write_text(json.dumps([{key: str(folder / name) for key, name in files.items()} for folder in folders]))
    launch(ranks, ["-m", "benchmarks.memory_ranks", str(requests), str(library)])
    return [[json.loads((folder / f"result.{rank}").read_text()) for rank in range(ranks)] for folder in folders]


def compared(case: Case, layout: Layout, ranks: list[dict[str, Any]]) -> dict[str, Any]:
    """One row of the result."""
    estimate = memory(layout)
    seen = {moment: max(rank["bytes"][moment] for rank in ranks) for moment in ("forward", "backward", "update")}
    expected = by_moment(estimate)
    peak = max(seen.values())
    (passes,) = {rank["micro_batches"] for rank in ranks}
    traffic: dict[str, int] = {}
    for each in collectives(layout, micro_batches=passes):
        traffic[each.kind] = traffic.get(each.kind, 0) + each.bytes
    measured = {kind.removesuffix("_into_tensor"): size for kind, size in ranks[0]["collectives"].items()}
    measured = {kind.removesuffix("_tensor").removesuffix("_single"): size for kind, size in measured.items()}
    return {
        "layout": case.title,
        "peak": {"measured": peak, "estimated": estimate.together, "error": round(estimate.together / peak - 1, 4)},
        "moments": {moment: {"measured": seen[moment], "estimated": expected[moment]} for moment in seen},
        "parts": dict(estimate.moments[estimate.moment]),
        "collectives": {
            kind: {"measured": measured.get(kind, 0), "estimated": traffic.get(kind, 0)}
            for kind in sorted({*measured, *traffic})
        },
        "resident_set": max(rank["resident_set"] for rank in ranks),
    }


def by_moment(estimate: MemoryEstimate) -> dict[str, int]:
    """The estimate by what was watched; on a CPU the offloaded states lie in the same memory."""
    host = sum(estimate.host.values())
    sizes = {moment: sum(parts.values()) + host for moment, parts in estimate.moments.items()}
    update = sizes.pop(UPDATE) + estimate.host_update
    forward = sizes.pop("end of the forward")
    return {"forward": forward, "backward": max(sizes.values()), "update": update}


def launch(ranks: int, command: list[str]) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "HF_HUB_OFFLINE": "1"}
    environment["PYTHONPATH"] = str(HERE.parent)
    starter = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(ranks), "--master-port", port]
    done = subprocess.run([*starter, *command], env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"the ranks failed:\n{done.stderr[-4000:]}")


def result(rows: list[dict[str, Any]]) -> dict[str, Any]:
    model = {**MODEL, "micro_batch_tokens": MICRO_TOKENS, "max_seq_length": LENGTH}
    return {"machine": machine(), "model": model, "zero": ZERO, "layouts": rows}


def earlier(path: Path) -> dict[str, dict[str, Any]]:
    """Rows of a file that was written here, by their layout: what is measured now replaces them one by one."""
    if not path.is_file():
        return {}
    before = json.loads(path.read_text())
    if _measured(before) != _measured(result([])):
        return {}
    return {row["layout"]: row for row in before["layouts"]}


def _measured(results: dict[str, Any]) -> dict[str, Any]:
    """What is measured, where, and with which packages: all that a row depends on."""
    place, packages = results["machine"], ("torch", "deepspeed", "transformers")
    return {
        "processor": [place.get(key) for key in ("system", "cpu", "cores", "python")],
        "packages": [place.get("versions", {}).get(package) for package in packages],
        "model": results["model"],
        "zero": results["zero"],
    }


def show(rows: list[dict[str, Any]]) -> None:
    columns = ("layout", "peak MB", "estimate", "error", "forward", "backward", "update", "resident", "traffic MB")
    table = Table(*columns, title="measured MB / estimated MB of tensors on the fullest rank")
    for row in rows:
        peak, moments = row["peak"], row["moments"].values()
        pairs = [f"{each['measured'] / 1e6:.0f} / {each['estimated'] / 1e6:.0f}" for each in moments]
        traffic = [
            f"{kind} {each['measured'] / 1e6:.1f} / {each['estimated'] / 1e6:.1f}"
            for kind, each in row["collectives"].items()
        ]
        resident = f"{row['resident_set'] / 1e6:.0f}" if row["resident_set"] else "not taken"
        figures = (f"{peak['measured'] / 1e6:.1f}", f"{peak['estimated'] / 1e6:.1f}", f"{peak['error']:+.1%}")
        table.add_row(row["layout"], *figures, *pairs, resident, "\n".join(traffic))
    Console(width=180).print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=HERE / "results" / "memory.json")
    parser.add_argument("--only", nargs="*", default=[], help="layouts whose title holds one of these")
    arguments = parser.parse_args()
    cases = [case for case in CASES if not arguments.only or any(part in case.title for part in arguments.only)]
    rows = earlier(arguments.out)
    with tempfile.TemporaryDirectory(prefix="seqaware-memory-") as name:
        folder = Path(name)
        library = build_counter(folder)
        prepare(folder)
        for case in cases:
            rows[case.title] = measure(case, folder, library)
            # After each: a run of many layouts on a busy machine may be cut short.
            arguments.out.write_text(json.dumps(result(list(rows.values())), indent=1) + "\n", encoding="utf-8")
            show([rows[case.title]])
    show(list(rows.values()))


if __name__ == "__main__":
    main()
