"""The layouts a run may have and the objectives it may train, and small sets of them in which all choices meet."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tests.covering import Combination, covering

CHOICES: Mapping[str, Sequence[Any]] = {
    "ranks": (1, 2, 4),
    "sequence": (1, 2, 4),
    "stage": (0, 1, 2, 3),
    "packed": (True, False),
    "micro_batch_tokens": (4096, 128),
    "kernel": ("fused", "plain"),
    "checkpointing": ("none", "selective", "full", "offload"),
    "mlp_tile": (None, 16),
    "compiled": (False, True),
    "gamma": (0.0, 0.9, 0.98, 1.0),
    "normalize_by": ("tokens", "weight", "sequences"),
    "kind": ("questions", "places", "chat", "text"),
    "optimizer": ("adamw", "muon"),
}

# Compiling takes longer than all the rest of a run.
CHEAP: Mapping[str, Sequence[Any]] = {"compiled": (False,), "ranks": (1, 2)}


@dataclass(frozen=True)
class Layout:
    """One cell of the matrix: all fields are topology but the last four: objective, kind of data and optimizer."""

    ranks: int
    sequence: int
    stage: int
    packed: bool
    micro_batch_tokens: int
    kernel: str
    checkpointing: str
    mlp_tile: int | None
    compiled: bool
    gamma: float
    normalize_by: str
    kind: str = "questions"
    optimizer: str = "adamw"

    @property
    def name(self) -> str:
        rows = "packed" if self.packed else "rows"
        micro = "one" if self.micro_batch_tokens == CHOICES["micro_batch_tokens"][0] else "several"
        return (
            f"r{self.ranks}-s{self.sequence}-z{self.stage}-{rows}-{micro}-{self.kernel}-{self.checkpointing}"
            f"-t{self.mlp_tile or 0}-c{self.compiled:d}-g{self.gamma}-{self.normalize_by}-{self.kind}-{self.optimizer}"
        )


def covering_layouts(strength: int) -> list[Layout]:
    """Layouts in which any `strength` choices meet."""
    found = covering(CHOICES, strength=strength, valid=_can_exist, cheap=CHEAP)
    return [Layout(**values) for values in found]


def _can_exist(layout: Combination) -> bool:
    if layout["checkpointing"] == "selective" and (layout["mlp_tile"] or layout["compiled"]):
        return False  # refused by the table of capabilities
    return bool(layout["sequence"] <= layout["ranks"])  # the ranks that share a sequence are some of the ranks
