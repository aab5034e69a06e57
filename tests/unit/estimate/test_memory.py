"""Bytes by part: hand-worked, and what must hold for any layout. Real runs are compared in benchmarks/memory.py."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from seqaware.estimate import activations as paper
from seqaware.estimate.activations import activations, loss_memory
from seqaware.estimate.layout import Layout, ZeroSettings, is_thin
from seqaware.estimate.memory import UPDATE, memory
from seqaware.objective import fused
from seqaware.plan.specs import World
from tests.unit.plan.layouts import SMALL, gpus, known, layout

STATES = ("weights", "gradients", "optimizer")


def states(zero: str, size: int) -> float:
    """Bytes of the states a weight takes on one rank, between two micro-batches."""
    made = layout(zero, size=size)
    parts = memory(made).moments["end of the forward"]
    return sum(parts.get(part, 0) for part in STATES) / made.decoder.parameters


@pytest.mark.parametrize("size", [8, 64, 1024])
def test_mixed_precision_costs_what_the_zero_paper_says(size: int) -> None:
    """Rajbhandari et al. 2020, Figure 1: (2 + 2 + 12)·Ψ, sharded by stage; our gradients add up in float32."""
    # Stage 1 is DeepSpeed's BF16_Optimizer: float32 gradients of all weights beside the bfloat16 ones.
    assert states("zero1", size) == pytest.approx(2 + (4 + 2) + 12 / size, abs=1e-6)
    assert states("zero2", size) == pytest.approx(2 + (4 + 12) / size, abs=1e-6)
    assert states("zero3", size) == pytest.approx((2 + 4 + 12) / size, abs=1e-6)


def test_offload_moves_the_optimizer_and_not_a_byte_is_lost() -> None:
    here, away = memory(layout("zero3")), memory(layout("zero3_offload_cpu"))
    resident = {part: here.moments["end of the forward"][part] for part in STATES}
    weights = known("8B").parameters
    assert not set(STATES) & set(away.moments["end of the forward"])
    # Pinned gradients are held twice: as they come in, and as the optimizer takes them.
    assert away.host_peak == sum(resident.values()) + 4 * weights // 8
    assert here.host_peak == 0


def test_nvme_keeps_only_what_is_on_its_way() -> None:
    drive = memory(layout("zero3_offload_nvme"))
    assert drive.nvme == (2 + 12 + 4) * known("8B").parameters // 8
    assert drive.host_peak > 0


def test_activations_of_a_layer_by_hand() -> None:
    """Llama in bfloat16, one token: two norms (4 + 2 + 2)·H + 4, q k v, the output and 4 bytes a head, 4·2·I."""
    decoder = known("8B")
    made = layout(micro_batch_tokens=1)
    by_hand = 2 * (8 * 4096 + 4) + 2 * (4096 + 2 * 1024) + 2 * 4096 + 4 * 32 + 4 * 2 * 14336
    kept = activations(made)
    assert kept.layer == by_hand
    assert kept.at_loss == decoder.layers * by_hand + 2 * 128 * 2 + (4 + 2) * 4096


def test_checkpointing_keeps_each_layers_input() -> None:
    kept = activations(layout(micro_batch_tokens=1, checkpointing="full"))
    assert kept.kept == 32 * 2 * 4096
    away = activations(layout(micro_batch_tokens=1, checkpointing="offload"))
    assert (away.kept, away.on_host) == (2 * 4096, 32 * 2 * 4096)


def test_compiled_layers_keep_what_products_take_in_and_give() -> None:
    """Llama 8B: x and norm before attention and MLP, q k v, attention, gate up and their product; 1 / rms, 4 a head."""
    kept = activations(layout(micro_batch_tokens=1, compiled=True))
    assert kept.layer == 2 * (4 * 4096 + (4096 + 2 * 1024) + 4096 + 3 * 14336) + 4 * 32 + 2 * 4


def test_selective_checkpointing_keeps_products_and_attention() -> None:
    """The input, q k v, attention, o, gate up down and 4 bytes a head; all else only of the layer at hand."""
    whole, kept = (activations(layout(micro_batch_tokens=1, checkpointing=way)) for way in ("none", "selective"))
    by_hand = 2 * (4096 + (4096 + 2 * 1024) + 4096 + 4096 + 2 * 14336 + 4096) + 4 * 32
    assert kept.kept == 32 * by_hand
    # Of the layer at hand there is what autograd saves, and the layer's input.
    assert kept.in_backward - kept.work == 31 * by_hand + whole.layer + 2 * 4096


def test_adapters_factors_are_not_kept_where_they_are_thin() -> None:
    """Rank 16 is a 64th of 1024; rank 256 a quarter."""
    bare = activations(layout(micro_batch_tokens=1, checkpointing="selective")).kept
    thin = activations(layout(micro_batch_tokens=1, checkpointing="selective", adapter_width=7 * 16)).kept
    assert thin - bare == 32 * 2 * 7 * 16
    assert is_thin(16, 1024) and not is_thin(256, 1024)


def test_the_fused_loss_by_hand() -> None:
    """8192 tokens: four chunks of 2048 rows, whose narrow gradient lies over their float32 logits."""
    made, V, H = layout(), 128256, 4096
    loss = loss_memory(made)
    assert loss.kept == 8192 * H * 2 + 4 * V * H
    assert loss.forward == 2048 * V * 4 + 2048 * H * 2 + 8192 * H * 2
    # The narrow gradient beside the sum; the sum is gone before dh is brought to its places.
    assert loss.backward == 2 * V * H
    frozen = loss_memory(replace(made, trains_head=False))
    assert frozen.backward == 2 * 8192 * H * 2
    assert frozen.kept == 8192 * H * 2


def test_a_large_heads_gradient_lies_where_its_sum_was() -> None:
    """152,064 words of width 5120: 1.6 GB are more than a chunk's budget."""
    made = layout()
    assert loss_memory(replace(made, decoder=replace(made.decoder, vocabulary=152_064, hidden=5120))).backward == 0
    # Few words, many tokens: with the sum gone, placing dh takes the most.
    V, H, tokens = 8192, 4096, 65_536
    few_words = replace(layout(micro_batch_tokens=tokens), decoder=replace(made.decoder, vocabulary=V))
    assert loss_memory(few_words).backward == (tokens + fused._BACKWARD_ROWS) * H * 2 - 2 * V * H


def test_chunks_are_the_loss_kernels_own() -> None:
    assert (fused._CPU_CHUNK_BYTES, fused._GPU_CHUNK_BYTES) == (paper.CPU_CHUNK_BYTES, paper.GPU_CHUNK_BYTES)
    assert fused._CPU_MOST_CHUNK_ROWS == paper.CPU_MOST_CHUNK_ROWS and fused._BACKWARD_ROWS == paper.BACKWARD_ROWS
    assert (fused._GPU_TILE_ROWS, fused._GPU_MOST_CHUNK_ROWS) == (paper.GPU_TILE_ROWS, paper.GPU_MOST_CHUNK_ROWS)
    for tokens in (1, 100, 8192, 16_384):
        weight = torch.empty(128_256, 4096, dtype=torch.bfloat16, device="meta")
        rows = fused._even_chunk_rows(tokens, fused._most_chunk_rows(weight), tile_rows=fused._GPU_TILE_ROWS)
        assert rows == paper.chunk_rows(layout(micro_batch_tokens=tokens))


def test_ranks_that_share_a_sequence_share_its_activations() -> None:
    """With as many key heads as ranks nothing is repeated; the output is kept twice, once in its rank's order."""
    alone = activations(layout(micro_batch_tokens=65536, checkpointing="full"))
    shared = activations(layout(micro_batch_tokens=65536, checkpointing="full", world=gpus(8, sequence=8)))
    assert shared.kept == alone.kept // 8
    twice = 2 * 4096 * 8192
    assert shared.layer == alone.layer // 8 + twice


def test_a_run_that_was_measured() -> None:
    """2 gloo ranks, float32, ZeRO-2, two micro-batches of 512 tokens: the counted peaks in bytes.

    The tensors of a batch and the rank's scalars are not in the estimate: below 0.1 %.
    """
    buckets = {"stage": 2, "overlap_comm": True, "reduce_bucket_size": 2_000_000}
    world = World(2, 2, 1, "cpu", bf16=True)
    made = Layout(SMALL, world, "float32", ZeroSettings.of(buckets), "adamw", 512, 256)
    moments = {name: sum(parts.values()) for name, parts in memory(made).moments.items()}
    assert moments["end of the forward"] == pytest.approx(369_450_182, rel=1e-3)
    assert moments["gradient of the head"] == pytest.approx(405_965_320, rel=1e-3)
    assert moments[UPDATE] == pytest.approx(363_392_460, rel=1e-3)


@pytest.mark.parametrize("zero", ["zero1", "zero2", "zero3", "zero1_offload_optimizer", "zero2_offload_optimizer"])
def test_buckets_are_no_larger_than_the_trained_weights(zero: str) -> None:
    """The engine asks DeepSpeed for no larger ones: twice all weights with overlap_comm, in float32 4 bytes each."""
    small = layout(zero, adapters=10_000, whole_modules=2_000, dtype="float32")
    assert small.trained == 12_000
    for parts in memory(small).moments.values():
        offloaded = small.decoder.largest * 4 if "offload" in zero else 0
        assert parts.get("buckets", 0) <= 2 * 4 * 12_000 + offloaded


def test_adapters_shrink_all_but_the_weights() -> None:
    lora = memory(layout("zero2", adapters=40_000_000, trains_head=False)).moments["end of the forward"]
    assert lora["weights"] == 2 * (known("8B").parameters + 40_000_000)
    assert lora["optimizer"] == 12 * 40_000_000 // 8


GROWING = st.sampled_from(["zero1", "zero2", "zero3", "zero3_offload_cpu", "zero3_offload_nvme", "zeropp"])


@settings(max_examples=60, deadline=None)
@given(
    zero=GROWING,
    tokens=st.integers(1, 400_000),
    more=st.integers(0, 400_000),
    saving=st.sampled_from(["none", "selective", "full"]),
)
def test_more_tokens_never_take_less(zero: str, tokens: int, more: int, saving: str) -> None:
    few = memory(layout(zero, micro_batch_tokens=tokens, checkpointing=saving))
    many = memory(layout(zero, micro_batch_tokens=tokens + more, checkpointing=saving))
    # Chunks of the loss are evened out: 4097 rows are two chunks of 2049. That saves at most one chunk.
    chunk = 4096 * (128256 * 6 + 4096 * 2)
    assert many.peak >= few.peak - chunk


@settings(max_examples=60, deadline=None)
@given(zero=GROWING, tokens=st.integers(1, 400_000), size=st.sampled_from([8, 16, 64]))
def test_more_ranks_never_take_more_each(zero: str, tokens: int, size: int) -> None:
    few = memory(layout(zero, size=size, micro_batch_tokens=tokens))
    many = memory(layout(zero, size=2 * size, micro_batch_tokens=tokens))
    assert many.peak <= few.peak
    assert many.host_peak <= few.host_peak


@settings(max_examples=40, deadline=None)
@given(tokens=st.integers(8192, 400_000), zero=GROWING)
def test_each_way_of_saving_saves(tokens: int, zero: str) -> None:
    plain = layout(zero, micro_batch_tokens=tokens)
    some, full, away = (replace(plain, checkpointing=way) for way in ("selective", "full", "offload"))
    kept = [activations(each).at_loss for each in (plain, some, full, away)]
    assert kept == sorted(kept, reverse=True) and len(set(kept)) == 4
    assert memory(plain).peak >= memory(some).peak >= memory(full).peak
    assert memory(full).peak >= memory(away).peak
    assert memory(away).host_peak > memory(full).host_peak
