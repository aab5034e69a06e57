"""Every message names the dotted path, what was expected, what was got and, where one can know, what to do."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from seqaware.config.messages import config_error, dotted
from seqaware.config.schema import Config
from seqaware.errors import ConfigError

MINIMAL: dict[str, Any] = {"model": {"base_name": "gpt2"}, "dataset": {"name": "gsm8k"}}


def message(written: dict[str, Any]) -> str:
    with pytest.raises(ValidationError) as caught:
        Config.model_validate(written)
    error = config_error(caught.value, origin="run.yaml")
    assert isinstance(error, ConfigError)
    return str(error)


def test_paths() -> None:
    assert dotted(("dataset", "mixture", 0, "name")) == "dataset.mixture[0].name"


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        ({"packng": {}}, "unknown key packng; did you mean packing?"),
        ({"training": {"sft": {"gama": 1}}}, "unknown key training.sft.gama; did you mean training.sft.gamma?"),
        (
            {"training": {"batch_size": 4}},
            "unknown key training.batch_size; did you mean training.schedule.batch_size?",
        ),
        ({"gamma": 0.9}, "unknown key gamma; did you mean training.sft.gamma?"),
        (
            {"training": {"sft": {"zzz": 1}}},
            "unknown key training.sft.zzz; the keys of training.sft are gamma, half_life",
        ),
        (
            {"dataset": {"mixture": [{"nam": "a"}]}},
            "unknown key dataset.mixture[0].nam; did you mean dataset.mixture[0].name?",
        ),
        ({"evaluation": {"dataset": {"name": "a", "splt": "b"}}}, "did you mean evaluation.dataset.split?"),
    ],
)
def test_unknown_keys(written: dict[str, Any], expected: str) -> None:
    assert expected in message({**MINIMAL, **written})


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        ({"model": 3}, "model must be a section (a mapping of keys); got 3 (a whole number)"),
        ({"dataset": {"name": 12}}, 'dataset.name must be a string; got 12 (a whole number); write "12" in quotes'),
        (
            {"dataset": {"name": "a", "max_examples": 1.5}},
            "dataset.max_examples must be a whole number; got 1.5 (a number)",
        ),
        ({"training": {"optimizer": {"lr": "fast"}}}, "training.optimizer.lr must be a number; got 'fast' (a string)"),
        ({"training": {"optimizer": {"lr": 0}}}, "training.optimizer.lr must be more than 0; got 0 (a whole number)"),
        ({"training": {"optimizer": {"betas": [0.9, 0.99, 0.999]}}}, "training.optimizer.betas must be a list of 2"),
        ({"training": {"sft": {"gamma": 1.5}}}, "training.sft.gamma must be at most 1; got 1.5 (a number)"),
        (
            {"training": {"sft": {"scale": "mean"}}},
            "training.sft.scale must be 'raw', 'horizon' or 'mean_one'; got 'mean'",
        ),
        ({"training": {"sft": {"positions": "turns"}}}, "did you mean turn?"),
        ({"packing": {"enabled": "yes"}}, "packing.enabled must be true or false; got 'yes' (a string)"),
        ({"format": {"prompt_template": {"Q": {"question": None}}}}, "write the whole text in quotes"),
        ({"output": {"save_every": 0}}, "output.save_every must be at least 1; got 0"),
    ],
)
def test_wrong_values(written: dict[str, Any], expected: str) -> None:
    assert expected in message({**MINIMAL, **written})


def test_a_missing_section() -> None:
    assert message({"dataset": {"name": "a"}}) == "run.yaml: model is missing; write it"


def test_all_problems_come_at_once_and_name_the_file() -> None:
    text = message(
        {**MINIMAL, "packing": {"enabled": 1}, "formt": {}, "training": {"sft": {"gamma": 2, "horizon": "x"}}}
    )
    assert text.startswith("run.yaml: 4 problems:\n")
    assert [line.split()[1] for line in text.splitlines()[1:3]] == ["training.sft.gamma", "training.sft.horizon"]
    assert "packing.enabled" in text
    assert "formt" in text


def test_a_long_value_is_cut() -> None:
    assert len(message({**MINIMAL, "packing": {"enabled": "x" * 5000}})) < 300
