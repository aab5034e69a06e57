"""Arithmetic and traffic of a step, by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from seqaware.errors import ConfigError
from seqaware.estimate.hardware import DEVICES, device_named
from seqaware.estimate.layout import Layout, ZeroSettings
from seqaware.estimate.step_time import collectives, exchanged_bytes, step_time
from seqaware.plan.specs import World
from tests.unit.plan.layouts import SMALL, gpus, known, layout

H200 = DEVICES["h200"]


def traffic(made: Layout, passes: int) -> dict[str, int]:
    return {each.kind: each.bytes for each in collectives(made, micro_batches=passes)}


def test_arithmetic_of_a_step_by_hand() -> None:
    """8B, 2²⁰ tokens in documents of 8192: 6·M·T, and 3.5 times 2·Λ·A·D·Σ L² for attention."""
    tokens, matrices = 2**20, 32 * (2 * 4096 * 4096 + 2 * 4096 * 1024 + 3 * 4096 * 14336) + 128256 * 4096
    time = step_time(layout(), H200, step_tokens=tokens)
    speed = 8 * 0.55 * 989e12
    assert time.products == pytest.approx(6 * matrices * tokens / speed)
    assert time.attention == pytest.approx(3.5 * 2 * 32 * 4096 * tokens * 8192 / speed)
    useful = 6 * matrices * tokens + 3 * 2 * 32 * 4096 * tokens * 8192
    assert time.utilisation == pytest.approx(useful / (time.seconds * 8 * 989e12))


def test_what_is_computed_again_costs_another_forward_of_the_layers() -> None:
    plain = step_time(layout(), H200, step_tokens=2**20)
    again = step_time(layout(checkpointing="full"), H200, step_tokens=2**20)
    head = 128256 * 4096
    matrices = known("8B").matrix_parameters
    assert again.products / plain.products == pytest.approx((8 * matrices - 2 * head) / (6 * matrices))
    assert again.attention / plain.attention == pytest.approx(4.5 / 3.5)
    # Computing twice is no work of the model's own.
    assert again.utilisation < plain.utilisation


def test_selective_checkpointing_gathers_and_exchanges_again_but_computes_nothing_that_counts() -> None:
    made = layout(world=gpus(8, sequence=8), micro_batch_tokens=65536)
    plain, some, full = (replace(made, checkpointing=way) for way in ("none", "selective", "full"))
    times = [step_time(each, H200, step_tokens=2**20) for each in (plain, some, full)]
    assert times[1].products == times[0].products and times[1].attention == times[0].attention
    assert times[0].products < times[2].products
    assert traffic(some, 2) == traffic(full, 2) != traffic(plain, 2)


def test_short_documents_cost_less_attention() -> None:
    whole = step_time(layout(), H200, step_tokens=2**20)
    short = step_time(layout(), H200, step_tokens=2**20, mean_length=512.0)
    assert short.attention == pytest.approx(whole.attention / 16)
    assert short.products == whole.products


@pytest.mark.parametrize(
    ("stage", "expected"),
    [
        (0, {"all_reduce": 80_758_784}),
        (1, {"all_reduce": 80_758_784, "all_gather": 80_758_784}),
        (2, {"all_reduce": 2 * 80_758_784, "all_gather": 80_758_784}),
    ],
)
def test_traffic_that_was_counted_in_a_run(stage: int, expected: dict[str, int]) -> None:
    """20,189,696 float32 weights, two micro-batches, DeepSpeed 0.19.8; scalars left out."""
    world = World(2, 2, 1, "cpu", bf16=True)
    made = Layout(SMALL, world, "float32", ZeroSettings.of({"stage": stage}), "adamw", 512, 256)
    assert traffic(made, 2) == expected


def test_adapters_send_their_own_gradients_only() -> None:
    made = layout("zero2", adapters=10_000_000, trains_head=False)
    assert traffic(made, 3) == {"all_reduce": 3 * 2 * 10_000_000, "all_gather": 2 * 10_000_000}


def test_one_rank_sends_nothing() -> None:
    assert collectives(layout(size=1), micro_batches=4) == ()


def test_ulysses_exchanges_queries_keys_values_and_outputs() -> None:
    """8 ranks, 8 key heads: each rank sends (4096 + 2·1024 + 4096) entries a token and layer, forward and backward."""
    made = layout(world=gpus(8, sequence=8), micro_batch_tokens=65536)
    assert exchanged_bytes(made) == 2 * 32 * 8192 * (2 * 4096 + 2 * 1024) * 2
    assert exchanged_bytes(replace(made, checkpointing="full")) == exchanged_bytes(made) * 3 // 2
    # 16 ranks need 16 key heads: those of the model are repeated.
    wider = replace(made, world=gpus(16, sequence=16))
    assert exchanged_bytes(wider) == 2 * 32 * 4096 * (2 * 4096 + 2 * 2048) * 2


def test_gathers_hide_behind_arithmetic_until_there_is_too_little_of_it() -> None:
    much = step_time(layout(), H200, step_tokens=8 * 8192)
    assert much.communication == 0.0 and much.hidden > 0.0
    little = step_time(layout(micro_batch_tokens=64), H200, step_tokens=8 * 64)
    assert little.communication > little.products
    loud = replace(layout().zero, overlap=False)
    assert step_time(layout(zero={"stage": 3, "overlap_comm": False}), H200, step_tokens=8 * 8192).hidden == 0.0
    assert not loud.overlap


def test_between_nodes_the_adapters_set_the_pace() -> None:
    """Stage 1's all-gather and all-reduce of 2·P bytes: 3·2·P·(N − 1)/N over 8 adapters of 50 GB/s at 80 %."""
    made = layout("zero1", size=64)
    time = step_time(made, H200, step_tokens=2**20)
    volume = 3 * 2 * known("8B").parameters * 63 / 64
    assert time.communication == pytest.approx(volume / (0.8 * 8 * 50e9))
    inside = step_time(layout("zero1", size=8), H200, step_tokens=2**20)
    assert inside.communication == pytest.approx(3 * 2 * known("8B").parameters * 7 / 8 / (0.8 * 450e9))


def test_an_offloaded_update_waits_for_pcie_and_the_drive() -> None:
    here, cpu, drive = (
        step_time(layout(zero), H200, step_tokens=2**20).update
        for zero in ("zero3", "zero3_offload_cpu", "zero3_offload_nvme")
    )
    assert here < cpu < drive


@settings(max_examples=50, deadline=None)
@given(size=st.sampled_from([8, 64, 512, 4096]), tokens=st.integers(2**22, 2**26))
def test_more_ranks_are_faster_but_never_more_than_their_number(size: int, tokens: int) -> None:
    few = step_time(layout(size=size), H200, step_tokens=tokens)
    many = step_time(layout(size=2 * size), H200, step_tokens=tokens)
    assert many.products + many.attention == pytest.approx((few.products + few.attention) / 2)
    assert many.tokens_per_second <= 2 * few.tokens_per_second * 1.5


def test_an_unknown_device_is_refused_by_name() -> None:
    with pytest.raises(ConfigError, match="h200, h100, a100"):
        device_named("tpu")
