"""A Hugging Face folder from a checkpoint, by one process on a CPU: no ranks, no engine, no GPU."""

from __future__ import annotations

import pickle
import re
from collections.abc import Mapping, Set
from contextlib import suppress
from functools import partial as partial_call
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import AutoConfig, GenerationConfig, PreTrainedModel

from seqaware.checkpoint.engine_export import put_in_place, write_model
from seqaware.checkpoint.manifest import Manifest, read_manifest, read_whole, told_if_removed
from seqaware.checkpoint.shards import FP32, Shards
from seqaware.config.loading import load_config
from seqaware.config.model_config import ModelConfig
from seqaware.config.schema import Config
from seqaware.data.chat import InferenceTokenizer
from seqaware.data.tokenization import load_tokenizer
from seqaware.errors import CheckpointError, ConfigError
from seqaware.files import local_path, read_json
from seqaware.models.lora import Adapters
from seqaware.models.model import (
    DTYPES,
    LoadOptions,
    empty_causal_lm,
    initial_config,
    load_model,
    local_or_hub,
    set_dropout,
)
from seqaware.models.model_source import ADAPTER_CONFIG, check_model_source
from seqaware.models.model_weights import WeightDifferences
from seqaware.training.run_directory import RunDirectory

if TYPE_CHECKING:
    from peft import PeftModel

# The engine's model is wrapped once, peft's twice.
_WRAPPED = "model."
_ADAPTED = "base_model.model."
# What peft raises at values of other types than it writes: it checks few of them.
_UNEXPECTED = (
    *(ArithmeticError, AssertionError, AttributeError, EOFError, ImportError, LookupError, MemoryError, OSError),
    *(RuntimeError, TypeError, ValueError, pickle.UnpicklingError, re.error),
)


def export_checkpoint(checkpoint: Path, folder: Path, *, run: Path | None = None, lora: str | None = None) -> int:
    """Write the model of a checkpoint as a Hugging Face folder, as the run itself would have at that step.

    The weights are cut out of the checkpoint's mapped files one by one and rounded to the run's dtype: memory for one
    copy of the model in that dtype. With adapters the base model is loaded beside them.

    Args:
        run: the run's folder, with its config; default: the one that the checkpoint lies in.
        lora: "merged" or "adapter"; default: the config's `lora.export`.

    Returns:
        the step.

    Raises:
        CheckpointError: the checkpoint is not whole, not of this model, or was removed meanwhile.
        ConfigError: the folder is taken, or the run's config is not there.
    """
    _check_free(folder)
    state = read_whole(checkpoint)
    run_folder = RunDirectory(run or checkpoint.absolute().parent.parent)
    path = run_folder.path / "config.yaml"
    if not path.is_file():
        raise ConfigError("the run's config is not there", got=path, do="name the run's folder with --run")
    config = load_config(path, [])
    with told_if_removed(checkpoint):
        dtype = _dtype_of(read_manifest(checkpoint))
        shards = Shards(checkpoint)
    tokenizer = load_tokenizer(config.model)
    place = partial_call(put_in_place, folder, InferenceTokenizer.of(tokenizer, config.format.chat_template))
    if config.lora is None:
        model = _empty(config, run_folder, dtype)
        weights = _weights(shards, dict(model.named_parameters()), dtype)
        buffers = {name.removeprefix(_WRAPPED): buffer for name, buffer in shards.buffers().items()}
        place(lambda partial: write_model(model, partial, weights, buffers=buffers))
        return state.step
    adapters = _adapted(config, run_folder, dtype, shards)
    if (lora or config.lora.export) == "merged":
        weights = adapters.merged_weights(keep=True)
        place(lambda partial: adapters.write_merged(partial, weights))
    else:
        weights = adapters.adapter_weights(keep=True)
        place(lambda partial: adapters.write_adapter(partial, weights))
    return state.step


def _dtype_of(manifest: Manifest) -> torch.dtype:
    model = manifest.mathematics.get("model")
    name = model.get("dtype") if isinstance(model, dict) else None
    if not isinstance(name, str) or name not in DTYPES:
        do = f"one of {', '.join(DTYPES)} is needed as mathematics.model.dtype"
        raise CheckpointError("the checkpoint's manifest names no known dtype", got=repr(name), do=do)
    return DTYPES[name]


def merge_adapter(adapter: Path, folder: Path) -> None:
    """Write the model that a PEFT adapter and its base make together, as a Hugging Face folder in the base's dtype.

    Raises:
        ConfigError: the folder is taken, the base model cannot be found, or the adapter is not one of it.
    """
    from peft import PeftConfig, PeftModel, load_peft_weights
    from safetensors import SafetensorError

    _check_free(folder)
    try:
        written = _adapter_settings(adapter)
        settings = PeftConfig.from_pretrained(str(adapter))
        base, where = str(settings.base_model_name_or_path), {"revision": settings.revision}
        brings_own = (adapter / "tokenizer_config.json").is_file()
        model = ModelConfig(base_name=base, revision=settings.revision, tokenizer=str(adapter) if brings_own else None)
        if local_path(base).is_dir():
            check_model_source(model)
        dtype = AutoConfig.from_pretrained(base, **where).dtype or torch.float32
        stored = load_peft_weights(str(adapter), device="cpu")
        _check_ranks(written, stored)
        # In float32, as a run merges its own: the update is small beside the weights.
        whole = tuple(name.removeprefix(_ADAPTED) for name in stored if "lora_" not in name)
        options = LoadOptions(torch.float32, None, settings.revision, False, {}, allow_missing=whole)
        adapted = PeftModel.from_pretrained(load_model(base, options), str(adapter))
        _check_adapter(adapter, adapted, stored.keys())
        merged: Any = adapted.merge_and_unload()
        tokenizer = load_tokenizer(model)
    except (*_UNEXPECTED, SafetensorError) as error:
        first_line = (str(error).strip() or type(error).__name__).splitlines()[0]
        do = f"see base_model_name_or_path and the other values in its {ADAPTER_CONFIG}"
        raise ConfigError(
            "the adapter and its base model make no model", got=f"{adapter}: {first_line}", do=do
        ) from error
    merged.config.use_cache = True
    inference = InferenceTokenizer.of(tokenizer, None)
    put_in_place(folder, inference, lambda partial: merged.to(dtype).save_pretrained(partial))


def _adapter_settings(adapter: Path) -> dict[str, Any]:
    """The values of adapter_config.json, without those that peft takes without bounds.

    Raises:
        OSError, ValueError: it cannot be read, or is not supported.
    """
    written = read_json(adapter / ADAPTER_CONFIG)
    if not isinstance(written, dict):
        raise ValueError(f"{ADAPTER_CONFIG} is not a mapping")
    # megatron_config imports the module that it names; layer_replication makes any number of layers.
    for name in ("megatron_config", "layer_replication"):
        if written.get(name) is not None:
            raise ValueError(f"{name} is not supported")
    return written


def _check_ranks(written: Mapping[str, Any], stored: Mapping[str, Tensor]) -> None:
    """peft makes weights of the rank that is written before it compares them with those that are stored.

    Raises:
        ValueError: the rank is larger than any stored weight.
    """
    most = max((size for weight in stored.values() for size in weight.shape), default=0)
    ranks = [written.get("r", 0), *dict(written.get("rank_pattern") or {}).values()]
    if (largest := max(ranks)) > most:
        raise ValueError(f"rank {largest} does not fit its weights, none of which has more than {most} rows or columns")


def _check_free(folder: Path) -> None:
    if folder.exists():
        raise ConfigError("the folder for the model is there already", got=folder, do="name another, or remove it")


def _check_adapter(folder: Path, adapted: PeftModel, stored: Set[str]) -> None:
    """Refuse an adapter that lacks weights (peft leaves their initial values) or has others (peft skips them)."""
    from peft import get_peft_model_state_dict

    own = get_peft_model_state_dict(adapted, save_embedding_layers=False).keys()
    # An adapter may hold resized embeddings, which are weights of the model itself.
    unexpected = stored - own - adapted.state_dict().keys()
    WeightDifferences(frozenset(own - stored), frozenset(unexpected)).refuse(str(folder))


def _weights(shards: Shards, parameters: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """The trained weights by the model's own names, rounded as the run rounds them.

    Raises:
        CheckpointError: they are not those of this model.
    """
    shards.check({f"{_WRAPPED}{name}": parameter.shape for name, parameter in parameters.items()})
    return {
        name: shards.read(f"{_WRAPPED}{name}", FP32).to(dtype).view(parameter.shape)
        for name, parameter in parameters.items()
    }


def _source(config: Config, run: RunDirectory) -> str:
    if config.model.from_scratch is not None:
        return str(run.initial)
    assert config.model.base_name is not None
    return local_or_hub(config.model.base_name)


def _empty(config: Config, run: RunDirectory, dtype: torch.dtype) -> PreTrainedModel:
    """The run's model without its weights, as it was when the run loaded it."""
    model, source = config.model, _source(config, run)
    where = {"revision": model.revision, "trust_remote_code": model.trust_remote_code}
    try:
        if model.from_scratch is not None and not Path(source).is_dir():
            loaded = initial_config(model.from_scratch, load_tokenizer(model))
        else:
            loaded = AutoConfig.from_pretrained(source, **({} if model.from_scratch else where))
    except (OSError, ValueError) as error:
        raise ConfigError("the run's base model cannot be found", got=f"{source}: {error}") from error
    if model.dropout is not None:
        set_dropout(loaded, model.dropout)
    loaded.dtype = dtype
    empty = empty_causal_lm(loaded, trust_remote_code=model.trust_remote_code)
    empty.to(dtype=dtype)  # type: ignore[call-arg]  # transformers types it as a call on a model
    with suppress(OSError):  # a model without one has that of its config
        empty.generation_config = GenerationConfig.from_pretrained(source)
    return empty


def _adapted(config: Config, run: RunDirectory, dtype: torch.dtype, shards: Shards) -> Adapters:
    """The base model with the checkpoint's adapters in it, on the CPU."""
    model, lora = config.model, config.lora
    assert lora is not None
    options = LoadOptions(
        dtype=dtype,
        dropout=model.dropout,
        revision=model.revision if model.from_scratch is None else None,
        trust_remote_code=model.trust_remote_code,
        deepspeed={},
        lora=lora,
        allow_missing=model.allow_missing,
        seed=config.training.control.seed,
    )
    loaded = load_model(_source(config, run), options)
    adapters = Adapters(
        loaded, lora, seed=config.training.control.seed, revision=options.revision, deepspeed=options.deepspeed
    )
    trained = {name: p for name, p in adapters.model.named_parameters() if p.requires_grad}
    for name, weight in _weights(shards, trained, dtype).items():
        trained[name].data.copy_(weight)
    return adapters
