"""Bytes that a run needs on the disk: its checkpoints, the exported model, and a model made from scratch."""

from __future__ import annotations

import math
from dataclasses import dataclass

from seqaware.estimate.layout import BYTES, ZeroSettings
from seqaware.plan.plan import Plan

_FLOAT32 = 4


@dataclass(frozen=True)
class DiskUse:
    """Bytes, and how many checkpoints.

    Attributes:
        checkpoint: of one checkpoint, all ranks. checkpoints: the most at once, with the one that is being written.
        model: of the exported model. initial: of the weights of a model from scratch.
    """

    checkpoint: int
    checkpoints: int
    model: int
    initial: int

    @classmethod
    def of(cls, plan: Plan, *, parameters: int, trained: int) -> DiskUse:
        """Return what a run needs.

        Args:
            parameters: number of the model's weights. trained: of those that are trained, which checkpoints hold.
        """
        lora, zero = plan.config.lora, ZeroSettings.of(plan.deepspeed["zero_optimization"])
        moments = moment_bytes(
            plan.config.training.optimizer.type, on_cpu=plan.world.device == "cpu" or zero.offload_optimizer is not None
        )
        exported = trained if lora is not None and lora.export == "adapter" else parameters
        return cls(
            checkpoint=checkpoint_bytes(trained, plan.dtype, moments=moments, stage=plan.zero_stage),
            checkpoints=_most_checkpoints(plan),
            model=exported * BYTES[plan.dtype] if plan.config.output.save_model else 0,
            initial=parameters * _FLOAT32 if plan.config.model.from_scratch else 0,
        )

    def total(self, *, saved: int = 0) -> int:
        """Return all bytes, without those of as many checkpoints as are `saved` already."""
        return max(1, self.checkpoints - saved) * self.checkpoint + self.model + self.initial


def checkpoint_bytes(trained: int, dtype: str, *, moments: int, stage: int) -> int:
    """Return the bytes of one checkpoint, as DeepSpeed 0.19 writes it.

    Stages 1 and 2 write the weights in their dtype beside the float32 master weights; the others float32 weights alone.
    The optimizer's state takes `moments` bytes a weight.
    """
    return trained * (_FLOAT32 + moments + (BYTES[dtype] if stage in (1, 2) else 0))


def moment_bytes(optimizer: str, *, on_cpu: bool) -> int:
    """Return the bytes of the optimizer's state of one weight. DeepSpeed 0.19's Lion keeps an unused moment on CPUs."""
    if optimizer == "lion" and on_cpu:
        return 8
    return {"lion": 4, "adamw_8bit": 2, "muon": 4}.get(optimizer, 8)


def _most_checkpoints(plan: Plan) -> int:
    """Return how many checkpoints lie in the run directory at most: those that are kept, and the one being written."""
    output, steps, every = plan.config.output, plan.total_steps, plan.config.evaluation.every_steps
    by_clock = output.save_every_minutes or (output.keep_best and plan.config.evaluation.every_minutes)
    kept = output.keep_last + output.keep_best + 1
    if steps is None:
        return kept if by_clock or output.save_every or output.keep_best else 1
    saves = math.inf if by_clock else 1.0
    saves += steps // output.save_every if output.save_every else 0
    saves += steps // every if every and output.keep_best else 0
    if output.keep_every is not None:
        # Steps that are saved by the clock or for their loss are rarely multiples of keep_every.
        apart = math.lcm(output.save_every, output.keep_every) if output.save_every else steps + 1
        kept += steps // apart + (steps % output.keep_every == 0 and steps % apart > 0)
    return int(min(kept, saves))
