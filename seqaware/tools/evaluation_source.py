"""What of a config an evaluation of a model keeps, and where its results go."""

from __future__ import annotations

from pathlib import Path

from seqaware.config.schema import Config, OptimizerConfig, ParallelConfig
from seqaware.files import local_path
from seqaware.tools.whole_model import run_of

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")


def with_model(config: Config, name: str) -> Config:
    """The config with this model in the place of its own, with its tokenizer if it brings one, for evaluation alone.

    Args:
        name: a hub id, or the folder of a whole model.
    """
    folder = local_path(name)
    brings_own = not folder.is_dir() or any((folder / file).is_file() for file in _TOKENIZER_FILES)
    tokenizer = None if brings_own else config.model.tokenizer
    changes = {"base_name": name, "from_scratch": None, "tokenizer": tokenizer, "revision": None, "allow_missing": ()}
    # What only training needs: a run on many ranks, with adapters, may be evaluated on one.
    training = config.training.model_copy(update={"optimizer": OptimizerConfig()})
    model = config.model.model_copy(update=changes)
    return config.model_copy(update={"model": model, "training": training, "parallel": ParallelConfig(), "lora": None})


def default_folder(name: str) -> Path:
    """Where an evaluation's results go: with the run, if the model is a run's; else evaluations/<its name>."""
    folder = local_path(name)
    run = run_of(folder)
    last = folder.name or "model"
    return Path("evaluations", last) if run is None else run / "evaluations" / ("model" if folder == run else last)
