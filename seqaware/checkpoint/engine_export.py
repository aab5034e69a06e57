"""The trained model as a Hugging Face folder, out of a running engine."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from functools import partial as partial_call
from pathlib import Path

import torch
from safetensors import SafetensorError
from transformers import GenerationConfig, PreTrainedModel
from transformers.utils import GENERATION_CONFIG_NAME

from seqaware.config.schema import LoraConfig
from seqaware.data.chat import InferenceTokenizer
from seqaware.data.store.store_writer import sync_to_disk
from seqaware.distributed.collective_errors import not_written, raise_collectively
from seqaware.engine.engine import Engine


def export_model(
    engine: Engine, folder: Path, *, tokenizer: InferenceTokenizer, lora: LoraConfig | None = None
) -> None:
    """Write a Hugging Face folder of the trained model: safetensors, config, generation config, tokenizer. Collective.

    With adapters, `lora.export` says whether it is the whole model with the update added in, or the adapter alone.
    Under ZeRO-3 one parameter at a time is gathered; only rank 0 holds the whole, on the CPU.
    """
    adapters, first = engine.wrapped.adapters, engine.ranks.is_first
    write_weights: Callable[[Path, dict[str, torch.Tensor]], None]
    if adapters is None or lora is None:
        weights, write_weights = _whole_weights(engine), partial_call(write_model, engine.wrapped.model)
    elif lora.export == "merged":
        weights, write_weights = adapters.merged_weights(keep=first), adapters.write_merged
    else:
        weights, write_weights = adapters.adapter_weights(keep=first), adapters.write_adapter

    def write() -> None:
        put_in_place(folder, tokenizer, lambda partial: write_weights(partial, weights))

    raise_collectively(engine.ranks, write, on_first_only=True, error=not_written(f"the model's folder {folder}"))


def put_in_place(folder: Path, tokenizer: InferenceTokenizer, write_weights: Callable[[Path], None]) -> None:
    """Write a model's folder with all that inference needs, aside, then move it in the place of one that was there.

    Args:
        write_weights: writes weights, config and generation config.

    Raises:
        StorageError: the disk refuses it; what there is of it is cleared away.
    """
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        write_weights(partial)
        tokenizer.tokenizer.save_pretrained(partial)
        if (partial / GENERATION_CONFIG_NAME).is_file():  # an adapter's folder has none
            settings = GenerationConfig.from_pretrained(partial)
            end_answers(settings, tokenizer.answer_ends)
            settings.save_pretrained(partial)
        for path in (*partial.rglob("*"), partial):
            sync_to_disk(path)
        shutil.rmtree(folder, ignore_errors=True)
        partial.rename(folder)
        sync_to_disk(folder.parent)
    except (OSError, SafetensorError) as error:  # safetensors has one of its own for what a disk says
        shutil.rmtree(partial, ignore_errors=True)  # it may be what has filled the disk
        raise not_written(f"the model's folder {folder}")(str(error)) from error


def end_answers(settings: GenerationConfig, answer_ends: Sequence[int]) -> None:
    """Let generation stop at the tokens with which the trained answers end, and where it stopped before."""
    own = settings.eos_token_id
    before = own if isinstance(own, list) else [own] if own is not None else []
    ends = list(dict.fromkeys([*before, *answer_ends]))
    settings.eos_token_id = ends if len(ends) > 1 else ends[0]
    # Else transformers 4 replaces the settings by those that it derives from the model's config.
    settings._from_model_config = False


def write_model(
    model: PreTrainedModel,
    folder: Path,
    weights: dict[str, torch.Tensor],
    *,
    buffers: Mapping[str, torch.Tensor] | None = None,
) -> None:
    """Write weights, config and generation config of `model`, in several files where they are large.

    Args:
        weights: every parameter. buffers: those of its buffers that are kept; default: the model's own.
    """
    kept = model.state_dict().keys()
    own = dict(model.named_buffers()) if buffers is None else buffers
    weights |= {name: buffer.detach().cpu() for name, buffer in own.items() if name in kept}
    model.config.use_cache = True
    model.save_pretrained(folder, state_dict=weights)
    model.config.use_cache = False


def _whole_weights(engine: Engine) -> dict[str, torch.Tensor]:
    """Every weight on the CPU of rank 0, and none elsewhere. Collective."""
    import deepspeed

    model = engine.wrapped.model
    weights: dict[str, torch.Tensor] = {}
    for name, parameter in model.named_parameters():
        with deepspeed.zero.GatheredParameters([parameter], enabled=hasattr(parameter, "ds_id")):
            if engine.ranks.is_first:
                weights[name] = parameter.detach().cpu().clone()
    return weights
