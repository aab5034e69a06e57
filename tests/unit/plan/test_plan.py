"""The whole plan: every shipped pair, what identifies a run, and what a person reads."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from seqaware.config.loading import REPOSITORY, load_config
from seqaware.config.schema import Config
from seqaware.errors import ConfigError
from seqaware.estimate.render_plan import render_plan
from seqaware.plan.plan import MATHEMATICS as NAMES
from seqaware.plan.plan import Plan, make_plan
from seqaware.plan.specs import DataFacts, ModelFacts, World, model_facts

DS_CONFIGS = sorted((REPOSITORY / "ds_configs").glob("*.json"))
TRAIN_CONFIGS = sorted((REPOSITORY / "train_configs").glob("*.yaml"))
CPU = World(size=2, local_size=2, nodes=1, device="cpu", bf16=True)
GPU = World(size=16, local_size=8, nodes=2, device="cuda", bf16=True)
DATA = DataFacts(1000, 100_000, 60_000, 300, "0123456789abcdef", exact=True)
GPT2 = ModelFacts(50257, 1024, 768, 12, parameters=None, model_type="gpt2")


@pytest.fixture(autouse=True)
def libaio(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shipped pairs are planned as on a machine that has what they need."""
    monkeypatch.setattr("seqaware.plan.offload.find_library", lambda name: f"lib{name}.so.1")


def config(**sections: Any) -> Config:
    return Config.model_validate({"model": {"base_name": "gpt2"}, "dataset": {"name": "gsm8k"}, **sections})


def plan(written: Config | None = None, **facts: Any) -> Plan:
    return make_plan(written or config(), **{"world": CPU, "model": GPT2, "data": DATA, **facts})


@pytest.mark.parametrize("ds_config", DS_CONFIGS, ids=lambda path: path.stem)
@pytest.mark.parametrize("train_config", TRAIN_CONFIGS, ids=lambda path: path.stem)
def test_every_shipped_pair_on_cpus_works_or_says_why(train_config: Path, ds_config: Path) -> None:
    written = load_config(train_config)
    # As many ranks as share a sequence, and two at least.
    world = replace(CPU, size=max(2, written.parallel.sequence), local_size=max(2, written.parallel.sequence))
    if ds_config.stem == "zeropp":
        with pytest.raises(ConfigError, match="zero_quantized_weights needs GPUs"):
            make_plan(written, world=world, deepspeed_path=ds_config)
        return
    if _has_no_swapper(written, ds_config):
        return
    made = make_plan(written, world=world, deepspeed_path=ds_config)
    assert render_plan(made)
    assert json.dumps(made.to_json())


def _has_no_swapper(written: Config, ds_config: Path) -> bool:
    """A drive takes the states of some optimizers only; the refusal says which."""
    if ds_config.stem != "zero3_offload_nvme" or written.training.optimizer.type != "adamw_fused":
        return False
    with pytest.raises(ConfigError, match="write cpu_adam"):
        make_plan(written, world=GPU, deepspeed_path=ds_config)
    return True


@pytest.mark.parametrize("ds_config", DS_CONFIGS, ids=lambda path: path.stem)
@pytest.mark.parametrize("train_config", TRAIN_CONFIGS, ids=lambda path: path.stem)
def test_every_shipped_pair_on_gpus_works_or_says_why(train_config: Path, ds_config: Path) -> None:
    written = load_config(train_config)
    if ds_config.stem == "zero0" and written.model.dtype != "float32":
        with pytest.raises(ConfigError, match=r"use ds_configs/zero1\.json"):
            make_plan(written, world=GPU, deepspeed_path=ds_config)
    elif not _has_no_swapper(written, ds_config):
        assert render_plan(make_plan(written, world=GPU, deepspeed_path=ds_config))


def test_which_deepspeed_config_counts(tmp_path: Path) -> None:
    path = tmp_path / "mine.json"
    path.write_text('{"zero_optimization": {"stage": 1}}')
    assert plan().zero_stage == 2
    assert plan(config(deepspeed=str(path))).zero_stage == 1
    assert plan(config(deepspeed=str(path)), deepspeed_path=DS_CONFIGS[0]).zero_stage == 0


@pytest.mark.parametrize(
    ("asked", "world", "dtype"),
    [
        ("auto", CPU, "float32"),
        ("auto", GPU, "bfloat16"),
        ("auto", replace(GPU, bf16=False), "float32"),
        ("bf16", CPU, "bfloat16"),
        ("fp16", GPU, "float16"),
    ],
)
def test_precision(asked: str, world: World, dtype: str) -> None:
    made = plan(config(model={"base_name": "gpt2", "dtype": asked}), world=world)
    assert made.dtype == dtype
    assert made.deepspeed["bf16"]["enabled"] is (dtype == "bfloat16")
    assert made.deepspeed["fp16"]["enabled"] is (dtype == "float16")


TOPOLOGY: list[dict[str, Any]] = [
    {"world": replace(CPU, size=1, local_size=1)},
    {"world": replace(CPU, size=16, local_size=8, nodes=2)},
    {"world": GPU, "written": config(model={"base_name": "gpt2", "dtype": "float32"})},
    {"deepspeed_path": REPOSITORY / "ds_configs" / "zero3_offload_cpu.json"},
    {"written": config(packing={"enabled": False})},
    {"written": config(model={"base_name": "gpt2", "loss_kernel": "plain", "activation_checkpointing": True})},
    {"written": config(model={"base_name": "gpt2", "attention": "eager"})},
    {"written": config(training={"schedule": {"micro_batch_tokens": 4096}})},
    {"written": config(training={"schedule": {"batch_size": 2, "grad_accumulation_steps": 8}})},
    {"written": config(training={"schedule": {"global_batch_size": 16}})},
    {"written": config(training={"optimizer": {"type": "cpu_adam"}})},
    {"written": config(training={"sft": {"horizon": 50}})},
    {"written": config(training={"control": {"log_every": 5}})},
    {"written": config(output={"dir": "elsewhere"})},
    {"written": config(dataset={"name": "moved/elsewhere", "workers": 3})},
]


@pytest.mark.parametrize("change", TOPOLOGY)
def test_topology_does_not_change_the_run(change: dict[str, Any]) -> None:
    assert plan(**change).mathematics() == plan().mathematics()
    assert plan(**change).mathematics_hash() == plan().mathematics_hash()


MATHEMATICS: list[tuple[str, dict[str, Any]]] = [
    ("objective", {"written": config(training={"sft": {"gamma": 0.97}})}),
    ("objective", {"written": config(training={"sft": {"normalize_by": "weight"}})}),
    ("model", {"written": config(model={"base_name": "gpt2-medium"})}),
    ("model", {"written": config(model={"base_name": "gpt2", "dtype": "bf16"})}),
    ("data", {"data": replace(DATA, fingerprint="f" * 16)}),
    ("tokenizer", {"data": replace(DATA, tokenizer="f" * 64)}),
    ("batch", {"written": config(training={"schedule": {"global_batch_tokens": 4096}}), "data": None}),
    ("batch", {"written": config(training={"parameters": {"max_seq_length": 512}})}),
    ("seed", {"written": config(training={"control": {"seed": 1}})}),
    ("optimizer", {"written": config(training={"optimizer": {"lr": 1e-4}})}),
    ("optimizer", {"written": config(training={"optimizer": {"type": "lion"}})}),
    ("schedule", {"written": config(training={"schedule": {"warmup_steps": 5}})}),
    ("schedule", {"written": config(training={"schedule": {"max_steps": 5}})}),
]


def test_the_numbers_depend_on_the_dtype_that_auto_comes_to() -> None:
    written = config(model={"base_name": "gpt2", "dtype": "bf16"})
    assert plan(world=GPU).mathematics()["model"]["dtype"] == "bfloat16"
    assert plan(world=GPU).mathematics_hash() == plan(written).mathematics_hash() != plan().mathematics_hash()


def test_a_tokenizer_is_what_it_does_wherever_it_lies() -> None:
    named = {"base_name": "gpt2", "tokenizer": "moved/elsewhere"}
    data = replace(DATA, tokenizer="a" * 64)
    assert plan(config(model=named), data=data).mathematics() == plan(data=data).mathematics()
    assert plan(config(model=named), data=None).mathematics()["tokenizer"] == {"name": "moved/elsewhere"}
    assert set(plan(config(lora={})).mathematics()) == set(NAMES)


def test_what_is_not_known_here_is_named() -> None:
    scratch = config(model={"from_scratch": {"model_type": "gpt2"}, "tokenizer": "gpt2"})
    written_only = model_facts(scratch.model)
    assert plan().unknown_mathematics() == ()
    assert plan(model=None).unknown_mathematics() == ("the model's maximum",)
    assert plan(scratch, model=written_only).unknown_mathematics() == ("the model's maximum",)
    assert plan(scratch, model=written_only, data=None).unknown_mathematics() == (
        "the model's maximum",
        "the tokenised data",
    )
    length = {"parameters": {"max_seq_length": 64}}
    assert (
        plan(config(model=scratch.model.model_dump(), training=length), model=written_only).unknown_mathematics() == ()
    )


@pytest.mark.parametrize(("part", "change"), MATHEMATICS)
def test_what_makes_another_run(part: str, change: dict[str, Any]) -> None:
    before, after = plan().mathematics(), plan(**change).mathematics()
    assert part in {name for name in before if before[name] != after[name]}
    assert plan(**change).mathematics_hash() != plan().mathematics_hash()


def test_a_run_at_a_constant_rate_may_go_on_for_longer() -> None:
    def constant(**schedule: Any) -> Plan:
        return plan(config(training={"schedule": {"scheduler_type": "constant", **schedule}}))

    assert constant(max_steps=5).mathematics_hash() == constant(num_epochs=3).mathematics_hash()


# What the first releases wrote into checkpoints. A change here makes every run started before refuse to resume.
IDENTITIES = [
    ({}, "a7861d95e468af42e07bab3fca501486b46ca16618e2e60d201d18db2a2e504b"),
    ({"num_epochs": 1}, "a7861d95e468af42e07bab3fca501486b46ca16618e2e60d201d18db2a2e504b"),
    (
        {"num_epochs": 1, "max_steps": 100, "warmup_ratio": 0.1},
        "3947bd1d46dcfaf89d399e0f89fb07ce1e9dc5734d1b49d608550da340460d54",
    ),
]


@pytest.mark.parametrize(("schedule", "identity"), IDENTITIES)
def test_a_run_keeps_the_identity_that_its_checkpoints_hold(schedule: dict[str, Any], identity: str) -> None:
    assert plan(config(training={"schedule": schedule})).mathematics_hash() == identity


def test_adapters_are_mathematics_and_their_export_is_not() -> None:
    whole, adapted = plan(), plan(config(lora={}))
    assert "lora" not in whole.mathematics() and whole.mathematics_hash() != adapted.mathematics_hash()
    assert plan(config(lora={"export": "adapter"})).mathematics_hash() == adapted.mathematics_hash()
    for other in ({"rank": 8}, {"dora": True}, {"target_modules": ["q_proj"]}, {"modules_to_save": ["lm_head"]}):
        assert plan(config(lora=other)).mathematics_hash() != adapted.mathematics_hash(), other


def test_a_plan_is_plain_json() -> None:
    values = plan().to_json()
    assert json.loads(json.dumps(values)) == values
    assert values["batches"]["total_steps"] == 63
    assert values["mathematics_hash"] == plan().mathematics_hash()


def test_an_offloaded_torch_optimizer_is_worth_a_note() -> None:
    offload = REPOSITORY / "ds_configs" / "zero3_offload_cpu.json"
    assert any("cpu_adam" in note for note in plan(world=GPU, deepspeed_path=offload).notes)
    assert not plan().notes
