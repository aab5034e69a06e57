"""Which model is meant, and where its results go."""

from __future__ import annotations

from pathlib import Path

import pytest

from seqaware.config.schema import Config
from seqaware.errors import ConfigError
from seqaware.training.evaluation.source import default_folder, with_model

CONFIG = Config.model_validate(
    {
        "model": {"from_scratch": {"model_type": "llama"}, "tokenizer": "own", "output_name": "x"},
        "dataset": {"name": "gsm8k"},
        "parallel": {"sequence": 8},
        "lora": {"rank": 4},
        "training": {"optimizer": {"type": "adamw_8bit"}},
    }
)


def model(folder: Path, *files: str) -> Path:
    folder.mkdir(parents=True)
    for name in ("config.json", *files):
        (folder / name).write_text("{}")
    return folder


def test_a_run_means_its_model_and_keeps_its_results(tmp_path: Path) -> None:
    run = tmp_path / "run"
    inside = model(run / "model", "tokenizer.json")
    (run / "manifest.json").write_text("{}")
    config = with_model(CONFIG, str(run))
    assert (config.model.base_name, config.model.from_scratch, config.model.tokenizer) == (str(inside), None, None)
    assert default_folder(str(run)) == default_folder(str(inside)) == run / "evaluations" / "model"


def test_nothing_that_only_training_needs_is_asked_of_the_ranks(tmp_path: Path) -> None:
    config = with_model(CONFIG, str(model(tmp_path / "bare")))
    assert config.parallel.sequence == 1 and config.lora is None and config.training.optimizer.type == "adamw"
    assert config.model.tokenizer == "own"  # the folder brings none
    assert default_folder(str(tmp_path / "bare")) == Path("evaluations", "bare")


def test_a_name_of_the_hub_stays_one(tmp_path: Path) -> None:
    config = with_model(CONFIG, "someone/model")
    assert config.model.base_name == "someone/model" and config.model.tokenizer is None
    with pytest.raises(ConfigError, match="this folder holds no model"):
        with_model(CONFIG, str(tmp_path))


def test_a_checkpoint_is_exported_first(tmp_path: Path) -> None:
    (tmp_path / "seqaware.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"this is a checkpoint.*seqaware export .* FOLDER"):
        with_model(CONFIG, str(tmp_path))
