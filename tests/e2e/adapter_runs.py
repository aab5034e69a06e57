"""Runs with adapters, and how they are compared with the float64 oracle."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests import launch, oracles, tiny
from tests.adapter_oracle import Adapted, AdaptedModel

STEPS = 3
# A moves by what B has learnt: at this rate both move far more than rounding does in three steps.
LEARNING_RATE = 1e-2
RATES = [LEARNING_RATE * (STEPS - done) / STEPS for done in range(STEPS)]
# As in test_same_training, for the reasons given there: an ε above the gradient's entries keeps AdamW's updates linear.
EPS = 1e-2
LOSS_TOLERANCE = 1e-5
NORM_TOLERANCE = 2e-5
UPDATE_TOLERANCE = 1e-4
# One rounding a step, one of the start (DoRA's m is a float32 norm), and one of the sum W + s·B·A in the merged model.
ROUNDING = (STEPS + 2) * 2.0**-24


def documents_of(workshop: tiny.Workshop) -> list[oracles.OracleDocument]:
    tokenizer = AutoTokenizer.from_pretrained(workshop.model)
    documents = []
    for line in workshop.rows.read_text().splitlines():
        row = json.loads(line)
        prompt = tokenizer.encode(f"Q: {row['question']} A:")
        completion = [*tokenizer.encode(f" {row['answer']}"), tokenizer.eos_token_id]
        documents.append(oracles.OracleDocument(prompt + completion, [False] * len(prompt) + [True] * len(completion)))
    return documents


@dataclass(frozen=True)
class Expected:
    """run.weights: the trained parameters. base, merged: the plain model's weights before and after."""

    run: oracles.OracleRun
    first: dict[str, torch.Tensor]
    base: dict[str, torch.Tensor]
    merged: dict[str, torch.Tensor]


def oracle(folder: Path, adapted: Adapted, documents: Sequence[oracles.OracleDocument]) -> Expected:
    model = AdaptedModel(folder, adapted)
    first = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    settings = oracles.OracleSettings(gamma=0.98, normalize_by="tokens", learning_rates=RATES, eps=EPS)
    run = oracles.descend(model, [documents] * STEPS, settings)
    merged = {name: weight.detach() for name, weight in model.effective().items()}
    return Expected(run, first, dict(model.base.named_parameters()), merged)


def request(
    workshop: tiny.Workshop, name: str, lora: dict[str, Any], stage: int | str, **settings: Any
) -> dict[str, Any]:
    config = workshop.config(
        lora=lora,
        training__optimizer={"lr": LEARNING_RATE, "eps": EPS},
        training__sft={"gamma": 0.98},
        output__dir=str(workshop.folder / name),
        **settings,
    )
    zero = str(launch.DS_CONFIGS / f"zero{stage}.json")
    return {"config": str(workshop.write(name, config)), "deepspeed": zero, "set": []}


def steps_of(folder: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["kind"] == "step"]


def distance(tensor: torch.Tensor, other: torch.Tensor) -> float:
    return float((tensor.detach().double() - other.detach().double()).abs().mean())


def check_weights(name: str, seen: dict[str, torch.Tensor], first: dict[str, Any], expected: dict[str, Any]) -> None:
    assert seen.keys() == expected.keys(), name
    for key, tensor in expected.items():
        bound = UPDATE_TOLERANCE * distance(first[key], tensor) + ROUNDING * float(tensor.abs().max())
        assert distance(seen[key], tensor) < bound, (name, key)


def check(name: str, folder: Path, base: Path, expected: Expected) -> None:
    steps, run = steps_of(folder), expected.run
    assert [line["step"] for line in steps] == list(range(1, STEPS + 1)), name
    for line, loss, norm in zip(steps, run.losses, run.grad_norms, strict=True):
        assert line["loss"] == pytest.approx(loss, rel=LOSS_TOLERANCE), name
        assert line["grad_norm"] == pytest.approx(norm, rel=NORM_TOLERANCE), name
    model = folder / "model"
    if (model / "adapter_config.json").is_file():
        file = load_file(model / "adapter_model.safetensors")
        check_weights(name, {_oracle_name(key): value for key, value in file.items()}, expected.first, run.weights)
        assert json.loads((model / "adapter_config.json").read_text())["base_model_name_or_path"] == str(base)
        loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), model).merge_and_unload()
    else:
        loaded = AutoModelForCausalLM.from_pretrained(model)
    assert loaded.dtype == torch.float32
    check_weights(name, dict(loaded.named_parameters()), expected.base, expected.merged)


def _oracle_name(key: str) -> str:
    name = key.removeprefix("base_model.model.").removesuffix(".weight")
    for ours, theirs in ((".A", ".lora_A"), (".B", ".lora_B"), (".m", ".lora_magnitude_vector")):
        if name.endswith(theirs):
            return name.removesuffix(theirs) + ours
    return f"{name}.weight"
