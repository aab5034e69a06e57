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

from seqaware.config.schema import SCHEMES, Config
from seqaware.errors import ConfigError
from seqaware.plan.facts import World

AXES: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "objective": (*SCHEMES, "own"),
        "loss_kernel": ("fused", "plain"),
        "attention": ("auto", "sdpa_per_document", "eager", "varlen", "flash_attention_2", "flash_attention_3"),
        "rows": ("packed", "single"),
        "sequence": ("whole", "shared"),
        "adapters": ("none", "lora", "dora", "quantized"),
        "compile": ("off", "on"),
        "activations": ("none", "full", "offload"),
        "mlp": ("whole", "tiles"),
        "evaluation": ("off", "loss", "exact_match"),
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


def _refused() -> dict[frozenset[Choice], Refusal]:
    table: dict[frozenset[Choice], Refusal] = {}

    def refuse(one: Choice, other: Choice, why: str, do: str) -> None:
        table[frozenset((one, other))] = Refusal(why, do)

    cpu, whole_dtype = ("device", "cpu"), ("precision", "float32")
    for kernel in ("varlen", "flash_attention_2", "flash_attention_3"):
        attention = ("attention", kernel)
        refuse(
            attention, cpu, f"model.attention {kernel} needs GPUs", "write model.attention: auto or sdpa_per_document"
        )
        why = f"model.attention {kernel} computes in bfloat16 or float16 only"
        refuse(attention, whole_dtype, why, "write model.attention: auto, or model.dtype: bfloat16")
    for optimizer in ("fused_adam", "adamw_8bit"):
        why = f"training.optimizer.type {optimizer} runs on GPUs only, and this run has none"
        refuse(("optimizer", optimizer), cpu, why, "write adamw or cpu_adam")
    why = "model.dtype float16 cannot be trained on the CPU"
    refuse(("precision", "float16"), cpu, why, "write model.dtype: bfloat16, float32 or auto")
    for dtype in ("bfloat16", "float16"):
        why = f"without ZeRO, DeepSpeed adds up micro-batches in {dtype}, and their number would change the gradient"
        refuse(("precision", dtype), ("zero", "0"), why, "use ds_configs/zero1.json, or write model.dtype: float32")
    for adapters in ("lora", "dora", "quantized"):
        why = "training.optimizer.type muon orthogonalises whole weight matrices, and lora trains factors of them"
        refuse(("optimizer", "muon"), ("adapters", adapters), why, "write training.optimizer.type: adamw")
    quantized = ("adapters", "quantized")
    why = "lora.quantize_base cannot be sharded by ZeRO-3: the scales of the quantised weights would stay behind"
    refuse(quantized, ("zero", "3"), why, "use ds_configs/zero2.json, or write lora.quantize_base: none")
    why = "lora.quantize_base keeps weights that torch.compile cannot look into"
    refuse(quantized, ("compile", "on"), why, "write model.compile: false")
    return table


REFUSED: Mapping[frozenset[Choice], Refusal] = MappingProxyType(_refused())


def choices_of(config: Config, *, stage: int, world: World, dtype: str) -> dict[str, str]:
    """What a run chooses on every axis."""
    model, training = config.model, config.training
    scheme = training.sft.weighting
    evaluation = "exact_match" if config.evaluation.metric == "exact_match" else "loss"
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
