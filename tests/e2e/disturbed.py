"""Runs that share one launch of two ranks, each disturbed in a way of its own, and what the ranks told of them.

The ranks run `interrupted_runs.py`, on ZeRO-3.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests import launch, tiny
from tests.e2e.many_runs import Outcome, launch_all

STEPS = 6
BEYOND = 3e38
"""A weight with which a row's sum is beyond float32."""


@dataclass(frozen=True)
class Told:
    """What the ranks told of one run."""

    folder: Path
    outcome: Outcome

    @property
    def endings(self) -> tuple[dict[str, Any], ...]:
        return self.outcome.check().results

    @property
    def hows(self) -> list[str]:
        return [ending["how"] for ending in self.endings]

    def lines(self, kind: str) -> list[dict[str, Any]]:
        lines = [json.loads(line) for line in (self.folder / "metrics.jsonl").read_text().splitlines()]
        return [line for line in lines if line["kind"] == kind]

    @property
    def losses(self) -> dict[int, tuple[float, float]]:
        return {line["step"]: (line["loss"], line["grad_norm"]) for line in self.lines("step")}

    def checkpoints(self) -> list[int]:
        return sorted(int(path.name[5:]) for path in (self.folder / "checkpoints").glob("step-*[0-9]"))


class Launch:
    """Collects runs, starts them all at once."""

    def __init__(self, workshop: tiny.Workshop) -> None:
        self.workshop = workshop
        self.requests: list[dict[str, Any]] = []
        self.names: dict[str, tuple[Path, int]] = {}

    def add(self, name: str, folder: str, disturb: dict[str, Any] | None = None, **changes: Any) -> None:
        """A run in `folder`; `changes` as for `Workshop.config`."""
        schedule = {"num_epochs": 9, "max_steps": STEPS, "global_batch_size": 5, "scheduler_type": "constant"}
        run = self.workshop.folder / folder
        settings = {"training__schedule": schedule, "output__dir": str(run), **changes}
        path = self.workshop.write(name, self.workshop.config(**settings))
        zero3 = str(launch.DS_CONFIGS / "zero3.json")
        if disturb and "touch" in disturb:
            disturb = {**disturb, "touch": str(run / disturb["touch"])}
        self.names[name] = (run, len(self.requests))
        self.requests.append({"config": str(path), "deepspeed": zero3, "set": [], "disturb": disturb})

    def start(self) -> dict[str, Told]:
        """By name, what was told of each run."""
        script, folder = "tests/e2e/interrupted_runs.py", self.workshop.folder / "launches"
        outcomes = launch_all(self.requests, ranks=2, folder=folder, script=script)
        return {name: Told(folder, outcomes[place]) for name, (folder, place) in self.names.items()}


def weighted_rows(workshop: tiny.Workshop, name: str, *, place: int, weight: float) -> Path:
    """The workshop's rows as a file of its own, the one at `place` (from 0) with a weight."""
    rows = [json.loads(line) for line in workshop.rows.read_text().splitlines()]
    path = workshop.folder / "rows" / name / "rows.jsonl"
    path.parent.mkdir(parents=True)
    lines = [json.dumps({**row, "weight": weight if at == place else 1.0}) for at, row in enumerate(rows)]
    path.write_text("\n".join(lines) + "\n")
    return path
