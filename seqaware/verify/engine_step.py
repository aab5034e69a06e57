"""What the run's own engine does in a step: its figures, every parameter's gradient, and the weights afterwards."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from seqaware.data.collate import Batch
from seqaware.engine.engine import Engine
from seqaware.engine.gradients import before_optimizer_steps, full_gradients, full_weights, rates_of_groups


@dataclass(frozen=True, eq=False)
class Measured:
    """A step of the engine.

    Attributes:
        metrics: as a run reports them. denominator: what the engine divided by.
        gradients: every trained parameter's before clipping, on the CPU of rank 0; empty on the other ranks.
        rates: of every group of the optimizer, on this rank.
    """

    metrics: dict[str, float]
    denominator: float
    gradient_norm: float
    gradients: dict[str, Tensor]
    rates: list[float]


def measure_step(engine: Engine, batches: Sequence[Batch], *, learning_rate: float) -> Measured:
    """Run a training step, and read the gradients just before the optimizer clips and uses them. Collective."""
    gradients: dict[str, Tensor] = {}
    rates: list[float] = []

    def look() -> None:
        rates.extend(rates_of_groups(engine))
        for name, gradient in full_gradients(engine):
            if engine.ranks.is_first:
                gradients[name] = gradient.float().cpu().clone()

    with before_optimizer_steps(engine, look):
        result = engine.train_step(batches, learning_rate=learning_rate)
    metrics = result.sums.metrics(engine.normalize_by)
    return Measured(metrics, float(result.denominator), float(result.grad_norm), gradients, rates)


def measure_weights(engine: Engine) -> dict[str, Tensor]:
    """Every trained parameter, float32 on the CPU of rank 0; empty on the other ranks. Collective."""
    weights: dict[str, Tensor] = {}
    for name, weight in full_weights(engine):
        if engine.ranks.is_first:
            weights[name] = weight.float().cpu().clone()
    return weights
