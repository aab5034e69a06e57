"""DeepSpeed's compiled operators: found or built before the model is loaded, not in the middle of it."""

from __future__ import annotations

import shutil
from pathlib import Path

from seqaware.compat.operator_cache import build_each_once
from seqaware.errors import ConfigError
from seqaware.plan.offload import offload_device, swap_folders
from seqaware.plan.plan import Plan

_LONGEST_REASON = 200


def operators_of(plan: Plan) -> dict[str, str]:
    """The operators a run needs: DeepSpeed's name of the builder -> what asks for it."""
    zero, kind = plan.deepspeed["zero_optimization"], plan.config.training.optimizer.type
    on_cpu = plan.world.device == "cpu" or offload_device(zero, "offload_optimizer") is not None
    lion = "CPULionBuilder" if on_cpu else "FusedLionBuilder"
    optimizers = {"cpu_adam": "CPUAdamBuilder", "fused_adam": "FusedAdamBuilder", "lion": lion}
    needed = {}
    if kind in optimizers:
        needed[optimizers[kind]] = f"training.optimizer.type {kind}"
    if swap_folders(zero):
        needed["AsyncIOBuilder"] = "zero_optimization: offloading to nvme"
    return needed


def check_operators(plan: Plan) -> None:
    """Load the operators the run needs; one that was never built is built, which takes a minute or two.

    Raises:
        ConfigError: one cannot be built or loaded on this machine.
    """
    needed = operators_of(plan)
    if not needed:
        return
    from deepspeed.accelerator import get_accelerator

    build_each_once()
    for name, asked_by in needed.items():
        try:
            get_accelerator().create_op_builder(name).load(verbose=False)
        except (RuntimeError, ImportError, OSError, AttributeError) as error:
            raise ConfigError(
                f"{asked_by}: DeepSpeed's operator {name.removesuffix('Builder')} cannot be built on this machine",
                got=(str(error).strip().splitlines() or [type(error).__name__])[0][:_LONGEST_REASON],
                do=_remedy(name),
            ) from error


def _remedy(name: str) -> str:
    if name == "AsyncIOBuilder":
        return "apt-get install g++ ninja-build libaio-dev, or offload to cpu"
    return "install a C++ compiler and ninja, or write training.optimizer.type: adamw"


def remove_swap_files(plan: Plan) -> None:
    """Delete what the run put on drives; DeepSpeed leaves it there. One rank a node calls it, when all are done."""
    for folder in swap_folders(plan.deepspeed["zero_optimization"]):
        shutil.rmtree(Path(folder), ignore_errors=True)
