"""Loads universal checkpoints with DeepSpeed's own loader alone, at ZeRO 1 to 3, and compares all that arrives.

Arguments: the model's folder, and the folder of the checkpoints.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import deepspeed
import torch
from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state
from transformers import AutoModelForCausalLM

from seqaware.checkpoint.shards import FP32, Shards
from seqaware.distributed.process_group import connect, find_address
from seqaware.engine.optimizer import parameter_groups


class Wrapped(torch.nn.Module):
    """With the names that a run's model has."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model


def main() -> None:
    source, checkpoints = sys.argv[1], Path(sys.argv[2])
    connect(find_address())
    for stage in (1, 2, 3):
        for path in sorted(child for child in checkpoints.iterdir() if child.is_dir()):
            engine = _load(source, path, stage)
            saved = Shards(path)
            for name, parameter in engine.module.named_parameters():
                _same(safe_get_full_fp32_param(parameter), saved.read(name, FP32))
                for key in ("exp_avg", "exp_avg_sq"):
                    _same(safe_get_full_optimizer_state(parameter, key), saved.read(name, key))
            if engine.global_rank == 0:
                print(f"{path.name} at ZeRO-{stage} is what was saved after step {engine.global_steps}", flush=True)


def _load(source: str, path: Path, stage: int) -> Any:
    model = Wrapped(AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32))
    optimizer = torch.optim.AdamW(parameter_groups(model, 0.01), lr=1e-3)
    settings = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {"stage": stage},
        "zero_allow_untested_optimizer": True,
        "checkpoint": {"load_universal": True},
    }
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=settings)
    engine.load_checkpoint(str(path.parent), tag=path.name)
    return engine


def _same(found: Any, saved: torch.Tensor) -> None:
    assert isinstance(found, torch.Tensor) and found.flatten().equal(saved)


if __name__ == "__main__":
    main()
