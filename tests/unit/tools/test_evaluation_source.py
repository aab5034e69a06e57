"""Which model is meant, and where its results go."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from seqaware.checkpoint.manifest import FORMAT_VERSION, MANIFEST, sealed
from seqaware.config.schema import Config
from seqaware.errors import CheckpointError, ConfigError
from seqaware.tools.evaluation_source import default_folder, with_model
from seqaware.tools.whole_model import whole_model
from tests.fakes import checkpoint_folder

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
    config = with_model(CONFIG, whole_model(str(run), say=print))
    assert (config.model.base_name, config.model.from_scratch, config.model.tokenizer) == (str(inside), None, None)
    assert default_folder(str(run)) == default_folder(str(inside)) == run / "evaluations" / "model"


def test_nothing_that_only_training_needs_is_asked_of_the_ranks(tmp_path: Path) -> None:
    config = with_model(CONFIG, str(model(tmp_path / "bare")))
    assert config.parallel.sequence == 1 and config.lora is None and config.training.optimizer.type == "adamw"
    assert config.model.tokenizer == "own"  # the folder brings none
    # A trained model lacks nothing: an evaluation never draws a weight.
    pretrained = CONFIG.model.model_copy(update={"base_name": "a", "from_scratch": None, "allow_missing": ("lm_head",)})
    started = CONFIG.model_copy(update={"model": pretrained})
    assert with_model(started, str(tmp_path / "bare")).model.allow_missing == ()
    assert default_folder(str(tmp_path / "bare")) == Path("evaluations", "bare")


def test_a_name_of_the_hub_stays_one(tmp_path: Path) -> None:
    config = with_model(CONFIG, whole_model("someone/model", say=print))
    assert config.model.base_name == "someone/model" and config.model.tokenizer is None
    with pytest.raises(ConfigError, match="this folder holds no model"):
        whole_model(str(tmp_path), say=print)


def test_what_is_no_whole_checkpoint_is_told_by_name(tmp_path: Path) -> None:
    run = tmp_path / "run"
    torn = run / "checkpoints" / "step-00000003"
    torn.mkdir(parents=True)
    with pytest.raises(
        CheckpointError, match=r"not a complete checkpoint.*step-00000003, where seqaware.json is missing"
    ):
        whole_model(str(torn), say=print)
    manifest = sealed({"step": 3, "files": {}}) | {"version": FORMAT_VERSION + 1}
    (torn / MANIFEST).write_text(json.dumps(manifest))
    for name in (torn, run):  # of a run without a model it is the newest one that is meant
        with pytest.raises(
            CheckpointError, match=f"is of another version; got {FORMAT_VERSION + 1}, this program reads"
        ):
            whole_model(str(name), say=print)
    checkpoint_folder(torn, 3)
    moved = torn.rename(tmp_path / "alone")
    with pytest.raises(ConfigError, match=r"does not lie in its run's folder.*seqaware export"):
        whole_model(str(moved), say=print)
    assert not (tmp_path / "exported").exists()
    (run / "manifest.json").write_text("{}")
    with pytest.raises(ConfigError, match="neither a model nor a checkpoint"):
        whole_model(str(run), say=print)
