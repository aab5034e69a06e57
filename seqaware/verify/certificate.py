"""The verdict: as a table for a person, and as certificate.json in the run's folder."""

from __future__ import annotations

import json
import math
import platform
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from seqaware import __version__
from seqaware.checkpoint.manifest import write_durably
from seqaware.distributed.launch_environment import LaunchEnvironment
from seqaware.engine.versions import git_revision, versions
from seqaware.plan.plan import Plan
from seqaware.training.run_directory import RunDirectory
from seqaware.verify.items import Item

HOLDS, FALLS_SHORT = "holds", "falls short"


@dataclass(frozen=True)
class Certificate:
    """What was compared and how it came out.

    Attributes:
        first_parameter: the first in the order of the model whose gradient differs, in the first step where one does.
        steps: the optimizer steps that were run. oracle: its dtype and device.
    """

    items: tuple[Item, ...]
    first_parameter: str | None
    steps: tuple[int, ...]
    oracle: str

    @property
    def holds(self) -> bool:
        return all(item.holds for item in self.items)

    @property
    def verdict(self) -> str:
        return HOLDS if self.holds else FALLS_SHORT

    def write(self, folder: RunDirectory, plan: Plan, *, address: LaunchEnvironment) -> Path:
        """certificate.json, whole or not at all; the folder is not claimed by it. Rank 0 alone calls it."""
        folder.path.mkdir(parents=True, exist_ok=True)
        content = {
            "verdict": self.verdict,
            "first_parameter_that_differs": self.first_parameter,
            "made": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            "steps": list(self.steps),
            "oracle": self.oracle,
            "items": [_as_json(item) for item in self.items],
            "mathematics_hash": plan.mathematics_hash(),
            "topology": {"ranks": address.size, "nodes": address.nodes, "launcher": address.launcher},
            "seqaware": __version__,
            "git_revision": git_revision(),
            "versions": versions(),
            "host": _host(),
            "plan": plan.to_json(),
        }
        write_durably(folder.certificate, json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False))
        return folder.certificate


def table(items: Sequence[Item]) -> list[str]:
    """One line an item, of several steps the worst: error expected at most, error seen, verdict, what it is about."""
    by_name: dict[str, list[Item]] = {}
    for item in items:
        by_name.setdefault(item.name, []).append(item)
    width = max(map(len, by_name))
    lines = [f"{'item':<{width}}  {'expected':>9}  {'seen':>9}  {'verdict':<11}  about"]
    for name, group in by_name.items():
        item = max(group, key=lambda each: each.strain)
        step = f"step {item.step}: " if item.step is not None else ""
        verdict = HOLDS if item.holds else FALLS_SHORT.upper()
        expected = f"≤ {item.explained:.1e}" if item.explained else "equal"
        seen = f"{item.seen:.1e}" if item.seen else "equal"
        lines.append(f"{name:<{width}}  {expected:>9}  {seen:>9}  {verdict:<11}  {step}{item.note}".rstrip())
    return lines


def _as_json(item: Item) -> dict[str, Any]:
    # JSON has no infinity and no NaN.
    seen = item.seen if math.isfinite(item.seen) else str(item.seen)
    verdict = HOLDS if item.holds else FALLS_SHORT
    step = {} if item.step is None else {"step": item.step}
    return {"item": item.name, **step, "expected": item.explained, "seen": seen, "verdict": verdict, "note": item.note}


def _host() -> dict[str, Any]:
    cuda = torch.cuda.is_available()
    return {
        "name": platform.node(),
        "system": platform.platform(),
        "processor": _processor(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if cuda else None,
        "gpus": torch.cuda.device_count() if cuda else 0,
        "cuda": torch.version.cuda,
    }


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())
