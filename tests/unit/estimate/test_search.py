"""The borders of what fits."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from seqaware.estimate.hardware import DEVICES, GIB
from seqaware.estimate.memory import memory
from seqaware.estimate.search import GRANULE, cheapest, fits, largest_micro_batch, longest_sequences, nearest_fit
from tests.unit.plan.layouts import gpus, known, layout

H200 = DEVICES["h200"]


@settings(max_examples=25, deadline=None)
@given(
    gib=st.integers(40, 200),
    sequence=st.sampled_from([1, 2, 8]),
    saving=st.sampled_from(["none", "selective", "full", "offload"]),
)
def test_the_largest_micro_batch_fits_and_the_next_does_not(gib: int, sequence: int, saving: str) -> None:
    device = replace(H200, memory=gib * GIB)
    made = layout(world=gpus(8, sequence=sequence), checkpointing=saving)
    tokens = largest_micro_batch(made, device)
    step = GRANULE * sequence
    assert tokens > 0 and tokens % step == 0
    assert fits(replace(made, micro_batch_tokens=tokens), device)
    assert not fits(replace(made, micro_batch_tokens=tokens + step), device)


def test_a_model_that_is_too_large_holds_no_token() -> None:
    assert largest_micro_batch(layout(decoder=known("70B")), H200) == 0


def test_offloaded_states_must_fit_the_cpus_memory() -> None:
    # 20 bytes of optimizer and gradients and 2 of weights, of an eighth of 70.6 billion: 181 GiB.
    made = layout("zero3_offload_cpu", decoder=known("70B"), checkpointing="full")
    assert fits(made, H200)
    assert not fits(made, replace(H200, host_memory=180 * GIB))


def test_the_longest_sequence_grows_with_every_way_of_saving() -> None:
    found = list(longest_sequences(layout(), H200))
    assert [each.tokens for each in found] == sorted(each.tokens for each in found)
    assert "parallel.sequence: 8" in found[-1].changes
    for each in found:
        assert fits(each.layout, H200)
        assert each.layout.longest == each.tokens == each.layout.micro_batch_tokens


def test_a_rank_count_that_the_heads_cannot_share_is_not_proposed() -> None:
    # 32 heads on 48 ranks: 16 is the most that divides both.
    made = layout(world=gpus(48))
    most = max(each.layout.world.sequence for each in longest_sequences(made, H200))
    assert most == 16


def test_what_does_not_fit_is_told_its_nearest_change() -> None:
    assert nearest_fit(layout(micro_batch_tokens=200_000), H200) == (
        f"training.schedule.micro_batch_tokens: {largest_micro_batch(layout(), H200)}"
    )
    large = layout(decoder=known("70B"), checkpointing="full")
    offloaded = layout("zero3_offload_cpu", decoder=known("70B"), checkpointing="full")
    others = [("ds_configs/zero3_offload_cpu.json", offloaded)]
    assert nearest_fit(large, H200) is None
    assert nearest_fit(large, H200, others=others) == "--deepspeed ds_configs/zero3_offload_cpu.json"


def test_a_long_document_is_told_to_be_computed_again_or_shared() -> None:
    made = layout(micro_batch_tokens=65536, longest=65536)
    assert not fits(made, H200)
    change = nearest_fit(made, H200)
    assert change == "parallel.sequence: 4, activation_checkpointing: none"


def test_what_compiled_layers_cannot_do_is_proposed_without_compiling() -> None:
    made = layout(micro_batch_tokens=200_000, longest=150_000)
    change = nearest_fit(made, H200)
    assert change is not None and "activation_checkpointing: selective" in change and "compile" not in change
    compiled = nearest_fit(replace(made, compiled=True), H200)
    assert compiled is not None and compiled.endswith("activation_checkpointing: selective, model.compile: false")


def test_the_cheapest_is_the_fastest_that_fits() -> None:
    names = ("zero1", "zero2", "zero3", "zero3_offload_cpu")
    candidates = [(name, layout(name)) for name in names]
    best = cheapest(candidates, H200, step_tokens=2**20)
    assert best is not None
    times = {name: cheapest([(name, made)], H200, step_tokens=2**20) for name, made in candidates}
    fitting = {name: choice.time.seconds for name, choice in times.items() if choice is not None}
    assert fitting[best.name] <= min(fitting.values()) + 0.01
    assert cheapest([("zero1", layout("zero1", decoder=known("70B")))], H200, step_tokens=2**20) is None


def test_equal_steps_are_told_apart_by_their_traffic() -> None:
    quiet = layout("zero3")
    chatty = replace(quiet, zero=replace(quiet.zero, gather=replace(quiet.zero.gather, reuse=0, max_live=0)))
    best = cheapest([("chatty", chatty), ("quiet", quiet)], H200, step_tokens=2**20)
    assert best is not None and best.name == "quiet"


@pytest.mark.parametrize(("size", "name"), [(8, "8B"), (64, "70B")])
def test_the_worked_examples_leave_room(size: int, name: str) -> None:
    made = layout(size=size, decoder=known(name), micro_batch_tokens=16384, checkpointing="full")
    assert memory(made).peak < 0.5 * H200.usable
