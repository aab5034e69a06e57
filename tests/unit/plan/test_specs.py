"""A model's and a file's figures, read without torch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from seqaware.config.schema import DatasetConfig, ModelConfig
from seqaware.errors import ConfigError, DataError
from seqaware.plan.specs import ModelFacts, divisors, model_facts, rows_of_local_file


def folder(tmp_path: Path, config: Any) -> ModelConfig:
    (tmp_path / "config.json").write_text(config if isinstance(config, str) else json.dumps(config))
    return ModelConfig(base_name=str(tmp_path))


def test_llama_spelling(tmp_path: Path) -> None:
    config = {
        "model_type": "llama",
        "vocab_size": 320,
        "max_position_embeddings": 512,
        "hidden_size": 64,
        "num_hidden_layers": 2,
    }
    facts = model_facts(folder(tmp_path, config))
    assert facts == ModelFacts(320, 512, 64, 2, parameters=None, model_type="llama")


def test_gpt2_spelling() -> None:
    config = {"model_type": "gpt2", "vocab_size": 50257, "n_positions": 1024, "n_ctx": 9, "n_embd": 768, "n_layer": 12}
    facts = model_facts(ModelConfig(from_scratch=config, tokenizer="t"))
    assert facts == ModelFacts(50257, 1024, 768, 12, parameters=None, model_type="gpt2", defaults_known=False)


def test_a_model_of_several_modalities(tmp_path: Path) -> None:
    config = {"model_type": "gemma3", "text_config": {"model_type": "gemma3_text", "vocab_size": 262208}}
    facts = model_facts(folder(tmp_path, config))
    assert facts is not None
    assert facts.vocab_size == 262208
    assert facts.model_type == "gemma3"
    assert facts.max_positions is None


@pytest.mark.parametrize(
    ("content", "word"), [("{", "cannot be read"), ("[]", "no mapping"), (b"\xff".decode("latin1"), "cannot be read")]
)
def test_a_broken_config(tmp_path: Path, content: str, word: str) -> None:
    with pytest.raises(ConfigError, match=word):
        model_facts(folder(tmp_path, content))


def test_a_folder_without_a_config(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no config\.json"):
        model_facts(ModelConfig(base_name=str(tmp_path)))


@pytest.mark.parametrize("name", ["/no/such/folder", "./no/such/folder"])
def test_a_path_to_nowhere(name: str) -> None:
    with pytest.raises(ConfigError, match="no such folder"):
        model_facts(ModelConfig(base_name=name))


def test_a_name_that_the_hub_cannot_have() -> None:
    with pytest.raises(ConfigError, match="neither a folder nor a hub id"):
        model_facts(ModelConfig(base_name="three/part/name"))


def test_a_hub_model_that_is_not_here() -> None:
    assert model_facts(ModelConfig(base_name="seqaware-tests/never-downloaded")) is None


def test_rows_of_a_jsonl_file(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"a": 1}\n\n{"a": 2}\n{"a": 3}')
    facts = rows_of_local_file(DatasetConfig(name=str(path)))
    assert facts is not None
    assert (facts.documents, facts.exact) == (3, False)
    fewer = rows_of_local_file(DatasetConfig(name=str(path), max_examples=2))
    assert fewer is not None
    assert fewer.documents == 2


def test_rows_that_are_not_counted(tmp_path: Path) -> None:
    assert rows_of_local_file(DatasetConfig(name="gsm8k")) is None
    assert rows_of_local_file(DatasetConfig(name=str(tmp_path / "missing.jsonl"))) is None


def test_an_empty_file(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text("\n")
    with pytest.raises(DataError, match="empty"):
        rows_of_local_file(DatasetConfig(name=str(tmp_path / "rows.jsonl")))


def test_rows_of_a_large_file_are_estimated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("seqaware.plan.specs._SAMPLE_BYTES", 100)
    path = tmp_path / "rows.jsonl"
    path.write_text('{"a": 1}\n\n' * 1000)
    facts = rows_of_local_file(DatasetConfig(name=str(path)))
    assert facts is not None and facts.documents == 1000  # ten lines of ten bytes, and a hundred times as many


@pytest.mark.parametrize(
    ("size", "value"),
    [
        ("hidden_size", 0),
        ("num_hidden_layers", 1025),
        ("num_attention_heads", -1),
        ("vocab_size", True),
        ("n_inner", 2**41),
    ],
)
def test_a_size_that_no_model_has_is_refused(tmp_path: Path, size: str, value: int) -> None:
    with pytest.raises(ConfigError, match=f"config.json: {size} must be a whole number from 1 to"):
        model_facts(folder(tmp_path, {"model_type": "llama", size: value}))


@pytest.mark.parametrize("content", ["[" * 5000, '{"vocab_size": ' + "9" * 400 + "}"])
def test_a_config_beyond_all_bounds_is_refused(tmp_path: Path, content: str) -> None:
    with pytest.raises(ConfigError, match=r"config\.json cannot be read"):
        model_facts(folder(tmp_path, content))


def test_divisors() -> None:
    for number in (1, 2, 12, 36, 97):
        assert divisors(number) == [n for n in range(1, number + 1) if number % n == 0]
    assert len(divisors(10**6)) == 49
