"""Whether a model can be loaded from where the config says, told without torch, before anything slow starts."""

from __future__ import annotations

from pathlib import Path

from seqaware.config.schema import ModelConfig
from seqaware.errors import ConfigError
from seqaware.files import local_path, read_json
from seqaware.plan.specs import model_facts

ADAPTER_CONFIG = "adapter_config.json"
_WEIGHT_PATTERNS = ("*.safetensors", "*.safetensors.index.json", "pytorch_model*.bin", "pytorch_model.bin.index.json")


def check_model_source(model: ModelConfig) -> None:
    """Refuse a local model folder that cannot be loaded.

    Raises:
        ConfigError: the folder is an adapter's, or lacks its config or its weights, or the path looks local and does
            not exist.
    """
    if model.base_name is not None:
        _check_kind(local_path(model.base_name))
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


def _check_kind(folder: Path) -> None:
    """Refuse what is no whole model in transformers' format."""
    if folder.suffix == ".gguf" or (folder.is_dir() and _holds_only_gguf(folder)):
        raise ConfigError(
            "model.base_name: a GGUF file holds rounded weights for inference and is not trained",
            got=folder,
            do="name the model it was made of, or convert it: transformers' from_pretrained(FOLDER, gguf_file=FILE, "
            "quantization_config=GgufConfig(dequantize=True)), then save_pretrained",
        )
    if folder.is_dir():
        refuse_adapter(str(folder))


def refuse_adapter(source: str, revision: str | None = None) -> None:
    """Refuse a local folder or hub id that holds an adapter, which transformers would put on its base without a word.

    Raises:
        ConfigError: it holds an adapter_config.json.
    """
    folder = Path(source)
    if folder.is_dir():
        found = folder / ADAPTER_CONFIG if (folder / ADAPTER_CONFIG).is_file() else None
    else:
        from transformers.utils.peft_utils import find_adapter_config_file

        path = find_adapter_config_file(source, revision=revision)
        found = None if path is None else Path(path)
    if found is None:
        return
    if (folder / "config.json").is_file():
        raise ConfigError(
            "model.base_name: the folder holds a model and an adapter",
            got=folder,
            do=f"remove {ADAPTER_CONFIG} from it",
        )
    do = f"merge it and name the result: seqaware export {source} FOLDER"
    base = _base_of(found)
    if base is not None:
        do += f"; or name its base model, {base}, to train a new adapter"
    raise ConfigError("model.base_name is a LoRA adapter, not a whole model", got=source, do=do)


def _base_of(adapter_config: Path) -> str | None:
    try:
        base = read_json(adapter_config).get("base_model_name_or_path")
    except (OSError, ValueError, AttributeError):
        return None
    return str(base) if base else None


def _holds_only_gguf(folder: Path) -> bool:
    has_weights = any(next(folder.glob(pattern), None) for pattern in _WEIGHT_PATTERNS)
    return not has_weights and next(folder.glob("*.gguf"), None) is not None
