"""What can be combined with what: one table, looked up before a model loads, so that no choice switches another off.

A run makes one choice on every axis. Two choices that do not go together are in REFUSED, with the reason; any other two
do, and a test trains with each of them that a CPU can run. A choice that is on no axis fails the look-up: whoever adds
one to the configuration comes by here.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from seqaware.config.packages import FLASH_MODULES
from seqaware.config.schema import SCHEMES, Config
from seqaware.errors import ConfigError
from seqaware.plan.specs import World

AXES: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "objective": (*SCHEMES, "own"),
        "loss_kernel": ("fused", "plain"),
        "attention": ("auto", "sdpa_per_document", "eager", "varlen", *FLASH_MODULES),
        "rows": ("packed", "single"),
        "sequence": ("whole", "shared"),
        "adapters": ("none", "lora", "dora", "quantized"),
        "compile": ("off", "on"),
        "activations": ("none", "selective", "full", "offload"),
        "mlp": ("whole", "tiles"),
        "evaluation": ("off", "loss", "answers"),
        "optimizer": ("adamw", "adamw_fused", "cpu_adam", "fused_adam", "adamw_8bit", "lion", "muon"),
        "zero": ("0", "1", "2", "3"),
        "precision": ("float32", "bfloat16", "float16"),
        "device": ("cpu", "cuda"),
    }
)

Choice = tuple[str, str]
"""An axis and what was chosen on it."""


@dataclass(frozen=True)
class Refusal:
    """Why two choices do not go together, and what to do instead."""

    why: str
    do: str


@dataclass(frozen=True)
class _Rule:
    """Each choice of `these` with each of `those` is refused; {} in the reason is the first of the two."""

    these: tuple[str, tuple[str, ...]]
    those: tuple[str, tuple[str, ...]]
    why: str
    do: str


_GPU_KERNELS = ("varlen", *FLASH_MODULES)
_RULES = (
    _Rule(
        ("attention", _GPU_KERNELS),
        ("device", ("cpu",)),
        why="model.attention {} needs GPUs",
        do="write model.attention: auto or sdpa_per_document",
    ),
    _Rule(
        ("attention", _GPU_KERNELS),
        ("precision", ("float32",)),
        why="model.attention {} computes in bfloat16 or float16 only",
        do="write model.attention: auto, or on a GPU model.dtype: bfloat16",
    ),
    _Rule(
        ("optimizer", ("fused_adam", "adamw_8bit")),
        ("device", ("cpu",)),
        why="training.optimizer.type {} runs on GPUs only, and this run has none",
        do="write adamw or cpu_adam",
    ),
    _Rule(
        ("precision", ("float16",)),
        ("device", ("cpu",)),
        why="model.dtype {} cannot be trained on the CPU",
        do="write model.dtype: bfloat16, float32 or auto",
    ),
    _Rule(
        ("precision", ("bfloat16", "float16")),
        ("zero", ("0",)),
        why="without ZeRO, DeepSpeed adds up micro-batches in {}, and their number would change the gradient",
        do="use ds_configs/zero1.json, or write model.dtype: float32",
    ),
    _Rule(
        ("optimizer", ("muon",)),
        ("adapters", ("lora", "dora", "quantized")),
        why="training.optimizer.type {} orthogonalises whole weight matrices, and lora trains factors of them",
        do="write training.optimizer.type: adamw",
    ),
    _Rule(
        ("adapters", ("quantized",)),
        ("zero", ("3",)),
        why="lora.quantize_base cannot be sharded by ZeRO-3: the scales of the quantised weights would stay behind",
        do="use ds_configs/zero2.json, or write lora.quantize_base: none",
    ),
    _Rule(
        ("adapters", ("quantized",)),
        ("compile", ("on",)),
        why="lora.quantize_base keeps weights that torch.compile cannot look into",
        do="write model.compile: false",
    ),
    _Rule(
        ("activations", ("selective",)),
        ("mlp", ("tiles",)),
        why="model.activation_checkpointing {} keeps what mlp_tile_tokens computes again: the MLPs' products",
        do="write model.activation_checkpointing: full, or model.mlp_tile_tokens: null",
    ),
    _Rule(
        ("activations", ("selective",)),
        ("compile", ("on",)),
        why="model.activation_checkpointing {} cannot keep the products inside compiled layers: they would run twice",
        do="write model.activation_checkpointing: full, or model.compile: false",
    ),
)

REFUSED: Mapping[frozenset[Choice], Refusal] = MappingProxyType(
    {
        frozenset(((rule.these[0], this), (rule.those[0], that))): Refusal(rule.why.format(this), rule.do)
        for rule in _RULES
        for this in rule.these[1]
        for that in rule.those[1]
    }
)


def choices_of(config: Config, *, stage: int, world: World, dtype: str) -> dict[str, str]:
    """What a run chooses on every axis."""
    model, training = config.model, config.training
    scheme = training.sft.weighting
    evaluation = "loss" if config.evaluation.metric == "none" else "answers"
    choices = {
        "objective": scheme if scheme in SCHEMES else "own",
        "loss_kernel": model.loss_kernel,
        "attention": model.attention,
        "rows": "packed" if config.packing.enabled else "single",
        "sequence": "shared" if config.parallel.sequence > 1 else "whole",
        "adapters": _adapters(config),
        "compile": "on" if model.compile else "off",
        "activations": model.activation_checkpointing,
        "mlp": "tiles" if model.mlp_tile_tokens else "whole",
        "evaluation": evaluation if config.evaluation.dataset else "off",
        "optimizer": training.optimizer.type,
        "zero": str(stage),
        "precision": dtype,
        "device": world.device,
    }
    for axis, choice in choices.items():
        assert choice in AXES[axis], f"{axis}: {choice} is not in the table of capabilities"
    return choices


def _adapters(config: Config) -> str:
    if config.lora is None:
        return "none"
    if config.lora.quantize_base != "none":
        return "quantized"
    return "dora" if config.lora.dora else "lora"


def refusals(choices: Mapping[str, Any]) -> Iterator[ConfigError]:
    """An error for every two of a run's choices that do not go together."""
    made = set(choices.items())
    for pair, refusal in REFUSED.items():
        if pair <= made:
            got = " with ".join(f"{axis} {choice}" for axis, choice in sorted(pair))
            yield ConfigError(refusal.why, got=got, do=refusal.do)
