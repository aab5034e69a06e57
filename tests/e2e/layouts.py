"""The layouts a run may have and the objectives it may train, and a small set of them that covers every pair."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, fields

CHOICES: dict[str, tuple[object, ...]] = {
    "ranks": (1, 2),
    "stage": (0, 1, 2, 3),
    "packed": (True, False),
    "micro_batch_tokens": (4096, 128),
    "kernel": ("fused", "plain"),
    "gamma": (0.0, 0.9, 0.98, 1.0),
    "normalize_by": ("tokens", "weight", "sequences"),
}


@dataclass(frozen=True)
class Layout:
    """One cell of the matrix: the first five fields are topology, the last two the objective."""

    ranks: int
    stage: int
    packed: bool
    micro_batch_tokens: int
    kernel: str
    gamma: float
    normalize_by: str

    @property
    def name(self) -> str:
        rows = "packed" if self.packed else "rows"
        micro = "one" if self.micro_batch_tokens == CHOICES["micro_batch_tokens"][0] else "several"
        return f"r{self.ranks}-z{self.stage}-{rows}-{micro}-{self.kernel}-g{self.gamma}-{self.normalize_by}"

    def pairs(self) -> Iterator[tuple[object, ...]]:
        """Every two choices that this layout brings together."""
        values = [(field.name, getattr(self, field.name)) for field in fields(self)]
        yield from itertools.combinations(values, 2)


def every_layout() -> list[Layout]:
    return [Layout(*values) for values in itertools.product(*CHOICES.values())]  # type: ignore[arg-type]


def covering_layouts() -> list[Layout]:
    """A greedy set in which any two choices meet at least once: each step takes the layout with most new pairs."""
    layouts = every_layout()
    missing = {pair for layout in layouts for pair in layout.pairs()}
    chosen = []
    while missing:
        best = max(layouts, key=lambda layout: len(missing.intersection(layout.pairs())))
        chosen.append(best)
        missing.difference_update(best.pairs())
    return chosen
