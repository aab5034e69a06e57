"""The sections: defaults, contradictions inside a section, the discount's three spellings, the files for people."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import ValidationError

from seqaware.config.loading import REPOSITORY, load_config, read_yaml
from seqaware.config.messages import config_paths
from seqaware.config.schema import Config, LoraConfig, ModelConfig, ScheduleConfig, SftConfig, config_json_schema

TRAIN_CONFIGS = REPOSITORY / "train_configs"
MODEL = {"base_name": "gpt2"}
DATASET = {"name": "gsm8k"}


def config(**sections: Any) -> Config:
    return Config.model_validate({"model": MODEL, "dataset": DATASET, **sections})


def problem(**sections: Any) -> str:
    with pytest.raises(ValidationError) as caught:
        config(**sections)
    return str(caught.value)


def test_a_model_and_a_dataset_are_enough() -> None:
    built = config()
    assert built.training.sft.discount == 0.98
    assert built.output_dir == "runs/seqaware-model"


def test_a_config_is_frozen() -> None:
    with pytest.raises(ValidationError):
        config().packing.enabled = False


def test_a_section_without_keys_has_its_defaults() -> None:
    assert config(training=None, packing=None, evaluation=None) == config()


def test_a_resolved_config_reads_back_the_same() -> None:
    built = config(training={"sft": {"half_life": 20}, "optimizer": {"betas": [0.8, 0.95]}})
    assert Config.model_validate(built.model_dump(mode="json", exclude_none=True)) == built


@pytest.mark.parametrize(
    ("written", "gamma"),
    [
        ({}, 0.98),
        ({"gamma": None}, 0.98),
        ({"gamma": 0}, 0.0),
        ({"gamma": 1}, 1.0),
        ({"half_life": 1}, 0.5),
        ({"half_life": 10}, 0.5**0.1),
        ({"horizon": 1}, 0.0),
        ({"horizon": 50}, 0.98),
    ],
)
def test_the_discount_in_every_spelling(written: dict[str, Any], gamma: float) -> None:
    # One exp or one division in float64: a few units in the last place.
    assert SftConfig.model_validate(written).discount == pytest.approx(gamma, rel=1e-15, abs=0)


def test_a_half_life_halves() -> None:
    assert SftConfig(half_life=34.0).discount ** 34 == pytest.approx(0.5, rel=1e-13)


@pytest.mark.parametrize(
    "written",
    [{"gamma": 1.01}, {"gamma": -0.1}, {"half_life": 0}, {"half_life": -3}, {"horizon": 0.99}, {"gamma": math.nan}],
)
def test_discounts_out_of_bounds(written: dict[str, Any]) -> None:
    assert next(iter(written)) in problem(training={"sft": written})


@pytest.mark.parametrize("second", [{"half_life": 30}, {"horizon": 50}])
def test_two_spellings_of_the_discount(second: dict[str, Any]) -> None:
    assert "written in 2 ways" in problem(training={"sft": {"gamma": 0.98, **second}})


@pytest.mark.parametrize("name", ["log_sufix", "module.function", ":f", "a:b:c"])
def test_an_unknown_weighting(name: str) -> None:
    assert "module:function" in problem(training={"sft": {"weighting": name}})


def test_a_weighting_of_ones_own() -> None:
    assert SftConfig(weighting="my.weights:steep").weighting == "my.weights:steep"


@pytest.mark.parametrize(
    "ways",
    [
        {"batch_size": 4, "global_batch_size": 16},
        {"grad_accumulation_steps": 4, "global_batch_tokens": 4096},
        {"global_batch_size": 16, "global_batch_tokens": 4096},
    ],
)
def test_a_step_sized_in_two_ways(ways: dict[str, int]) -> None:
    assert "written in 2 ways" in problem(training={"schedule": ways})


def test_two_warm_ups() -> None:
    with pytest.raises(ValidationError, match="warmup_steps and warmup_ratio"):
        ScheduleConfig(warmup_steps=0, warmup_ratio=0.1)


@pytest.mark.parametrize(
    ("written", "word"),
    [
        ({}, "neither is written"),
        ({"base_name": "gpt2", "from_scratch": {"model_type": "gpt2"}}, "both are written"),
        ({"from_scratch": {"n_layer": 2}, "tokenizer": "t"}, "model_type"),
        ({"from_scratch": {"model_type": "gpt2"}}, "model.tokenizer"),
    ],
)
def test_where_a_model_comes_from(written: dict[str, Any], word: str) -> None:
    with pytest.raises(ValidationError, match=re.escape(word)):
        ModelConfig.model_validate(written)


@pytest.mark.parametrize(
    ("dataset", "word"),
    [
        ({}, "neither is written"),
        ({"name": "a", "mixture": [{"name": "b"}]}, "both are written"),
        ({"mixture": []}, "mixture"),
        ({"mixture": [{"name": "a", "proportion": 0.5}, {"name": "b"}]}, "for every part"),
        ({"mixture": [{"name": "a"}], "max_examples": 3}, "max_examples belongs to each of its parts"),
        ({"mixture": [{"name": "a", "proportion": 0}]}, "proportion"),
    ],
)
def test_contradictions_in_a_dataset(dataset: dict[str, Any], word: str) -> None:
    assert word in problem(dataset=dataset)


@pytest.mark.parametrize(
    ("evaluation", "word"),
    [
        ({"metric": "exact_match"}, "write evaluation.dataset"),
        ({"every_steps": 5}, "write evaluation.dataset"),
        ({"answer_pattern": "(?P<answer>"}, "no regular expression"),
        ({"answer_pattern": r"#### (\d+)"}, "needs a group"),
    ],
)
def test_contradictions_in_an_evaluation(evaluation: dict[str, Any], word: str) -> None:
    assert word in problem(evaluation=evaluation)


def test_the_json_schema_in_the_repository_is_fresh() -> None:
    written = json.loads((TRAIN_CONFIGS / "schema.json").read_text())
    assert written == config_json_schema(), (
        "regenerate it: python -c 'import json; from seqaware.config.schema import config_json_schema as s; "
        "print(json.dumps(s(), indent=2, ensure_ascii=False))' > train_configs/schema.json"
    )


def test_every_key_says_what_it_is() -> None:
    for name, section in config_json_schema()["$defs"].items():
        for key, field in section["properties"].items():
            described = "description" in field or "$ref" in field or name == "TrainingConfig"
            assert described, f"{name}.{key} has no description"


def written_paths(values: dict[str, Any], prefix: str = "") -> set[str]:
    paths = set()
    for key, value in values.items():
        paths.add(f"{prefix}{key}")
        if isinstance(value, dict):
            paths |= written_paths(value, f"{prefix}{key}.")
    return paths


def test_the_default_file_shows_every_key() -> None:
    elsewhere = {
        path for path in config_paths() if path.startswith(("evaluation.dataset.", "lora.", "logging.profile."))
    }
    assert written_paths(read_yaml(TRAIN_CONFIGS / "default.yaml")) == set(config_paths()) - elsewhere


def test_the_default_file_shows_the_keys_of_a_section_that_is_off() -> None:
    text = (TRAIN_CONFIGS / "default.yaml").read_text()
    block = re.search(r"^lora: null.*\n((?:  # .*\n)+)", text, re.MULTILINE)
    assert block is not None
    shown = yaml.safe_load(re.sub(r"^  # ", "", block[1], flags=re.MULTILINE))
    assert LoraConfig.model_validate(shown) == LoraConfig()
    assert set(shown) == set(LoraConfig.model_fields)


def test_the_default_file_states_the_defaults() -> None:
    shown = load_config(TRAIN_CONFIGS / "default.yaml")
    # A prompt must be written for question/answer data; everything else is what leaving it out gives.
    assert shown.model_copy(update={"format": config().format}) == config()
    assert shown.format.model_copy(update={"prompt_template": None}) == config().format


@pytest.mark.parametrize("path", sorted(TRAIN_CONFIGS.glob("*.yaml")), ids=lambda path: path.name)
def test_every_shipped_config_is_valid_and_points_editors_at_the_schema(path: Path) -> None:
    load_config(path)
    assert re.match(r"# yaml-language-server: \$schema=(\./)?schema\.json\n", path.read_text())


def test_the_baseline_is_plain_cross_entropy() -> None:
    assert load_config(TRAIN_CONFIGS / "baseline.yaml").training.sft.discount == 0.0
