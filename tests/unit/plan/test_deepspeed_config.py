"""The complete DeepSpeed dict: what a JSON may hold, and what the Plan adds. DeepSpeed itself reads the result."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from seqaware.config.loading import REPOSITORY
from seqaware.config.schema import Config
from seqaware.errors import ConfigError
from seqaware.plan.deepspeed_config import OWNED_KEYS, build_deepspeed_config, check_owned_keys, read_deepspeed_json
from seqaware.plan.specs import World

SHIPPED = sorted((REPOSITORY / "ds_configs").glob("*.json"))
CPU = World(size=2, local_size=2, nodes=1, device="cpu", bf16=True)
GPU = World(size=8, local_size=8, nodes=1, device="cuda", bf16=True)


def config(**optimizer: Any) -> Config:
    return Config.model_validate(
        {"model": {"base_name": "gpt2"}, "dataset": {"name": "gsm8k"}, "training": {"optimizer": optimizer}}
    )


def build(raw: dict[str, Any], *, world: World = CPU, dtype: str = "float32", **optimizer: Any) -> dict[str, Any]:
    return build_deepspeed_config(config(**optimizer), raw, world=world, dtype=dtype)


def stage(number: int, **keys: Any) -> dict[str, Any]:
    return {"zero_optimization": {"stage": number, **keys}}


def test_the_shipped_files_are_those_the_documentation_names() -> None:
    offloaded = {"zero1_offload_optimizer", "zero2_offload_optimizer", "zero3_offload_cpu", "zero3_offload_nvme"}
    names = {"zero0", "zero1", "zero2", "zero3", *offloaded, "zero_hpz", "zeropp"}
    assert {path.stem for path in SHIPPED} == names


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_the_shipped_files_hold_no_key_of_the_plan(path: Path) -> None:
    raw = json.loads(path.read_text())
    assert not set(raw) & set(OWNED_KEYS)
    assert read_deepspeed_json(path) == raw


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", ["adamw", "muon"])
@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_deepspeed_reads_the_complete_dict(path: Path, kind: str, dtype: str) -> None:
    from deepspeed.runtime.config import DeepSpeedConfig

    settings = build(read_deepspeed_json(path), dtype=dtype, type=kind)
    # Without a process group DeepSpeed takes one rank. It checks every zero_optimization key against its own schema.
    read = DeepSpeedConfig(json.loads(json.dumps(settings)))
    assert read.train_micro_batch_size_per_gpu == 1
    assert read.gradient_accumulation_steps == 1
    assert read.managed_gradient_accumulation is False
    assert read.gradient_clipping == (0.0 if path.stem == "zero0" else 1.0)
    assert read.bfloat16_config.enabled is (dtype == "bfloat16")
    assert read.grad_accum_dtype == "fp32"
    assert read.zero_optimization_stage == settings["zero_optimization"]["stage"]
    assert read.optimizer_name == ("muon" if kind == "muon" else None)


def test_float16_scales_the_loss_dynamically() -> None:
    settings = build(stage(2), world=GPU, dtype="float16")
    assert settings["fp16"]["enabled"] is True
    assert settings["fp16"]["loss_scale"] == 0
    assert settings["bf16"] == {"enabled": False}
    assert settings["data_types"] == {"grad_accum_dtype": "fp32"}


def test_no_clipping() -> None:
    assert build(stage(3), max_grad_norm=0)["gradient_clipping"] == 0.0
    assert build(stage(3), max_grad_norm=0.3)["gradient_clipping"] == 0.3


@pytest.mark.parametrize("kind", ["adamw", "adamw_fused", "cpu_adam", "fused_adam", "adamw_8bit", "lion"])
def test_the_engine_builds_the_optimizer(kind: str) -> None:
    assert "optimizer" not in build(stage(2), world=GPU, type=kind)


def test_deepspeed_builds_muon() -> None:
    block = build(stage(2), type="muon", lr=0.02, momentum=0.9)["optimizer"]
    assert block["type"] == "Muon"
    assert (block["params"]["lr"], block["params"]["momentum"]) == (0.02, 0.9)
    assert block["params"]["torch_adam"] is True
    assert "torch_adam" not in build(stage(2), world=GPU, type="muon")["optimizer"]["params"]


def test_muon_under_zero3_reduces_whole_gradients() -> None:
    assert build(stage(3), type="muon")["zero_optimization"]["reduce_scatter"] is False
    assert "reduce_scatter" not in build(stage(2), type="muon")["zero_optimization"]
    assert "reduce_scatter" not in build(stage(3))["zero_optimization"]


def test_what_a_person_wrote_is_kept_and_not_changed() -> None:
    raw = {**stage(3, reduce_bucket_size=1000), "communication_data_type": "fp32"}
    before = json.dumps(raw)
    settings = build(raw, type="muon")
    assert settings["zero_optimization"]["reduce_bucket_size"] == 1000
    assert settings["communication_data_type"] == "fp32"
    assert json.dumps(raw) == before


def test_every_owned_key_is_named_with_what_to_write_instead() -> None:
    raw = {**stage(2), "train_batch_size": 32, "optimizer": {"type": "Adam"}, "bf16": "auto"}
    with pytest.raises(ConfigError) as caught:
        check_owned_keys(raw, origin="mine.json")
    message = str(caught.value)
    assert message.startswith("mine.json holds keys that the plan owns")
    assert "train_batch_size → write training.schedule.batch_size" in message
    assert "optimizer → write training.optimizer in the YAML" in message
    assert "bf16 (auto): just delete it" in message
    assert "zero_optimization" not in message


@pytest.mark.parametrize("key", OWNED_KEYS)
def test_each_owned_key_is_refused(key: str) -> None:
    with pytest.raises(ConfigError, match=f"- {key}"):
        check_owned_keys({key: 1}, origin="mine.json")


@pytest.mark.parametrize(
    ("raw", "word"),
    [
        ({"zero_optimisation": {"stage": 2}}, "did you mean zero_optimization?"),
        ({"comunication_data_type": "fp32"}, "did you mean communication_data_type?"),
        ({"xyz": 1}, "the keys are zero_optimization"),
        (stage(2, reduce_bucket_size="auto"), "does not know the value auto; got zero_optimization.reduce_bucket_size"),
        (stage(4), "must be 0, 1, 2 or 3"),
        ({"zero_optimization": {"stage": True}}, "must be 0, 1, 2 or 3"),
        ({"zero_optimization": {"stage": "2"}}, "must be 0, 1, 2 or 3"),
        ({"zero_optimization": True}, "must be an object"),
    ],
)
def test_keys_that_nobody_would_read(raw: dict[str, Any], word: str) -> None:
    with pytest.raises(ConfigError) as caught:
        check_owned_keys(raw, origin="mine.json")
    assert word in str(caught.value)


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("{", "no valid JSON"),
        ("[]", "must be a JSON object"),
        ('{"aio": {}, "aio": {}}', "duplicate key aio"),
        ('{"zero_optimization": {"stage": 1, "stage": 2}}', "duplicate key stage"),
    ],
)
def test_files_that_are_no_config(tmp_path: Path, text: str, word: str) -> None:
    path = tmp_path / "mine.json"
    path.write_text(text)
    with pytest.raises(ConfigError, match=word):
        read_deepspeed_json(path)


def test_a_missing_file() -> None:
    with pytest.raises(ConfigError, match=r"does not exist.*did you mean zero3\.json\?"):
        read_deepspeed_json(REPOSITORY / "ds_configs" / "zer3.json")
    with pytest.raises(ConfigError, match="does not exist"):
        read_deepspeed_json(Path("/no/such/folder/zero3.json"))


def test_a_folder_is_no_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        read_deepspeed_json(tmp_path)
