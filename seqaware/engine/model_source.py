"""Whether a model can be loaded from where the config says, told without torch, before anything slow starts."""

from __future__ import annotations

from seqaware.config.schema import ModelConfig
from seqaware.errors import ConfigError
from seqaware.files import local_path
from seqaware.plan.facts import model_facts

_WEIGHT_PATTERNS = ("*.safetensors", "*.safetensors.index.json", "pytorch_model*.bin", "pytorch_model.bin.index.json")


def check_model_source(model: ModelConfig) -> None:
    """Refuse a local model folder that cannot be loaded.

    Raises:
        ConfigError: the folder lacks its config or its weights, or the path looks local and does not exist.
    """
    # Its sizes, and that its config.json is no larger and no deeper than any: transformers reads it without bounds.
    model_facts(model)
    if model.base_name is None:
        return
    folder = local_path(model.base_name)
    if not folder.is_dir():
        if model.base_name.startswith((".", "/", "~")) or model.base_name.count("/") > 1:
            raise ConfigError("model.base_name: there is no such folder", got=model.base_name)
        return
    if not (folder / "config.json").is_file():
        raise ConfigError(
            "model.base_name: the folder has no config.json", got=folder, do="name a Hugging Face model folder"
        )
    if not any(next(folder.glob(pattern), None) for pattern in _WEIGHT_PATTERNS):
        raise ConfigError(
            "model.base_name: the folder has a config.json but no weights (*.safetensors or pytorch_model*.bin)",
            got=folder,
            do="copy the weights into it, or train a new model from this config with model.from_scratch",
        )
