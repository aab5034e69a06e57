"""The table of capabilities knows every choice the configuration offers, and names the refused pairs."""

from __future__ import annotations

from typing import Any, get_args

import pytest

from seqaware.config.schema import Config, EvaluationConfig, ModelConfig, OptimizerConfig
from seqaware.plan.capabilities import AXES, REFUSED, choices_of, refusals
from seqaware.plan.specs import World

CPU = World(size=2, local_size=2, nodes=1, device="cpu", bf16=True)


def choices(**changes: Any) -> dict[str, str]:
    sections = {"model": {"base_name": "gpt2"}, "dataset": {"name": "gsm8k"}}
    for name, values in changes.items():
        sections[name] = {**sections.get(name, {}), **values}
    return choices_of(Config.model_validate(sections), stage=2, world=CPU, dtype="float32")


def literals(annotation: Any) -> set[str]:
    """The strings a field may hold, through Annotated and unions."""
    found = {value for value in get_args(annotation) if isinstance(value, str)}
    return found.union(*(literals(part) for part in get_args(annotation) if not isinstance(part, str)), set())


@pytest.mark.parametrize(
    ("axis", "annotation"),
    [
        ("attention", ModelConfig.model_fields["attention"].annotation),
        ("loss_kernel", ModelConfig.model_fields["loss_kernel"].annotation),
        ("activations", ModelConfig.model_fields["activation_checkpointing"].annotation),
        ("optimizer", OptimizerConfig.model_fields["type"].annotation),
    ],
)
def test_every_choice_of_the_configuration_is_on_its_axis(axis: str, annotation: Any) -> None:
    assert literals(annotation) == set(AXES[axis])


@pytest.mark.parametrize("metric", sorted(literals(EvaluationConfig.model_fields["metric"].annotation)))
def test_an_evaluation_is_by_loss_or_by_answers(metric: str) -> None:
    made = choices(evaluation={"dataset": {"name": "rows.jsonl"}, "metric": metric})
    assert made["evaluation"] == ("loss" if metric == "none" else "answers")


def test_every_refused_choice_is_on_its_axis() -> None:
    for pair in REFUSED:
        assert len({axis for axis, _ in pair}) == 2
        assert all(choice in AXES[axis] for axis, choice in pair)


def test_every_axis_is_chosen_on() -> None:
    assert choices().keys() == AXES.keys()


def test_what_is_written_decides_the_choices() -> None:
    made = choices(
        model={"compile": True, "mlp_tile_tokens": 64, "activation_checkpointing": True},
        parallel={"sequence": 2},
        lora={"dora": True},
        training={"sft": {"weighting": "mine:weights"}},
        evaluation={"dataset": {"name": "gsm8k"}},
        packing={"enabled": False},
    )
    expected = {
        "compile": "on",
        "mlp": "tiles",
        "activations": "full",
        "sequence": "shared",
        "adapters": "dora",
        "objective": "own",
        "evaluation": "loss",
        "rows": "single",
    }
    assert expected.items() <= made.items()


@pytest.mark.parametrize("pair", sorted(REFUSED, key=sorted), ids=lambda pair: "-".join(c for _, c in sorted(pair)))
def test_a_refused_pair_is_named_with_its_reason(pair: frozenset[tuple[str, str]]) -> None:
    (error,) = refusals({**choices(), "device": "none", "precision": "none", **dict(pair)})
    assert REFUSED[pair].why in str(error) and REFUSED[pair].do in str(error)


def test_what_is_not_refused_goes_through() -> None:
    assert not list(refusals(choices(parallel={"sequence": 2}, lora={"rank": 4}, model={"compile": True})))
