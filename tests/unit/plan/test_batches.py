"""The size of a step, its micro-batches and the number of steps."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from seqaware.config.schema import TrainingConfig
from seqaware.errors import ConfigError
from seqaware.plan.batches import BatchPlan, derive_batches, steps_of_epochs
from seqaware.plan.specs import DataFacts, ModelFacts, World

SMALL = ModelFacts(vocab_size=100, max_positions=128, hidden_size=8, layers=1, parameters=None, model_type="llama")


def world(size: int = 1) -> World:
    return World(size=size, local_size=size, nodes=1, device="cpu", bf16=True)


def data(documents: int = 100, *, exact: bool = True, steps: tuple[int, ...] | None = None) -> DataFacts:
    return DataFacts(documents, documents * 10, documents * 5, 20, "f" * 16, exact, steps)


def derive(
    *, ranks: int = 1, model: ModelFacts | None = SMALL, facts: DataFacts | None = None, **schedule: Any
) -> BatchPlan:
    parameters = {"max_seq_length": schedule.pop("max_seq_length", None)}
    training = TrainingConfig.model_validate({"schedule": schedule, "parameters": parameters})
    return derive_batches(training, world=world(ranks), model=model, data=facts)


@pytest.mark.parametrize(
    ("schedule", "size", "tokens"),
    [
        ({}, 16, None),
        ({"batch_size": 8}, 32, None),
        ({"grad_accumulation_steps": 2}, 8, None),
        ({"batch_size": 3, "grad_accumulation_steps": 5}, 15, None),
        ({"global_batch_size": 10}, 10, None),
        ({"global_batch_tokens": 4096}, None, 4096),
    ],
)
@pytest.mark.parametrize("ranks", [1, 2, 8])
def test_the_size_of_a_step_is_the_same_on_any_number_of_ranks(
    schedule: dict[str, Any], size: int | None, tokens: int | None, ranks: int
) -> None:
    plan = derive(ranks=ranks, **schedule)
    assert (plan.global_batch_size, plan.global_batch_tokens) == (size, tokens)


def test_a_batch_that_the_ranks_cannot_share() -> None:
    with pytest.raises(ConfigError, match=r"cannot share.*10 sequences for 16 ranks.*global_batch_size: 16"):
        derive(ranks=16, global_batch_size=10)
    assert derive(ranks=10, global_batch_size=10).global_batch_size == 10


def test_sequence_length() -> None:
    assert derive().max_seq_length == 128
    assert derive(max_seq_length=64).max_seq_length == 64
    assert derive(model=None).max_seq_length == 2048
    long = ModelFacts(100, 131072, 8, 1, parameters=None, model_type="llama")
    assert derive(model=long).max_seq_length == 2048
    assert derive(model=long, max_seq_length=131072).max_seq_length == 131072
    with pytest.raises(ConfigError, match=r"more than the model can take; got 129, and the model's maximum is 128"):
        derive(max_seq_length=129)


def test_what_a_rank_holds_at_once() -> None:
    assert derive().micro_batch_tokens == 128
    assert derive(batch_size=4).micro_batch_tokens == 512
    assert derive(global_batch_size=64).micro_batch_tokens == 128
    assert derive(micro_batch_tokens=1000).micro_batch_tokens == 1000
    assert derive(micro_batch_tokens=128).micro_batch_tokens == 128
    with pytest.raises(ConfigError, match=r"micro_batch_tokens .*got 127, with max_seq_length 128"):
        derive(micro_batch_tokens=127)


def test_a_step_of_tokens_holds_every_sequence() -> None:
    with pytest.raises(ConfigError, match=r"global_batch_tokens .*got 127, with max_seq_length 128"):
        derive(global_batch_tokens=127)


@pytest.mark.parametrize(
    ("schedule", "per_epoch", "total"),
    [
        ({}, (7,), 7),
        ({"num_epochs": 3}, (7, 7, 7), 21),
        ({"num_epochs": 0.5}, (7,), 4),
        ({"num_epochs": 2.1}, (7, 7, 7), 15),
        ({"num_epochs": 3, "max_steps": 10}, (7, 7), 10),
        ({"num_epochs": 1, "max_steps": 10}, (7,), 7),
        ({"max_steps": 10}, (7,), 10),
        ({"max_steps": 3}, (7,), 3),
        ({"max_steps": 10**12}, (7,), 10**12),
        ({"num_epochs": None, "max_steps": None}, (7,), 7),
    ],
)
def test_steps_of_a_run(schedule: dict[str, Any], per_epoch: tuple[int, ...], total: int) -> None:
    # 100 documents, 16 a step: six whole steps and a ragged one.
    plan = derive(facts=data(), **schedule)
    assert plan.steps_per_epoch == per_epoch
    assert plan.total_steps == total
    assert plan.exact


def test_steps_that_the_order_of_the_data_decides() -> None:
    plan = derive(facts=data(steps=(9, 8, 9)), global_batch_tokens=256, num_epochs=2.5)
    assert plan.steps_per_epoch == (9, 8, 9)
    assert plan.total_steps == 9 + 8 + 5


def test_only_as_many_epochs_as_max_steps_needs() -> None:
    plan = derive(facts=data(steps=(9, 8)), global_batch_tokens=256, num_epochs=1000, max_steps=12)
    assert plan.total_steps == 12


@pytest.mark.parametrize(
    ("epochs", "steps"), [(0.1, 1), (0.3, 3), (0.7, 7), (1.1, 11), (0.01, 1), (2, 20), (1.25, 13), (1e-9, 1)]
)
def test_a_fraction_of_an_epoch_is_taken_as_written(epochs: float, steps: int) -> None:
    # In binary, 0.1 × 10 × … rounds up past the whole number: 0.7 × 10 would be 8 steps.
    assert steps_of_epochs(epochs, (10, 10, 10)) == steps


def test_steps_before_the_data_is_known() -> None:
    plan = derive()
    assert plan.total_steps is None
    assert plan.steps_per_epoch is None
    assert not plan.exact
    assert any("run `python launcher/prepare.py CONFIG`" in line for line in plan.derivation)
    assert any("at most 5" in line for line in derive(max_steps=5, num_epochs=1).derivation)


def test_max_steps_alone_is_the_length_of_the_run_whatever_the_data() -> None:
    unknown = derive(max_steps=50, warmup_ratio=0.1)
    assert (unknown.total_steps, unknown.warmup_steps, unknown.exact) == (50, 5, True)
    assert "steps: 50 (max_steps), in as many epochs as needed" in unknown.derivation
    guessed = derive(facts=data(exact=False), max_steps=50, warmup_ratio=0.1)
    assert (guessed.total_steps, guessed.warmup_steps, guessed.exact) == (50, 5, True)
    assert "steps: 50 (max_steps), about 7.14 epoch(s) of 7 steps" in guessed.derivation
    with pytest.raises(ConfigError, match="the run has 50 steps"):
        derive(max_steps=50, warmup_steps=51)


@pytest.mark.parametrize("size", [{"global_batch_size": 16}, {"global_batch_tokens": 256}])
def test_epochs_without_end_cost_no_more_than_max_steps(size: dict[str, Any]) -> None:
    steps = (7, 7) if "global_batch_size" in size else (8, 9)
    plan = derive(facts=data(steps=steps), num_epochs=1e12, max_steps=sum(steps), **size)
    assert plan.steps_per_epoch == steps
    assert plan.total_steps == sum(steps)
    assert any(line.endswith(f"max_steps {sum(steps)} stops the run first") for line in plan.derivation)
    assert derive(facts=data(), num_epochs=1e12, max_steps=14).steps_per_epoch == (7, 7)


@pytest.mark.parametrize(("epochs", "cut", "total"), [(2.5, (7, 7), 14), (1.5, (7, 7), 11), (0.5, (7,), 4)])
def test_steps_cut_by_max_steps_in_an_epoch_begun(epochs: float, cut: tuple[int, ...], total: int) -> None:
    plan = derive(facts=data(steps=cut), num_epochs=epochs, max_steps=14)
    assert (plan.steps_per_epoch, plan.total_steps) == (cut, total)


def test_a_family_default_is_not_guessed() -> None:
    written_only = replace(SMALL, max_positions=None, model_type="gpt2", defaults_known=False)
    plan = derive(model=written_only, global_batch_tokens=1500, micro_batch_tokens=1100)
    assert (plan.max_seq_length, plan.length_known) == (2048, False)
    assert plan.derivation[0].startswith("sequence: at most 2048 tokens = default, or less")
    assert "gpt2's own decides, not known here" in plan.derivation[0]
    assert "at most 2048 tokens a rank" in derive(model=written_only).derivation[3]
    assert derive(model=written_only, max_seq_length=64).length_known
    assert derive().length_known
    assert derive(model=replace(SMALL, max_positions=None)).length_known
    assert not derive(model=None).length_known


def test_a_guess_from_rows_says_so() -> None:
    plan = derive(facts=data(exact=False), num_epochs=2)
    assert plan.total_steps == 14
    assert not plan.exact
    assert any(line.startswith("steps: about 14") for line in plan.derivation)
    # Tokens of prepared data give a near guess: whole sequences do not fill a step to the last token.
    near = derive(facts=data(), global_batch_tokens=256)
    assert (near.total_steps, near.exact) == (4, False)
    assert derive(facts=DataFacts(9, 0, 0, 0, "", exact=False), global_batch_tokens=256).total_steps is None


def test_warm_up() -> None:
    assert derive(facts=data()).warmup_steps == 0
    assert derive(warmup_steps=3).warmup_steps == 3
    assert derive(facts=data(), warmup_ratio=0.2).warmup_steps == 2
    assert derive(facts=data(160), warmup_ratio=0.1).warmup_steps == 1
    assert derive(warmup_ratio=0.1).warmup_steps is None
    assert derive(facts=data(), warmup_steps=7).warmup_steps == 7
    with pytest.raises(ConfigError, match="the run has 7 steps"):
        derive(facts=data(), warmup_steps=8)


def test_the_derivation_names_what_it_multiplied() -> None:
    lines = "\n".join(derive(ranks=2, batch_size=4, grad_accumulation_steps=8, facts=data()).derivation)
    assert "step: 32 sequences over all ranks = batch_size 4 × grad_accumulation_steps 8" in lines
    assert "ranks: 2 on 1 node(s), 16 sequences each on average" in lines
    assert "micro-batch: 512 tokens a rank holds at once = 4 × max_seq_length 128" in lines
    assert "steps: 4 = 1 epoch(s) of 4 steps" in lines
