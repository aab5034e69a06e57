"""The objective's loss over held-out rows, every row exactly once.

All ranks stay in step whatever the rows: each takes part in the same number of forwards, because under ZeRO-3 every one
of them is collective. Answers are evaluation/'s.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from seqaware.data.collate import Batch
from seqaware.engine.engine import Engine
from seqaware.evaluation.rounds import Leaving
from seqaware.objective.sums import NormalizeBy


def held_out_loss(
    engine: Engine, steps: Iterable[Sequence[Batch]], normalize_by: NormalizeBy, *, leaving: Leaving
) -> dict[str, Any] | None:
    """Over all held-out rows: loss weighted, unweighted and by position, accuracy. Collective; the same on every rank.

    Args:
        steps: this rank's micro-batches, the same number on every rank.

    Returns:
        None where the run leaves before the end.
    """
    total = None
    for batches in steps:
        if leaving():
            return None
        sums = engine.evaluate_step(batches)
        total = sums if total is None else total + sums
    assert total is not None, "no held-out batch"
    engine.ranks.sum(total.vector)
    return {**total.metrics(normalize_by), "by_position": total.positions()}
