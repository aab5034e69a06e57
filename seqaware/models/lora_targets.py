"""Which modules of a model a `lora` section means; what cannot be adapted is refused before anything loads."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from seqaware.config.model_config import LoraConfig
from seqaware.errors import ConfigError


@dataclass(frozen=True)
class AdapterTargets:
    """Which modules of a model a `lora` section means, by their full names.

    Attributes:
        linear: layers that get an adapter. saved: modules that are trained whole.
        trained: number of weights that are trained.
    """

    linear: tuple[str, ...]
    saved: tuple[str, ...]
    trained: int


def find_targets(lora: LoraConfig, model: PreTrainedModel, *, loss_kernel: str) -> AdapterTargets:
    """Match target_modules and modules_to_save with a model's modules; it may lie on the meta device.

    Raises:
        ConfigError: a name that matches nothing or no linear layer, or a module that cannot be trained this way.
    """
    modules = dict(model.named_modules())
    linear = {name: module for name, module in modules.items() if isinstance(module, (nn.Linear, Conv1D))}
    head = next(name for name, module in modules.items() if module is model.get_output_embeddings())
    saved = _saved_modules(lora.modules_to_save, modules)
    inside_saved = {name for name in modules if any(name == whole or name.startswith(f"{whole}.") for whole in saved)}
    if lora.target_modules == "all-linear":
        targets = tuple(name for name in linear if name != head and name not in inside_saved)
    else:
        targets = tuple(_matching(lora.target_modules, modules, linear))
        both = [name for name in targets if name in inside_saved]
        if both:
            raise ConfigError(
                "lora: a module is both in target_modules and in modules_to_save",
                got=", ".join(both),
                do="take it out of target_modules to train it whole, or out of modules_to_save to adapt it",
            )
    if not targets:
        raise ConfigError(
            "lora: every linear layer of this model is inside modules_to_save",
            got=list(lora.modules_to_save),
            do="train the whole model (lora: null), or take one out",
        )
    _check_head_and_embedding(model, head=head, targets=targets, saved=saved, loss_kernel=loss_kernel)
    trained = sum(_adapter_size(linear[name], lora) for name in targets)
    trained += sum(parameter.numel() for name in saved for parameter in modules[name].parameters())
    return AdapterTargets(targets, saved, trained)


def _matching(asked: str | tuple[str, ...], modules: Mapping[str, nn.Module], linear: Mapping[str, Any]) -> list[str]:
    found: list[str] = []
    for pattern in (asked,) if isinstance(asked, str) else asked:
        names = _fullmatches(pattern, modules) if isinstance(asked, str) else _named(pattern, modules)
        if not names:
            kinds = sorted({_kind(name) for name in linear})
            raise ConfigError(
                "lora.target_modules matches nothing in this model",
                got=pattern,
                do=_hint(pattern, kinds, as_list=isinstance(asked, str)) + f"its linear layers are {', '.join(kinds)}",
            )
        others = [name for name in names if name not in linear]
        if others:
            raise ConfigError(
                "lora.target_modules matches what is no linear layer",
                got=f"{others[0]}, a {type(modules[others[0]]).__name__}",
                do="name linear layers only; other modules can be trained whole with lora.modules_to_save",
            )
        found += names
    return sorted(set(found))


def _fullmatches(pattern: str, modules: Mapping[str, nn.Module]) -> list[str]:
    try:
        return [name for name in modules if name and re.fullmatch(pattern, name)]
    except re.error as error:
        raise ConfigError("lora.target_modules is no regular expression", got=f"{pattern} ({error})") from error


def _named(last: str, modules: Mapping[str, nn.Module]) -> list[str]:
    return [name for name in modules if name == last or name.endswith(f".{last}")]


def _kind(name: str) -> str:
    return name.rpartition(".")[2]


def _hint(asked: str, known: list[str], *, as_list: bool) -> str:
    if as_list and asked in known:
        return f"one string is a regular expression over whole names: write [{asked}]; "
    near = difflib.get_close_matches(_kind(asked), known, n=1)
    return f"did you mean {near[0]}? " if near else ""


def _saved_modules(asked: tuple[str, ...], modules: Mapping[str, nn.Module]) -> tuple[str, ...]:
    found: set[str] = set()
    for last in asked:
        names = [name for name in _named(last, modules) if any(map(_has_weights, modules[name].modules()))]
        if not names:
            kinds = sorted({_kind(name) for name, module in modules.items() if _has_weights(module)})
            raise ConfigError(
                "lora.modules_to_save matches nothing that has weights in this model",
                got=last,
                do=_hint(last, kinds, as_list=False) + f"its modules with weights are {', '.join(kinds)}",
            )
        found.update(names)
    nested = [name for name in sorted(found) if any(name.startswith(f"{other}.") for other in found)]
    if nested:
        raise ConfigError("lora.modules_to_save names a module and its inside", got=nested[0], do="name one of them")
    return tuple(sorted(found))


def _has_weights(module: nn.Module) -> bool:
    return next(module.parameters(recurse=False), None) is not None


def _check_head_and_embedding(
    model: PreTrainedModel, *, head: str, targets: tuple[str, ...], saved: tuple[str, ...], loss_kernel: str
) -> None:
    embedding = model.get_input_embeddings()
    outer = {head, *(name for name, module in model.named_modules() if module is embedding)}
    touched = sorted(outer.intersection((*targets, *saved)))
    if touched and model.get_output_embeddings().weight is embedding.weight:
        raise ConfigError(
            "lora: this model's head and embedding are one matrix, which an adapter or a trained copy would part",
            got=touched,
            do="leave it out, or train the whole model (lora: null)",
        )
    if head in targets and loss_kernel == "fused":
        raise ConfigError(
            "lora.target_modules adapts the output head, which the fused loss reads as one matrix",
            got=head,
            do=f"write model.loss_kernel: plain, or lora.modules_to_save: [{_kind(head)}] to train the head whole",
        )


def _adapter_size(layer: nn.Module, lora: LoraConfig) -> int:
    # Not from the weight's shape, which sharding and quantisation change.
    inputs, outputs = (layer.nx, layer.nf) if isinstance(layer, Conv1D) else (layer.in_features, layer.out_features)
    return int(lora.rank * (inputs + outputs) + (outputs if lora.dora else 0))  # type: ignore[operator]
