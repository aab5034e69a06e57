"""What figures were taken on: every file of results says so in the same words."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
from pathlib import Path
from typing import Any

PACKAGES = [
    "torch",
    "triton",
    "deepspeed",
    "transformers",
    "accelerate",
    "datasets",
    "tokenizers",
    "trl",
    "liger-kernel",
    "cut-cross-entropy",
    "flash-attn",
    "numpy",
    "numba",
]


def machine(device: str = "cpu") -> dict[str, Any]:
    """This machine, today.

    Args:
        device: cpu or cuda, whichever the figures are of.
    """
    named: dict[str, Any] = {
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
    }
    named |= _gpu() if device == "cuda" else {"cpu": _processor(), "cores": len(os.sched_getaffinity(0))}
    named["versions"] = {name: version for name in PACKAGES if (version := installed(name)) is not None}
    return named


def installed(package: str) -> str | None:
    """Its version; None where it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    models = {line.partition(":")[2].strip() for line in lines if line.startswith("model name")}
    return ", ".join(sorted(models)) or platform.machine()


def _gpu() -> dict[str, Any]:
    import torch

    properties = torch.cuda.get_device_properties(0)
    return {
        "gpu": properties.name,
        "memory_gib": round(properties.total_memory / 2**30, 1),
        "capability": f"{properties.major}.{properties.minor}",
        "cuda": torch.version.cuda,
    }
