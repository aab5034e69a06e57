"""Training steps on one GPU, for gpu.py: our engine, a minimal DeepSpeed loop, and TRL.

A model of the 1B or the 8B shape of Llama 3 is made with random bfloat16 weights; of the 8B shape, as many layers as
one GPU holds with the optimizer's states and a micro-batch. Documents of drawn lengths, an eighth of a row in the mean,
are packed into rows of 8k or 32k tokens; a micro-batch of ours holds 32k tokens, and layers are compiled.

    MFU = (6·M + 6·Λ·A·D·Σ L² / Σ L) · tokens / seconds / peak       only the documents' tokens count, padding never

M: weights that multiply every token (all but the input embedding), Λ layers, A·D width of the queries, L lengths of the
documents. What activation checkpointing works out again is not counted. The peak is the vendor's for dense bfloat16.
"""

from __future__ import annotations

import gc
import json
import random
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from seqaware.estimate import hardware
from seqaware.estimate.hardware import DEVICES, Device

ROOT = Path(__file__).parent.parent
TOKENIZER = ROOT / "demo" / "tokenizer"
WARM_UP = 2
MOST_STEPS = 8
# Of ours on a GPU: as many as the longest rows.
MICRO_TOKENS = 32_768
# ZeRO-1 and 3 on one rank: weights 2, gradients 2 + 4, float32 weights and moments 12 bytes.
STATE_BYTES = 20


@dataclass(frozen=True)
class Shape:
    """A Llama. layers: in the original; those that fit are made."""

    name: str
    hidden: int
    intermediate: int
    layers: int
    heads: int
    key_heads: int
    vocabulary: int = 128_256
    tied: bool = False

    def config(self, layers: int, positions: int) -> dict[str, Any]:
        return {
            "vocab_size": self.vocabulary,
            "hidden_size": self.hidden,
            "intermediate_size": self.intermediate,
            "num_hidden_layers": layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.key_heads,
            "max_position_embeddings": positions,
            "tie_word_embeddings": self.tied,
            "eos_token_id": 1,
        }

    @property
    def layer_weights(self) -> int:
        width = self.hidden // self.heads * (2 * self.heads + 2 * self.key_heads)
        return self.hidden * (width + 3 * self.intermediate + 2)

    @property
    def head_weights(self) -> int:
        return self.vocabulary * self.hidden

    def layers_that_fit(self, memory: float, tokens: int) -> int:
        """In 90 % of the memory, with the optimizer's states and what a micro-batch of so many tokens keeps."""
        embeddings = self.head_weights * (1 if self.tied else 2)
        # The head's gradient, in float32 and in bfloat16; a compiled layer keeps some 13 H + 6 I bytes a token.
        outside = STATE_BYTES * embeddings + 6 * self.head_weights
        layer = STATE_BYTES * self.layer_weights + (13 * self.hidden + 6 * self.intermediate) * tokens
        return max(1, min(self.layers, int((0.9 * memory - outside) / layer)))

    def operations(self, layers: int, lengths: list[int]) -> float:
        """Of forward and backward over documents of these lengths."""
        products = 6 * (layers * self.layer_weights + self.head_weights) * sum(lengths)
        return products + 6 * layers * self.hidden * sum(length * length for length in lengths)


SHAPES = {
    "1b": Shape("1b", 2048, 8192, 16, 32, 8, tied=True),
    "8b": Shape("8b", 4096, 14_336, 32, 32, 8),
    "toy": Shape("toy", 64, 128, 2, 4, 2, vocabulary=1000),
}


@dataclass(frozen=True)
class Work:
    """What one process measures: a shape, a ZeRO stage, and rows of these lengths; seconds for all of it.

    micro_batches: with MICRO_TOKENS each they make the tokens of a step. attention: ours, not the peers'.
    """

    shape: Shape
    stage: int
    rows: tuple[int, ...]
    device: str
    seconds: float
    folder: Path
    micro_batches: int = 2
    attention: str = "auto"

    @property
    def layers(self) -> int:
        if self.device == "cpu":
            return self.shape.layers
        memory = torch.cuda.get_device_properties(0).total_memory
        return self.shape.layers_that_fit(memory, MICRO_TOKENS)

    @property
    def model(self) -> Path:
        return self.folder / f"model-{self.shape.name}"

    @property
    def step_tokens(self) -> int:
        return self.micro_batches * (MICRO_TOKENS if self.device == "cuda" else max(self.rows))

    @property
    def micro_tokens(self) -> int:
        return max(self.rows)


def plan_device(device: str) -> Device:
    """What the plan reckons with for this GPU, with the memory that torch reports; a CPU is taken for an H100."""
    if device == "cpu":
        return DEVICES["h100"]
    card = torch.cuda.get_device_properties(0)
    nearest = next((each for key, each in DEVICES.items() if key in card.name.lower()), DEVICES["h100"])
    narrow = hardware.peak_flops(card.name, "bfloat16") or nearest.narrow_flops
    return replace(nearest, memory=card.total_memory, narrow_flops=narrow)


def peak_flops(device: str) -> float:
    """Dense bfloat16 of the vendor's sheet; of a CPU what a product reaches here."""
    if device == "cuda":
        return plan_device(device).narrow_flops
    a = torch.randn(512, 512)
    start = time.perf_counter()
    torch.mm(a, a)
    return 2 * 512**3 / (time.perf_counter() - start)


def make_model(work: Work) -> None:
    """Random weights in bfloat16, written once; every contestant loads them."""
    if (work.model / "config.json").is_file():
        return
    config = AutoConfig.for_model("llama", **work.shape.config(work.layers, max(work.rows) * 64))
    with torch.device(work.device):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(work.model)
    AutoTokenizer.from_pretrained(TOKENIZER).save_pretrained(work.model)


def make_rows(work: Work, row: int) -> Path:
    """Texts of about row / 8 tokens in the mean, evenly drawn, none longer than a row; enough for all steps."""
    path = work.folder / f"rows-{row}.jsonl"
    if path.is_file():
        return path
    draw = random.Random(0)
    tokenizer = AutoTokenizer.from_pretrained(TOKENIZER)
    words = ("keys", "books", "apples", "pens", "coins", "cards", "has", "buys", "gives", "left", "more", "total")
    per_word = len(tokenizer(" ".join(words)).input_ids) / len(words)
    lines, tokens = [], 0
    while tokens < MOST_STEPS * work.step_tokens * 1.1:
        length = draw.randint(row // 32, row // 32 * 7)
        lines.append(json.dumps({"text": " ".join(draw.choices(words, k=max(2, int(length / per_word))))}))
        tokens += length
    path.write_text("\n".join(lines))
    return path


def run_files(work: Work, row: int, **model: Any) -> tuple[Path, Path]:
    """A YAML of ours, and the ds_config."""
    config = {
        "model": {
            "base_name": str(work.model),
            "dtype": "bfloat16",
            "attention": work.attention,
            **model,
        },
        "dataset": {"name": str(make_rows(work, row)), "store_dir": str(work.folder / "stores"), "workers": 1},
        "format": {"on_overlong": "split"},
        "training": {
            "parameters": {"max_seq_length": row},
            "optimizer": {"type": "adamw_fused" if work.device == "cuda" else "adamw", "lr": 1e-5},
            "schedule": {
                "global_batch_tokens": work.step_tokens,
                "micro_batch_tokens": work.micro_tokens,
                "max_steps": MOST_STEPS,
                "scheduler_type": "constant",
            },
        },
        "packing": {"enabled": True},
        "output": {"dir": str(work.folder / f"run-{work.shape.name}-{work.stage}-{row}"), "save_model": False},
        "logging": {"progress": "off"},
    }
    yaml = work.folder / f"{work.shape.name}-{work.stage}-{row}.yaml"
    yaml.write_text(json.dumps(config))  # JSON is YAML
    return yaml, ROOT / "ds_configs" / f"zero{work.stage}.json"


Step = Callable[[list[Any]], object]
Found = Callable[[dict[str, Any]], None]


def measured(work: Work, row: int, *, batches: Iterator[list[Any]], step: Step, until: float) -> dict[str, Any]:
    """Steps over the batches until the time is up, three at least after the warm-up: medians, and the most memory."""
    spent, rates = [], []
    if work.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    for index, micro_batches in enumerate(batches):
        synchronize(work.device)
        start = time.perf_counter()
        step(micro_batches)
        synchronize(work.device)
        seconds = time.perf_counter() - start
        if index >= WARM_UP:
            lengths = [length for batch in micro_batches for length in _documents_of(batch)]
            spent.append(seconds)
            rates.append((sum(lengths) / seconds, work.shape.operations(work.layers, lengths) / seconds))
        if len(spent) >= 3 and time.monotonic() > until:
            break
    tokens, flops = (statistics.median(column) for column in zip(*rates, strict=True))
    return {
        "row": row,
        "steps": len(spent),
        "step_seconds": statistics.median(spent),
        "tokens_per_second": tokens,
        "mfu": flops / peak_flops(work.device),
        "peak_gib": torch.cuda.max_memory_allocated() / 2**30 if work.device == "cuda" else None,
    }


def _documents_of(batch: Any) -> list[int]:
    """Lengths of a batch's documents: its segments, but for the one of padding that may end its row."""
    assert batch.input_ids.shape[0] == 1, "a micro-batch is one row here"
    lengths = list(batch.lengths)
    return lengths[:-1] if sum(lengths) > batch.tokens else lengths


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def batches_of(work: Work, row: int, **model: Any) -> tuple[Any, Iterator[list[Any]]]:
    """What our data pipeline makes of the rows: what is known before the ranks meet, and each step's micro-batches."""
    from seqaware.config.loading import load_config
    from seqaware.data.batch_loader import StepBatches
    from seqaware.distributed.process_group import find_address
    from seqaware.training.assembly import row_format, world_of
    from seqaware.training.prepare import prepare

    yaml, zero = run_files(work, row, **model)
    prepared = prepare(load_config(yaml), world=world_of(find_address()), deepspeed_path=zero, progress=None)
    steps = StepBatches(prepared.store, prepared.order, rows=row_format(prepared.plan, prepared), rank=0, size=1)
    return prepared, (coming.micro_batches for coming in steps.steps(1, MOST_STEPS))


def ours(work: Work, found: Found) -> None:
    """The run's own assembly on one rank; the engine is built once and steps over rows of every length."""
    from seqaware.distributed.process_group import connect, find_address
    from seqaware.training.assembly import build_engine

    said: list[str] = []
    ranks, engine = connect(find_address()), None
    for row in work.rows:
        prepared, batches = batches_of(work, row, compile=True)
        engine = engine or build_engine(prepared, str(work.model), ranks=ranks, say=said.append)
        step = partial(engine.train_step, learning_rate=1e-5)
        until = time.monotonic() + work.seconds / len(work.rows)
        facts = {"shape": work.shape.name, "layers": work.layers, "zero": work.stage}
        found(
            {"who": "seqaware", **facts, "said": said, **measured(work, row, batches=batches, step=step, until=until)}
        )


def kept_of_a_layer(work: Work, found: Found) -> None:
    """Time and memory of a step by what is kept of a layer for the backward; an engine for each, nothing compiled."""
    from seqaware.distributed.process_group import connect, find_address
    from seqaware.training.assembly import build_engine

    row, ranks = work.rows[0], connect(find_address())
    for policy in ("none", "selective", "full", "offload"):
        prepared, batches = batches_of(work, row, activation_checkpointing=policy)
        engine = build_engine(prepared, str(work.model), ranks=ranks, say=lambda text: None)
        step = partial(engine.train_step, learning_rate=1e-5)
        until = time.monotonic() + work.seconds / 4
        found({"activation_checkpointing": policy, **measured(work, row, batches=batches, step=step, until=until)})
        del engine, step
        gc.collect()
