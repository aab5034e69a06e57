"""Steps that went wrong in their numbers: a loss that is not finite, and a loss that jumps."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from itertools import islice
from statistics import median
from typing import Any

from seqaware.config.output_config import FaultsConfig
from seqaware.data.batch_loader import StepBatches
from seqaware.data.collate import Batch
from seqaware.engine.engine import Engine, StepResult
from seqaware.errors import SeqawareError

_TRIED_ALONE = 64
_NAMED = 8


class DivergenceError(SeqawareError):
    """The loss or the gradient of a step is not finite, or the loss jumps again and again."""


class SpikeError(Exception):
    """The loss of a step is far above what it was; the run goes back and passes over the step."""

    def __init__(self, step: int, loss: float, usual: float) -> None:
        super().__init__(f"the loss of step {step} is {loss:.4f}, after a median of {usual:.4f}")
        self.step = step
        self.loss = loss
        self.usual = usual


class SpikeDetector:
    """Holds each step's loss against the median of those before it. Every rank has one and sees the same losses."""

    def __init__(self, faults: FaultsConfig) -> None:
        self._factor = faults.spike_factor
        self._window = faults.spike_window
        self._losses: OrderedDict[int, float] = OrderedDict()

    def remember(self, lines: Sequence[Mapping[str, Any]]) -> None:
        """Steps of this run before it was resumed: lines of `metrics.jsonl`."""
        self._losses.update((line["step"], float(line["loss"])) for line in lines)

    def forget_after(self, step: int) -> None:
        """The run went back to `step`."""
        for later in [known for known in self._losses if known > step]:
            del self._losses[later]

    def see(self, lines: Sequence[Mapping[str, Any]]) -> None:
        """Take in the steps that were reported.

        Raises:
            SpikeError: for the first of them whose loss is more than spike_factor times the median.
        """
        first = None
        for line in lines:
            step, loss = line["step"], float(line["loss"])
            usual = self._usual()
            if first is None and usual is not None and loss > self._factor_of(usual):
                first = SpikeError(step, loss, usual)
            elif self._factor is not None:
                self._losses[step] = loss
        if first is not None:
            raise first

    def _usual(self) -> float | None:
        if self._factor is None or len(self._losses) < self._window:
            return None
        return median(islice(reversed(self._losses.values()), self._window))

    def _factor_of(self, usual: float) -> float:
        assert self._factor is not None
        return self._factor * usual


def suspect_documents(
    engine: Engine, result: StepResult, micro_batches: Sequence[Batch], *, batches: StepBatches, step: int
) -> list[str]:
    """Which documents make the loss of a step not finite, by name. Collective: the weights are those before the step.

    The micro-batches whose loss is not finite are looked through one document at a time. Where no document does it by
    itself (the gradient alone overflows), all of these micro-batches, or all of the step, are named.
    """
    mine = [
        name
        for loss, batch in zip(result.losses, micro_batches, strict=True)
        if not math.isfinite(float(loss))
        for name in batch.document_names
    ]
    suspects = sorted({name for part in engine.ranks.gather(mine) for name in part}) or batches.names_of_step(step)
    tried = suspects[:_TRIED_ALONE]
    guilty = [name for name in tried if not _is_finite_alone(engine, batches.alone(step, name))]
    return guilty or suspects


def _is_finite_alone(engine: Engine, alone: Sequence[Batch]) -> bool:
    loss = float(engine.evaluate_step(alone)["weighted_loss"])
    return all(engine.ranks.gather(math.isfinite(loss)))


def not_finite(step: int, result: StepResult, documents: Sequence[str], *, kept: str) -> DivergenceError:
    """The error that ends a run with a step whose loss or gradient is not finite.

    Args:
        kept: where the weights before the step lie.
    """
    more = f" and {len(documents) - _NAMED} more" if len(documents) > _NAMED else ""
    loss = float(result.sums["weighted_loss"])
    what = "loss" if not math.isfinite(loss) else "gradient"
    return DivergenceError(
        f"the {what} of step {step} is not finite, so the step was not applied",
        got=f"Σ w·l {loss:g}, gradient norm {float(result.grad_norm):g}, from {', '.join(documents[:_NAMED])}{more}",
        do="look at these documents, lower training.optimizer.lr, or pass over such steps with faults.nonfinite: skip; "
        + kept,
    )
