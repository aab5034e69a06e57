"""Pairs of settings that cannot work together, found before any rank loads a model."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

from seqaware.config.packages import FLASH_MODULES, is_installed
from seqaware.config.schema import Config, OptimizerConfig
from seqaware.errors import ConfigError
from seqaware.plan.capabilities import choices_of, refusals
from seqaware.plan.offload import communication_contradictions, offload_contradictions, offload_device
from seqaware.plan.specs import ModelFacts, World, divisors

_GPU_OPTIMIZERS = ("fused_adam", "adamw_8bit")


def check_contradictions(config: Config, raw: Mapping[str, Any], *, world: World, dtype: str) -> None:
    """Every known contradiction between the YAML, the DeepSpeed JSON, the ranks and the installed libraries.

    Raises:
        ConfigError: names all of them.
    """
    zero = raw.get("zero_optimization", {})
    found = [
        *refusals(choices_of(config, stage=stage_of(raw), world=world, dtype=dtype)),
        *_of_precision(world, dtype),
        *_of_optimizer(config.training.optimizer, zero, world),
        *offload_contradictions(zero, optimizer=config.training.optimizer.type, elsewhere=world.elsewhere),
        *_of_communication(raw, zero),
        *communication_contradictions(raw, world, dtype=dtype),
        *_of_packages(config, world),
        *_of_keeping(config),
    ]
    if len(found) == 1:
        raise found[0]
    if found:
        raise ConfigError(f"{len(found)} contradictions:" + "".join(f"\n  - {error}" for error in found))


def check_sequence_parallelism(ranks: int, *, world: World, model: ModelFacts | None) -> None:
    """Refuse a number of ranks for one sequence that the world or the model's attention heads cannot share.

    Raises:
        ConfigError: it does not divide the ranks, or the query heads.
    """
    if world.size % ranks:
        raise ConfigError(
            "parallel.sequence must divide the number of ranks",
            got=f"{ranks}, with {world.size} ranks",
            do=f"write one of {divisors(world.size)}, or start a multiple of {ranks} ranks",
        )
    if model is not None and model.heads is not None and model.heads % ranks:
        raise ConfigError(
            "parallel.sequence must divide the model's attention heads: each rank computes whole heads",
            got=f"{ranks} ranks to a sequence, {model.heads} heads",
            do=f"write one of {divisors(math.gcd(world.size, model.heads))}",
        )


def stage_of(raw: Mapping[str, Any]) -> int:
    """The ZeRO stage of a DeepSpeed configuration."""
    return int(raw.get("zero_optimization", {}).get("stage", 0))


def _of_precision(world: World, dtype: str) -> Iterator[ConfigError]:
    if dtype == "bfloat16" and world.device == "cuda" and not world.bf16:
        yield ConfigError(
            "model.dtype bfloat16: these GPUs do not compute in it", do="write model.dtype: float16, float32 or auto"
        )


def _of_keeping(config: Config) -> Iterator[ConfigError]:
    if config.output.keep_best and not config.evaluation.written("every_steps", "every_minutes"):
        yield ConfigError(
            "output.keep_best keeps the checkpoints with the lowest held-out loss, and none is measured in training",
            got=f"{config.output.keep_best}, without evaluation.every_steps and every_minutes",
            do="write one of them, with evaluation.dataset, or leave keep_best out",
        )


def _of_optimizer(optimizer: OptimizerConfig, zero: Mapping[str, Any], world: World) -> Iterator[ConfigError]:
    kind = optimizer.type
    offloaded = offload_device(zero, "offload_optimizer")
    name = f"training.optimizer.type {kind}"
    if kind in _GPU_OPTIMIZERS and offloaded:
        yield ConfigError(
            f"{name} runs on the GPU, and the DeepSpeed config offloads the optimizer to {offloaded}",
            do="write training.optimizer.type: cpu_adam, or take a ds_config without offload_optimizer",
        )
    if kind == "adamw_8bit" and _lacks("bitsandbytes", world):
        yield ConfigError(f"{name} needs bitsandbytes, which is not installed", do="pip install bitsandbytes")
    if kind == "cpu_adam" and world.device == "cuda" and not offloaded:
        yield ConfigError(
            f"{name} updates weights in CPU memory, and the DeepSpeed config leaves them on the GPU",
            do="take ds_configs/zero3_offload_cpu.json, or write training.optimizer.type: adamw",
        )
    if kind == "muon" and zero.get("stage") == 3 and zero.get("reduce_scatter") is True:
        yield ConfigError(
            f"{name} needs whole gradients, which ZeRO-3 with reduce_scatter never has",
            do="delete zero_optimization.reduce_scatter from the DeepSpeed config",
        )


def _of_communication(raw: Mapping[str, Any], zero: Mapping[str, Any]) -> Iterator[ConfigError]:
    stage = zero.get("stage", 0)
    if stage == 3 and raw.get("gradient_predivide_factor", 1) != 1 and zero.get("reduce_scatter", True):
        yield ConfigError(
            "gradient_predivide_factor: ZeRO-3 supports it only without reduce_scatter",
            got=raw["gradient_predivide_factor"],
            do="delete it from the DeepSpeed config",
        )
    if stage < 2 and zero.get("overlap_comm") is True:
        yield ConfigError(
            "zero_optimization.overlap_comm needs ZeRO stage 2 or 3: gradients are reduced once a step",
            got=f"stage {stage}",
            do="delete it from the DeepSpeed config",
        )
    if stage in (1, 2) and zero.get("compute_grad_norm") is False:
        yield ConfigError(
            "zero_optimization.compute_grad_norm false: every step reports the gradient's norm", do="delete the key"
        )


def _of_packages(config: Config, world: World) -> Iterator[ConfigError]:
    attention, lora = config.model.attention, config.lora
    module = FLASH_MODULES.get(attention)
    if module and world.device == "cuda" and _lacks(module, world):
        yield ConfigError(f"model.attention {attention} needs {module}, which is not installed", do="write auto")
    if lora is None or lora.quantize_base == "none":
        return
    name = f"lora.quantize_base {lora.quantize_base}"
    if _lacks("bitsandbytes", world):
        yield ConfigError(f"{name} needs bitsandbytes, which is not installed", do="pip install bitsandbytes")
    if lora.dora and lora.quantize_base == "int8":
        yield ConfigError(
            f"{name} loses the scales of its weights where DoRA measures them", do="write nf4, or lora.dora: false"
        )


def _lacks(module: str, world: World) -> bool:
    """What a run elsewhere has installed is not known here."""
    return not world.elsewhere and not is_installed(module)
