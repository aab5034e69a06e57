"""Pairs that cannot work are named before anything is loaded; pairs that work are let through."""

from __future__ import annotations

import importlib.util
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest

from seqaware.config.schema import Config
from seqaware.errors import ConfigError
from seqaware.plan.specs import ModelFacts, World, facts_from_dict
from seqaware.plan.validation import check_contradictions, check_sequence_parallelism

CPU = World(size=2, local_size=2, nodes=1, device="cpu", bf16=True)
GPU = World(size=16, local_size=8, nodes=2, device="cuda", bf16=True)
OLD_GPU = World(size=1, local_size=1, nodes=1, device="cuda", bf16=False)
CPU_OFFLOAD = {"offload_optimizer": {"device": "cpu"}}


@pytest.fixture(autouse=True)
def libaio(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether this machine has libaio is not the question here."""
    monkeypatch.setattr("seqaware.plan.offload.find_library", lambda name: f"lib{name}.so.1")


def check(
    world: World,
    zero: dict[str, Any],
    *,
    optimizer: str = "adamw",
    dtype: str = "float32",
    lora: dict[str, Any] | None = None,
    **model: Any,
) -> None:
    config = Config.model_validate(
        {
            "model": {"base_name": "gpt2", **model},
            "dataset": {"name": "gsm8k"},
            "training": {"optimizer": {"type": optimizer}},
            "lora": lora,
        }
    )
    check_contradictions(config, {"zero_optimization": zero}, world=world, dtype=dtype)


REFUSED: list[tuple[World, dict[str, Any], dict[str, Any], str]] = [
    (CPU, {"stage": 2}, {"dtype": "float16"}, "float16 cannot be trained on the CPU"),
    (CPU, {"stage": 0}, {"dtype": "bfloat16"}, "without ZeRO"),
    (GPU, {}, {"dtype": "float16"}, "without ZeRO"),
    (OLD_GPU, {"stage": 2}, {"dtype": "bfloat16"}, "do not compute in it"),
    (CPU, {"stage": 2}, {"optimizer": "fused_adam"}, "fused_adam runs on GPUs only"),
    (GPU, {"stage": 2, **CPU_OFFLOAD}, {"optimizer": "fused_adam"}, "offloads the optimizer to cpu"),
    (GPU, {"stage": 2}, {"optimizer": "cpu_adam"}, "leaves them on the GPU"),
    (GPU, {"stage": 3, "reduce_scatter": True}, {"optimizer": "muon"}, "needs whole gradients"),
    (GPU, {"stage": 0, **CPU_OFFLOAD}, {}, "offload_optimizer needs ZeRO stage 1"),
    (GPU, {"stage": 2, "offload_param": {"device": "cpu"}}, {}, "offload_param needs ZeRO stage 3"),
    (GPU, {"stage": 3, "offload_param": {"device": "disk"}}, {}, "must be cpu, nvme or none"),
    (GPU, {"stage": 3, "offload_optimizer": True}, {}, "must be an object"),
    (GPU, {"stage": 3, "offload_optimizer": {"device": "nvme"}}, {}, "nvme_path is missing"),
    (GPU, {"stage": 3, "offload_param": {"device": "nvme", "nvme_path": "/no/such"}}, {}, "not a folder"),
    (GPU, {"stage": 2, "offload_optimizer": {"device": "nvme", "nvme_path": "/"}}, {}, "nvme needs ZeRO stage 3"),
    (GPU, {"stage": 1, "overlap_comm": True}, {}, "overlap_comm needs ZeRO stage 2"),
    (GPU, {"stage": 2, "compute_grad_norm": False}, {}, "compute_grad_norm"),
    (GPU, {"stage": 2, "zero_hpz_partition_size": 8}, {}, "zero_hpz_partition_size needs ZeRO stage 3"),
    (GPU, {"stage": 3, "zero_hpz_partition_size": 3}, {}, "got 3 for 16 ranks; write the ranks of one node: 8"),
    (CPU, {"stage": 3, "zero_quantized_weights": True}, {}, "zero_quantized_weights needs GPUs"),
    (CPU, {"stage": 2}, {"attention": "varlen", "dtype": "bfloat16"}, "varlen needs GPUs"),
    (GPU, {"stage": 2}, {"attention": "varlen"}, "computes in bfloat16 or float16 only"),
]


@pytest.mark.parametrize(("world", "zero", "settings", "word"), REFUSED, ids=[case[-1] for case in REFUSED])
def test_refused(world: World, zero: dict[str, Any], settings: dict[str, Any], word: str) -> None:
    with pytest.raises(ConfigError) as caught:
        check(world, zero, **settings)
    assert word in str(caught.value)


ALLOWED: list[tuple[World, dict[str, Any], dict[str, Any]]] = [
    (CPU, {"stage": 0}, {}),
    (CPU, {"stage": 2}, {"dtype": "bfloat16"}),
    (CPU, {"stage": 2}, {"optimizer": "cpu_adam"}),
    (CPU, {"stage": 0}, {"optimizer": "muon"}),
    (CPU, {"stage": 3}, {"optimizer": "muon"}),
    (CPU, {"stage": 3, "zero_hpz_partition_size": 8}, {}),
    (GPU, {"stage": 3, "zero_hpz_partition_size": 8, "zero_quantized_weights": True}, {}),
    (GPU, {"stage": 2}, {"dtype": "float16"}),
    (GPU, {"stage": 2}, {"optimizer": "fused_adam"}),
    (GPU, {"stage": 3, "reduce_scatter": False}, {"optimizer": "muon"}),
    (GPU, {"stage": 3, **CPU_OFFLOAD, "offload_param": {"device": "none"}}, {"optimizer": "cpu_adam"}),
    (GPU, {"stage": 1, "overlap_comm": False}, {}),
    (GPU, {"stage": 2}, {"attention": "varlen", "dtype": "bfloat16"}),
]


@pytest.mark.parametrize(("world", "zero", "settings"), ALLOWED)
def test_allowed(world: World, zero: dict[str, Any], settings: dict[str, Any]) -> None:
    check(world, zero, **settings)


def test_a_writable_folder_takes_offloaded_states(tmp_path: Path) -> None:
    device = {"device": "nvme", "nvme_path": str(tmp_path)}
    check(GPU, {"stage": 3, "offload_param": device, "offload_optimizer": device}, optimizer="cpu_adam")


def test_offloading_to_a_drive_needs_libaio(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("seqaware.plan.offload.find_library", lambda name: None)
    with pytest.raises(ConfigError, match="needs libaio, which is not installed"):
        check(GPU, {"stage": 3, "offload_param": {"device": "nvme", "nvme_path": str(tmp_path)}})


def test_fewer_bits_need_their_library(monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "bitsandbytes" else find(name))
    with pytest.raises(ConfigError, match="adamw_8bit needs bitsandbytes, which is not installed"):
        check(GPU, {"stage": 2}, optimizer="adamw_8bit")
    with pytest.raises(ConfigError, match="quantize_base nf4 needs bitsandbytes, which is not installed"):
        check(GPU, {"stage": 2}, lora={"quantize_base": "nf4"})


def test_the_best_checkpoints_need_something_to_be_judged_by() -> None:
    rows = {"dataset": {"name": "gsm8k"}}
    by_clock = {**rows, "every_minutes": 5}
    for evaluation, refused in (({}, True), (rows, True), ({**rows, "every_steps": 5}, False), (by_clock, False)):
        written = {"model": {"base_name": "gpt2"}, "dataset": {"name": "gsm8k"}, "evaluation": evaluation}
        config = Config.model_validate({**written, "output": {"keep_best": 1}})
        with pytest.raises(ConfigError, match="keep_best") if refused else nullcontext():
            check_contradictions(config, {"zero_optimization": {}}, world=CPU, dtype="float32")


def test_8_bits_do_not_go_with_dora() -> None:
    with pytest.raises(ConfigError, match="loses the scales"):
        check(GPU, {"stage": 2}, lora={"quantize_base": "int8", "dora": True})


def heads(count: int) -> ModelFacts:
    return facts_from_dict({"model_type": "llama", "num_attention_heads": count, "hidden_size": 64})


def test_the_ranks_of_a_sequence_divide_the_ranks_and_the_heads() -> None:
    check_sequence_parallelism(8, world=GPU, model=heads(32))
    check_sequence_parallelism(8, world=GPU, model=None)
    with pytest.raises(ConfigError, match=r"divide the number of ranks; got 3, with 16 ranks; write one of \[1, 2, 4"):
        check_sequence_parallelism(3, world=GPU, model=heads(12))
    with pytest.raises(ConfigError, match=r"8 ranks to a sequence, 12 heads; write one of \[1, 2, 4\]"):
        check_sequence_parallelism(8, world=GPU, model=heads(12))


def test_all_contradictions_come_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        check(CPU, {"stage": 1, "overlap_comm": True}, optimizer="fused_adam", dtype="float16")
    assert str(caught.value).startswith("3 contradictions:\n  - ")


def test_zero_3_divides_gradients_before_their_sum_only_without_reduce_scatter() -> None:
    config = Config.model_validate({"model": {"base_name": "gpt2"}, "dataset": {"name": "gsm8k"}})
    raw = {"zero_optimization": {"stage": 3}, "gradient_predivide_factor": 2}
    with pytest.raises(ConfigError, match="only without reduce_scatter"):
        check_contradictions(config, raw, world=GPU, dtype="bfloat16")
    raw["zero_optimization"] = {"stage": 3, "reduce_scatter": False}
    check_contradictions(config, raw, world=GPU, dtype="bfloat16")
