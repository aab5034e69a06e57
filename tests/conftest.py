"""Tests in several lanes (`make test`): those that take longest come first, and none has a deadline."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import settings

# Beside other tests an example may take any time; none of them is about speed.
settings.register_profile("lanes", deadline=None)
settings.load_profile("lanes")

# A lane that comes to its last file when the others are done goes on alone. Unit tests, of seconds a file, fill up the
# rest. test_zero_range compiles operators of DeepSpeed.
LONG = (
    "e2e/test_zero_range.py",
    "e2e/test_killed_ranks.py",
    "cluster/test_slurm_scripts.py",
    "e2e/test_same_training.py",
    "cluster/test_slurm.py",
    "cluster/test_launchers.py",
    "e2e/test_capabilities.py",
    "e2e/test_verify.py",
    "e2e/test_resume.py",
    "e2e/test_interrupted.py",
)
FOLDERS = ("e2e", "cluster", "fuzz", "unit", "gpu")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Only in lanes: one after the other, the quick ones tell most for the wait."""
    if hasattr(config, "workerinput"):
        items.sort(key=lambda item: _place(item.path.relative_to(Path(__file__).parent)))


def _place(path: Path) -> tuple[int, int]:
    long = LONG.index(path.as_posix()) if path.as_posix() in LONG else len(LONG)
    return long, FOLDERS.index(path.parts[0])
