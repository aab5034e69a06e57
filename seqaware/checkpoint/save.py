"""The parts of saving: a folder to write into, the manifest, and the step from a partial folder to a checkpoint."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from seqaware.checkpoint.manifest import LATEST, MANIFEST, RunState, sealed, write_durably
from seqaware.checkpoint.retention import sweep
from seqaware.checkpoint.writer import Vote, vote_path
from seqaware.data.file_records import FileRecord, inside
from seqaware.data.store.store_writer import sync_to_disk
from seqaware.engine.engine import Engine
from seqaware.engine.versions import versions
from seqaware.errors import CheckpointError


def make_empty(partial: Path) -> None:
    """A new folder to write into; what earlier attempts have left goes.

    Raises:
        OSError: no rights, no space, or the run's own folder is gone (it is not made again: what is mounted there is).
    """
    partial.parent.mkdir(exist_ok=True)
    sweep(partial.parent)
    partial.mkdir()


def describe(state: RunState, engine: Engine) -> dict[str, Any]:
    """The manifest of a checkpoint, but for its files.

    Of the learning rate nothing is kept: it follows from the step and `mathematics.schedule`.
    """
    return {
        "step": state.step,
        "epoch": state.epoch,
        "passed_over": list(state.passed_over),
        "data_fingerprint": state.data_fingerprint,
        "tokenizer": state.mathematics.get("tokenizer"),
        "objective": state.mathematics["objective"],
        "plan_hash": state.plan_hash,
        "mathematics": dict(state.mathematics),
        "topology": {
            "ranks": engine.ranks.size,
            "nodes": engine.ranks.address.nodes,
            "zero_stage": engine.zero_stage,
            "sequence": 1 if engine.sequence is None else engine.sequence.size,
        },
        "versions": versions(),
    }


def complete(partial: Path, final: Path, votes: Sequence[Vote], *, manifest: Mapping[str, Any]) -> int:
    """Make a checkpoint of a partial folder that all ranks have voted for. Rank 0 alone calls it.

    Returns:
        its bytes.

    Raises:
        CheckpointError: a rank vetoes, or its file does not lie here as it was written.
        OSError: the manifest cannot be written, or the folder cannot be renamed.
    """
    files = _agreed(partial, votes)
    for vote in votes:
        vote_path(partial, vote.rank).unlink(missing_ok=True)
    written = {name: asdict(record) for name, record in sorted(files.items())}
    # It also makes the folder's names durable.
    write_durably(partial / MANIFEST, json.dumps(sealed({**manifest, "files": written}), indent=1))
    if final.exists():
        final.rename(final.with_name(final.name + ".replaced"))
    partial.rename(final)
    sync_to_disk(final.parent)
    return sum(record.bytes for record in files.values())


def call_latest(final: Path) -> list[str]:
    """Let `latest` name a complete checkpoint; what went wrong. Only tools of others read it."""
    try:
        write_durably(final.parent / LATEST, final.name)
    except OSError as error:
        return [f"{final.parent / LATEST} could not be written: {error.strerror}"]
    return []


def _agreed(partial: Path, votes: Sequence[Vote]) -> dict[str, FileRecord]:
    """All ranks' files, each of which lies here in its size."""
    files: dict[str, FileRecord] = {}
    for vote in votes:
        if vote.problem is not None:
            raise CheckpointError(vote.problem)
        for name, record in vote.files.items():
            assert name not in files, f"two ranks wrote {name}"
            files[name] = record
            path = inside(partial, name, error=CheckpointError)
            size = path.stat().st_size if path.exists() else None
            if size != record.bytes:
                seen = "is not seen" if size is None else f"has {size:,} bytes instead of {record.bytes:,}"
                raise CheckpointError(f"{name} of rank {vote.rank} {seen} on rank 0; the hosts must share the folder")
    return files
