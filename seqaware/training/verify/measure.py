"""What the run's own engine does in a step: its figures and every parameter's gradient, while the weights stay."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from seqaware.data.batch import Batch
from seqaware.engine.engine import Engine
from seqaware.engine.gradients import before_optimizer_steps, full_gradients


@dataclass(frozen=True, eq=False)
class Measured:
    """A step of the engine.

    Attributes:
        metrics: as a run reports them. denominator: what the engine divided by.
        gradients: every trained parameter's, on the CPU of rank 0; empty on the other ranks.
    """

    metrics: dict[str, float]
    denominator: float
    gradient_norm: float
    gradients: dict[str, Tensor]


def measure_step(engine: Engine, batches: Sequence[Batch]) -> Measured:
    """Run a training step at learning rate 0 and look at the gradients just before the optimizer uses them.

    Collective. The weights stay; the optimizer's moments do not, and are no part of what is verified.
    """
    gradients: dict[str, Tensor] = {}

    def look() -> None:
        for name, gradient in full_gradients(engine):
            if engine.ranks.is_first:
                gradients[name] = gradient.float().cpu().clone()

    with before_optimizer_steps(engine, look):
        result = engine.train_step(batches, learning_rate=0.0)
    metrics = result.sums.metrics(engine.normalize_by)
    return Measured(metrics, float(result.denominator), float(result.grad_norm), gradients)
