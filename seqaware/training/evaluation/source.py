"""Which model an evaluation means: a Hugging Face folder or hub id, or the model of a run."""

from __future__ import annotations

from pathlib import Path

from seqaware.config.schema import Config, OptimizerConfig, ParallelConfig
from seqaware.engine.checkpoint.manifest import MANIFEST
from seqaware.errors import ConfigError

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")


def with_model(config: Config, name: str) -> Config:
    """The config with this model in the place of its own, with its tokenizer if it brings one, for evaluation alone.

    Raises:
        ConfigError: the folder is a run's without a model.
    """
    name = model_folder(name)
    folder = Path(name).expanduser()
    brings_own = not folder.is_dir() or any((folder / file).is_file() for file in _TOKENIZER_FILES)
    tokenizer = None if brings_own else config.model.tokenizer
    changes = {"base_name": name, "from_scratch": None, "tokenizer": tokenizer, "revision": None}
    # What only training needs: a run on many ranks, with adapters, may be evaluated on one.
    training = config.training.model_copy(update={"optimizer": OptimizerConfig()})
    model = config.model.model_copy(update=changes)
    return config.model_copy(update={"model": model, "training": training, "parallel": ParallelConfig(), "lora": None})


def model_folder(name: str) -> str:
    """The model's own folder, where a run's is named; else the name as it is.

    Raises:
        ConfigError: the folder holds no model.
    """
    folder = Path(name).expanduser()
    if not folder.is_dir() or is_model(folder):
        return name
    if is_model(folder / "model"):
        return str(folder / "model")
    if (folder / MANIFEST).is_file():
        do = f"make a Hugging Face folder of it first: seqaware export {folder} FOLDER"
        raise ConfigError("this is a checkpoint, which holds shards of a model", got=folder, do=do)
    raise ConfigError(
        "this folder holds no model", got=folder, do="name a Hugging Face folder, or a run that has been trained"
    )


def is_model(folder: Path) -> bool:
    """Whether this is a Hugging Face folder: of a whole model, or of an adapter."""
    return (folder / "config.json").is_file() or (folder / "adapter_config.json").is_file()


def default_folder(name: str) -> Path:
    """Where an evaluation's results go: with the run, if the model is a run's; else evaluations/<its name>."""
    folder = Path(name).expanduser()
    run = next((each for each in (folder, *folder.parents) if (each / "manifest.json").is_file()), None)
    last = folder.name or "model"
    return Path("evaluations", last) if run is None else run / "evaluations" / ("model" if folder == run else last)
