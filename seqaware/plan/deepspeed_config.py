"""The complete DeepSpeed configuration: the user's ZeRO and communication keys, and everything the Plan derives.

The JSON a person names says how states are sharded and moved. Batch, accumulation, precision, clipping and optimizer
follow from the YAML, so a JSON that holds them could only contradict it, and is refused.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from seqaware.config.messages import nearest, show
from seqaware.config.schema import Config, OptimizerConfig
from seqaware.errors import ConfigError
from seqaware.files import MalformedError, read_json
from seqaware.plan.offload import with_own_swap_folder
from seqaware.plan.specs import World
from seqaware.plan.zero_schema import check_communication_keys, check_zero_keys

# What a person's JSON may hold. DeepSpeed ignores a key it does not know, so a misspelt one must not get that far.
COMMUNICATION_KEYS = (
    "zero_optimization",
    "communication_data_type",
    "prescale_gradients",
    "gradient_predivide_factor",
    "aio",
    "comms_logger",
    "flops_profiler",
    "memory_breakdown",
)

_MOST_BYTES = 2**20
_BATCH = "training.schedule.batch_size × grad_accumulation_steps, global_batch_size or global_batch_tokens"
_OPTIMIZER = "training.optimizer"
_DTYPE = "model.dtype"
_DERIVED = "nothing: the plan derives it"
# Owned by the Plan -> what to write in the YAML instead.
OWNED_KEYS: Mapping[str, str] = {
    "train_batch_size": _BATCH,
    "train_micro_batch_size_per_gpu": "training.schedule.micro_batch_tokens",
    "gradient_accumulation_steps": _BATCH,
    "managed_gradient_accumulation": _DERIVED,
    "gradient_clipping": "training.optimizer.max_grad_norm",
    "gradient_allreduce_op": "training.sft.normalize_by",
    "optimizer": _OPTIMIZER,
    "scheduler": "training.schedule.scheduler_type",
    "fp16": _DTYPE,
    "bf16": _DTYPE,
    "bfloat16": _DTYPE,
    "amp": _DTYPE,
    "torch_autocast": _DTYPE,
    "data_types": _DTYPE,
    "zero_allow_untested_optimizer": _OPTIMIZER,
    "zero_force_ds_cpu_optimizer": _OPTIMIZER,
    "steps_per_print": "training.control.log_every",
    "wall_clock_breakdown": "training.control.log_every",
    "activation_checkpointing": "model.activation_checkpointing",
    "dataloader_drop_last": _DERIVED,
    "sequence_parallel_size": _DERIVED,
    "seed": "training.control.seed",
}


def read_deepspeed_json(path: Path) -> dict[str, Any]:
    """A DeepSpeed JSON as a person wrote it, checked to hold ZeRO and communication keys only.

    Raises:
        ConfigError: missing, unreadable, no JSON, a key twice, a key that the Plan owns, or one DeepSpeed would ignore.
    """
    try:
        raw = read_json(path, limit=_MOST_BYTES, pairs=lambda pairs: _unique(pairs, path))
    except FileNotFoundError as error:
        others = sorted(file.name for file in path.parent.glob("*.json")) if path.parent.is_dir() else []
        do = nearest(path.name, others) or (f"in that folder are {', '.join(others)}" if others else None)
        raise ConfigError("the DeepSpeed config does not exist", got=path, do=do) from error
    except OSError as error:
        raise ConfigError("the DeepSpeed config cannot be read", got=f"{path} ({error.strerror})") from error
    except MalformedError as error:
        raise ConfigError("the DeepSpeed config is no valid JSON", got=f"{path}, {error}") from error
    if not isinstance(raw, dict):
        raise ConfigError("the DeepSpeed config must be a JSON object", got=f"{show(raw)} in {path}")
    check_owned_keys(raw, origin=str(path))
    return raw


def _unique(pairs: list[tuple[str, Any]], path: Path) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) < len(pairs):
        counts = Counter(key for key, _ in pairs)
        doubled = next(key for key, count in counts.items() if count > 1)
        raise ConfigError(f"{path}: duplicate key {doubled}", do="keep one of them")
    return content


def check_owned_keys(raw: Mapping[str, Any], *, origin: str) -> None:
    """Refuse keys that the Plan owns, and keys that nobody would read.

    Raises:
        ConfigError: names every such key, and what to write in the YAML instead.
    """
    owned = [key for key in raw if key in OWNED_KEYS]
    if owned:
        lines = "".join(f"\n  - {key}{_instead(raw[key], OWNED_KEYS[key])}" for key in owned)
        raise ConfigError(f"{origin} holds keys that the plan owns; delete them there:{lines}")
    for key in raw:
        if key not in COMMUNICATION_KEYS:
            hint = nearest(key, COMMUNICATION_KEYS) or f"the keys are {', '.join(COMMUNICATION_KEYS)}"
            raise ConfigError(f"{origin}: unknown key {key}", do=hint)
    zero = raw.get("zero_optimization", {})
    if not isinstance(zero, dict):
        raise ConfigError(f"{origin}: zero_optimization must be an object", got=show(zero))
    automatic = [key for key, value in zero.items() if value == "auto"]
    if automatic:
        raise ConfigError(
            f"{origin}: DeepSpeed itself does not know the value auto",
            got=", ".join(f"zero_optimization.{key}" for key in automatic),
            do="delete these keys, or write numbers",
        )
    stage = zero.get("stage", 0)
    if stage not in (0, 1, 2, 3) or isinstance(stage, bool):
        raise ConfigError(f"{origin}: zero_optimization.stage must be 0, 1, 2 or 3", got=show(stage))
    check_zero_keys(zero, origin=origin)
    check_communication_keys(raw, origin=origin)


def _instead(value: object, yaml_key: str) -> str:
    if value == "auto":
        return " (auto): just delete it, the plan fills it"
    return f" → write {yaml_key} in the YAML" if yaml_key != _DERIVED else f" → write {_DERIVED}"


def build_deepspeed_config(config: Config, raw: Mapping[str, Any], *, world: World, dtype: str) -> dict[str, Any]:
    """The complete dict for `deepspeed.initialize`.

    The engine accumulates over as many micro-batches as a step has and calls `step()` once, so DeepSpeed is told one
    micro-batch of one, without an accumulation boundary of its own. The optimizer object comes from the engine;
    only Muon has a block here, because DeepSpeed must build it (its groups and its momentum live inside ZeRO).

    Args:
        raw: the person's JSON, checked. dtype: float32, bfloat16 or float16.
    """
    zero = with_own_swap_folder(raw.get("zero_optimization", {}), config.output_dir)
    stage = int(zero.setdefault("stage", 0))
    optimizer = config.training.optimizer
    if optimizer.type == "muon" and stage == 3:
        # ZeRO-3 orthogonalises whole gradients, which a reduce-scatter would never assemble.
        zero["reduce_scatter"] = False
    derived: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "managed_gradient_accumulation": False,
        # Without ZeRO nothing wraps the optimizer, and the engine itself measures and clips the gradient.
        "gradient_clipping": optimizer.max_grad_norm if stage else 0.0,
        **_precision(dtype),
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        # Our own reports replace DeepSpeed's lines; its default would print every tenth step.
        "steps_per_print": 2**31 - 1,
        "wall_clock_breakdown": False,
    }
    if optimizer.type == "muon":
        derived["optimizer"] = _muon(optimizer, torch_adam=world.device == "cpu" and "offload_optimizer" not in zero)
    return {**raw, "zero_optimization": zero, **derived}


def _precision(dtype: str) -> dict[str, Any]:
    match dtype:
        case "bfloat16":
            # Micro-batches add up in float32, or their number would change the gradient.
            return {"bf16": {"enabled": True}, "fp16": {"enabled": False}, "data_types": {"grad_accum_dtype": "fp32"}}
        case "float16":
            scaling = {"loss_scale": 0, "initial_scale_power": 16, "loss_scale_window": 1000, "min_loss_scale": 1}
            return {
                "bf16": {"enabled": False},
                "fp16": {"enabled": True, **scaling},
                "data_types": {"grad_accum_dtype": "fp32"},
            }
        case _:
            return {"bf16": {"enabled": False}, "fp16": {"enabled": False}, "data_types": {"grad_accum_dtype": "fp32"}}


def _muon(optimizer: OptimizerConfig, *, torch_adam: bool) -> dict[str, Any]:
    params = {
        "lr": optimizer.lr,
        "momentum": optimizer.momentum,
        "weight_decay": optimizer.weight_decay,
        "betas": list(optimizer.betas),
        "eps": optimizer.eps,
    }
    # Embeddings, head and norms go to AdamW; DeepSpeed's fused one is a CUDA kernel.
    return {"type": "Muon", "params": {**params, **({"torch_adam": True} if torch_adam else {})}}
