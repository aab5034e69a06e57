"""A pretrained-style model folder, a tokenizer and rows, small enough that a run takes a second."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

WORDS = ("one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "plus", "is", "apples", "books")
MAX_POSITIONS = 160


@dataclass(frozen=True)
class Workshop:
    """Where a test's model, tokenizer and rows lie."""

    folder: Path
    model: Path
    rows: Path

    def config(self, **changes: Any) -> dict[str, Any]:
        """A run over all rows in every step, as a nested dict; `changes` are dotted keys with __ for the dot."""
        config: dict[str, Any] = {
            "model": {"base_name": str(self.model), "dtype": "float32", "dropout": 0.0},
            "dataset": {"name": str(self.rows), "store_dir": str(self.folder / "stores"), "workers": 1},
            "format": {"prompt_template": "Q: {question} A:"},
            "training": {
                "parameters": {"max_seq_length": 128},
                "optimizer": {"lr": 1e-3},
                "schedule": {"num_epochs": 3, "global_batch_size": count_rows(self.rows), "scheduler_type": "linear"},
            },
            "logging": {"progress": "off"},
        }
        for dotted, value in changes.items():
            *sections, key = dotted.split("__")
            section = config
            for name in sections:
                section = section.setdefault(name, {})
            section[key] = value
        return config

    def write(self, name: str, config: dict[str, Any]) -> Path:
        """`config` as a YAML file (JSON is YAML)."""
        path = self.folder / f"{name}.yaml"
        path.write_text(json.dumps(config))
        return path


def build(folder: Path, *, answers: Sequence[int] = (1, 40, 3, 90, 7, 22, 2, 60, 5, 11, 1, 33, 4)) -> Workshop:
    """A two-layer Llama with grouped heads, a word tokenizer, and a row for each length (in words) of `answers`."""
    tokenizer = train_tokenizer()
    model = folder / "model"
    config = AutoConfig.for_model(
        "llama",
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=MAX_POSITIONS,
        eos_token_id=tokenizer.eos_token_id,
    )
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(model)
    tokenizer.save_pretrained(model)
    rows = folder / "rows.jsonl"
    write_rows(rows, answers)
    return Workshop(folder, model, rows)


def train_tokenizer() -> PreTrainedTokenizerFast:
    """Words split at blanks; <eos> ends an example; no padding token, as with many pretrained models."""
    raw = Tokenizer(models.WordLevel(unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    trainer = trainers.WordLevelTrainer(special_tokens=["<unk>", "<eos>"], min_frequency=1)
    raw.train_from_iterator([" ".join([*WORDS, "Q:", "A:"])], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=raw, unk_token="<unk>", eos_token="<eos>")


def write_rows(path: Path, answers: Sequence[int]) -> None:
    """One {question, answer} row for each length in words."""
    choose = random.Random(0)
    lines = []
    for length in answers:
        question = " ".join(choose.choices(WORDS, k=choose.randint(1, 12)))
        lines.append(json.dumps({"question": question, "answer": " ".join(choose.choices(WORDS, k=length))}))
    path.write_text("\n".join(lines) + "\n")


def count_rows(path: Path) -> int:
    return len(path.read_text().splitlines())
