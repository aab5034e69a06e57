"""A checkpoint's folder as anybody may read it, without torch: what is in it, whether it is whole, where its run stood.

    checkpoints/step-00000120/           what DeepSpeed writes, rng-<rank>.pt, and seqaware.json, written last
    checkpoints/latest                   the name of the newest complete one

A folder without a `seqaware.json` whose sizes agree with the files is not a checkpoint, whatever its name.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from seqaware.data.store_writer import sync_to_disk
from seqaware.errors import CheckpointError

MANIFEST = "seqaware.json"
LATEST = "latest"


@dataclass(frozen=True)
class RunState:
    """Where a run stands after an optimizer step: enough to go on, because a step's examples follow from its number."""

    step: int
    epoch: int
    data_fingerprint: str
    mathematics: Mapping[str, Any]


def set_aside_later(folder: Path, step: int) -> None:
    """Rename the checkpoints of later steps, when a run goes back to an earlier one: they are no part of it now."""
    for checkpoint in list(complete_checkpoints(folder)):
        if read_state(checkpoint).step > step:
            checkpoint.rename(folder / f"abandoned-{time.strftime('%Y%m%d-%H%M%S')}-{checkpoint.name}")


def complete_checkpoints(folder: Path) -> Iterator[Path]:
    """The complete checkpoints under `folder`, newest first."""
    for candidate in sorted(folder.glob("step-*"), reverse=True):
        if candidate.suffix != ".partial" and is_complete(candidate):
            yield candidate


def is_complete(checkpoint: Path) -> bool:
    """Whether the manifest is there and every file it lists has its size."""
    try:
        files = json.loads((checkpoint / MANIFEST).read_text())["files"]
        return all((checkpoint / name).stat().st_size == size for name, size in files.items())
    except (OSError, ValueError, KeyError):
        return False


def read_state(checkpoint: Path) -> RunState:
    """The run's state in a complete checkpoint."""
    if not is_complete(checkpoint):
        raise CheckpointError("not a complete checkpoint", got=checkpoint, do="name another, or write --resume auto")
    manifest = json.loads((checkpoint / MANIFEST).read_text())
    return RunState(manifest["step"], manifest["epoch"], manifest["data_fingerprint"], manifest["mathematics"])


def write_durably(path: Path, text: str) -> None:
    """Replace a small file so that a crash leaves the old one or the new one, never a torn one."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text, encoding="utf-8")
    sync_to_disk(partial)
    partial.replace(path)
    sync_to_disk(path.parent)
