"""The optimizer a run asks for, over parameter groups with and without weight decay."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from seqaware.config.schema import OptimizerConfig
from seqaware.errors import ConfigError


def shape_of(parameter: nn.Parameter) -> torch.Size:
    """The parameter's whole shape, also where ZeRO-3 holds only a shard of it."""
    shape: torch.Size = getattr(parameter, "ds_shape", parameter.shape)
    return shape


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Matrices decay; biases and norms (one dimension) do not, as is the field's habit."""
    trained = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for _, p in trained if len(shape_of(p)) >= 2], "weight_decay": weight_decay},
        {"params": [p for _, p in trained if len(shape_of(p)) < 2], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def mark_for_muon(model: nn.Module) -> None:
    """Mark what Muon orthogonalizes: hidden matrices, not the head, and no table of embeddings."""
    outer = {
        id(p) for part in model.modules() if isinstance(part, nn.Embedding) for p in part.parameters(recurse=False)
    }
    outer |= {id(p) for p in model.get_output_embeddings().parameters()}  # type: ignore[operator]
    for parameter in model.parameters():
        parameter.use_muon = len(shape_of(parameter)) >= 2 and id(parameter) not in outer  # type: ignore[attr-defined]


def build_optimizer(config: OptimizerConfig, model: nn.Module, *, on_cpu: bool) -> torch.optim.Optimizer:
    """The client optimizer that DeepSpeed wraps. Muon is not built here: DeepSpeed builds it from the Plan's dict.

    Args:
        on_cpu: the optimizer's state lies in CPU memory, because there is no GPU or because it is offloaded.

    Raises:
        ConfigError: the library or compiled op the optimizer needs is not here.
    """
    groups = parameter_groups(model, config.weight_decay)
    adam: dict[str, Any] = {"lr": config.lr, "betas": tuple(config.betas), "eps": config.eps}
    match config.type:
        case "adamw":
            return torch.optim.AdamW(groups, **adam)
        case "adamw_fused":
            return torch.optim.AdamW(groups, **adam, fused=True)
        case "cpu_adam":
            from deepspeed.ops.adam import DeepSpeedCPUAdam

            return _compiled(DeepSpeedCPUAdam, groups, adamw_mode=True, **adam)
        case "fused_adam":
            from deepspeed.ops.adam import FusedAdam

            return _compiled(FusedAdam, groups, adam_w_mode=True, **adam)
        case "adamw_8bit":
            from bitsandbytes.optim import AdamW8bit

            return _compiled(AdamW8bit, groups, **adam)
        case "lion":
            return _lion(groups, config, on_cpu=on_cpu)
        case _:
            raise AssertionError(f"no optimizer is built here for {config.type}")


def _lion(groups: list[dict[str, Any]], config: OptimizerConfig, *, on_cpu: bool) -> torch.optim.Optimizer:
    from deepspeed.ops.lion import DeepSpeedCPULion, FusedLion

    Lion = DeepSpeedCPULion if on_cpu else FusedLion
    return _compiled(Lion, groups, lr=config.lr, betas=tuple(config.betas))


def _compiled(kind: Any, groups: list[dict[str, Any]], **options: Any) -> torch.optim.Optimizer:
    try:
        optimizer: torch.optim.Optimizer = kind(groups, **options)
    except (RuntimeError, ImportError, OSError) as error:
        raise ConfigError(
            f"the optimizer {kind.__name__} cannot be built on this machine",
            got=str(error).strip().splitlines()[0],
            do="install a C++ compiler (and ninja), or write training.optimizer.type: adamw",
        ) from error
    return optimizer
