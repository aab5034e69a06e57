"""What `--dry-run` prints."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from seqaware.config.schema import Config
from seqaware.estimate.render_plan import render_plan
from seqaware.plan.plan import make_plan
from seqaware.plan.specs import DataFacts, ModelFacts, World

CPU = World(size=2, local_size=2, nodes=1, device="cpu", bf16=True)
GPT2 = ModelFacts(50257, 1024, 768, 12, parameters=None, model_type="gpt2")
DATA = DataFacts(1000, 100_000, 60_000, 300, "0123456789abcdef0123", exact=True)


def rendered(model: ModelFacts | None = GPT2, data: DataFacts | None = DATA, **sections: Any) -> dict[str, str]:
    config = Config.model_validate({"model": {"base_name": "gpt2"}, "dataset": {"name": "gsm8k"}, **sections})
    text = render_plan(make_plan(config, world=CPU, model=model, data=data))
    return {line[:12].strip(): line[12:] for line in text.splitlines() if line[:12].strip()} | {"all": text}


def test_a_plan_says_everything_that_follows() -> None:
    lines = rendered()
    assert lines["model"] == "gpt2 (gpt2, vocabulary 50,257, layers 12, hidden size 768, at most (tokens) 1,024)"
    assert "float32 (auto on cpu)" in lines["precision"]
    assert "γ = 0.98 (half-life 34.31 tokens, horizon 50 tokens)" in lines["objective"]
    assert lines["step"].startswith("16 sequences over all ranks = batch_size 4 × grad_accumulation_steps 4")
    assert lines["ranks"].startswith("2 on 1 node(s), 8 sequences each on average")
    assert lines["steps"] == "63 = 1 epoch(s) of 63 steps"
    assert "1,000 sequences, 100,000 tokens, 60,000 of them supervised, the longest 300" in lines["data"]
    # 100 000 tokens in 63 steps are 1587 a step; 1024 fit a rank at once.
    assert "about 1,587 tokens, in 2 micro-batches or more" in lines["rows"]
    assert "adamw, lr 2e-05" in lines["optimizer"]
    assert lines["schedule"] == "cosine, from 2e-05 towards 0"


def test_every_derived_deepspeed_value_is_shown() -> None:
    text = rendered()["all"]
    for line in (
        "zero_optimization.stage = 2",
        "train_micro_batch_size_per_gpu = 1",
        "managed_gradient_accumulation = false",
        "gradient_clipping = 1.0",
        "bf16.enabled = false",
        'data_types.grad_accum_dtype = "fp32"',
    ):
        assert f"            {line}\n" in text


def test_unknown_figures_say_what_would_make_them_known() -> None:
    lines = rendered(model=None, data=None)
    assert "not known before its configuration comes from the hub" in lines["model"]
    assert "the model's maximum is not known here" in lines["sequence"]
    for label in ("steps", "data", "rows"):
        assert "python launcher/prepare.py CONFIG" in lines[label]


def test_an_identity_that_will_change_says_so() -> None:
    assert "not final" not in rendered()["identity"]
    assert rendered(data=None)["identity"].endswith("not final: the tokenised data will change it")
    assert "not final: the model's maximum and the tokenised data" in rendered(model=None, data=None)["identity"]


def test_tokens_known_on_average_are_marked() -> None:
    line = rendered(data=replace(DATA, tokens_exact=False))["data"]
    assert "1,000 sequences an epoch, about 100,000 tokens, about 60,000 of them supervised" in line


def test_a_guess_is_marked() -> None:
    lines = rendered(data=DataFacts(1000, 0, 0, 0, "", exact=False))
    assert lines["steps"].startswith("about 63")
    assert "about 1,000 rows" in lines["data"]


@pytest.mark.parametrize("gamma", [0, 1])
def test_the_ends_of_gamma_have_a_plan(gamma: int) -> None:
    assert f"γ = {gamma} (" in rendered(training={"sft": {"gamma": gamma}})["objective"]


@pytest.mark.parametrize(
    ("schedule", "text"),
    [
        ({"scheduler_type": "constant"}, "constant at 2e-05"),
        (
            {"scheduler_type": "wsd", "decay_ratio": 0.2},
            "wsd, decaying over the last 20% of the steps, from 2e-05 towards 0",
        ),
        (
            {"scheduler_type": "polynomial", "power": 2, "min_lr_ratio": 0.1},
            "polynomial of power 2, from 2e-05 towards 2e-06",
        ),
    ],
)
def test_schedules(schedule: dict[str, Any], text: str) -> None:
    assert rendered(training={"schedule": schedule})["schedule"] == text


@pytest.mark.parametrize(
    ("optimizer", "text"),
    [
        ({"type": "muon"}, "muon, lr 2e-05, weight decay 0.01, momentum 0.95, AdamW β 0.9, 0.999"),
        ({"type": "lion"}, "lion, lr 2e-05, weight decay 0.01, β 0.9, 0.999, gradient"),
        ({"max_grad_norm": 0}, "no clipping"),
    ],
)
def test_optimizers(optimizer: dict[str, Any], text: str) -> None:
    assert text in rendered(training={"optimizer": optimizer})["optimizer"]


def test_evaluation() -> None:
    held_out = {"dataset": {"name": "gsm8k", "split": "test"}, "metric": "exact_match", "every_steps": 10}
    assert rendered(evaluation=held_out)["evaluation"] == (
        "loss and exact match over gsm8k (test), every 10 steps and at the end"
    )
    assert "none" in rendered()["evaluation"]
