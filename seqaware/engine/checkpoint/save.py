"""Checkpoints: written aside, made durable, renamed, and only then called the latest."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from seqaware.data.store_writer import sync_to_disk
from seqaware.engine.checkpoint.manifest import LATEST, MANIFEST, RunState, complete_checkpoints, write_durably
from seqaware.engine.engine import Engine
from seqaware.engine.ranks import Ranks
from seqaware.errors import CheckpointError


def save_checkpoint(engine: Engine, folder: Path, *, state: RunState, keep_last: int) -> Path:
    """Write `folder`/step-N. Collective. Returns the checkpoint's folder.

    Raises:
        CheckpointError: it could not be written, on any rank; what was there before is untouched.
    """
    ranks = engine.ranks
    final = folder / f"step-{state.step:08d}"
    partial = folder / f"{final.name}.partial"
    together(ranks, lambda: _make_empty(partial), on_first_only=True)
    _write_shards(engine, partial)

    def complete() -> None:
        _complete(partial, final, state, engine)
        _forget_old(folder, keep_last)

    together(ranks, complete, on_first_only=True)
    return final


def together(ranks: Ranks, action: Callable[[], None], *, on_first_only: bool) -> None:
    """Do something that may fail on one rank, and let all ranks know: none is left waiting for it.

    Raises:
        CheckpointError: on every rank, with the first problem.
    """
    problem = None
    if ranks.is_first or not on_first_only:
        try:
            action()
        except (OSError, RuntimeError) as error:
            problem = f"rank {ranks.rank}: {error}"
    problems = [text for text in ranks.gather(problem) if text]
    if problems:
        raise CheckpointError(
            "the model's state could not be written",
            got=problems[0],
            do="see to the disk's space and rights, and rerun",
        )


def _make_empty(partial: Path) -> None:
    for stale in partial.parent.glob("*.partial"):
        shutil.rmtree(stale, ignore_errors=True)
    partial.mkdir(parents=True)


class _GuardedWriter:
    """DeepSpeed's checkpoint writer, which keeps an error for later instead of raising it.

    DeepSpeed meets at a barrier after every rank has written. A rank that raised would never come to it, and the others
    would wait for the collective's timeout.
    """

    def __init__(self, writer: Any) -> None:
        self._writer = writer
        self.problem: Exception | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._writer, name)

    def save(self, *arguments: Any, **options: Any) -> Any:
        try:
            return self._writer.save(*arguments, **options)
        except (OSError, RuntimeError) as error:
            self.problem = error


def _write_shards(engine: Engine, partial: Path) -> None:
    writer = engine.deepspeed.checkpoint_engine
    guard = _GuardedWriter(writer)
    engine.deepspeed.checkpoint_engine = guard
    try:
        engine.deepspeed.save_checkpoint(
            str(partial.parent),
            tag=partial.name,
            client_state={},
            save_latest=False,
            # The weights that adapters leave alone are in the base model already.
            exclude_frozen_parameters=engine.wrapped.adapters is not None,
        )
    finally:
        engine.deepspeed.checkpoint_engine = writer

    def finish() -> None:
        if guard.problem is not None:
            raise RuntimeError(str(guard.problem)) from guard.problem
        torch.save(_rng_state(), partial / f"rng-{engine.ranks.rank}.pt")

    together(engine.ranks, finish, on_first_only=False)


def _complete(partial: Path, final: Path, state: RunState, engine: Engine) -> None:
    files = {
        str(path.relative_to(partial)): path.stat().st_size for path in sorted(partial.rglob("*")) if path.is_file()
    }
    manifest = {
        "step": state.step,
        "epoch": state.epoch,
        "data_fingerprint": state.data_fingerprint,
        "mathematics": dict(state.mathematics),
        "world_size": engine.ranks.size,
        "zero_stage": engine.zero_stage,
        "files": files,
    }
    for name in files:
        sync_to_disk(partial / name)
    write_durably(partial / MANIFEST, json.dumps(manifest, indent=1))
    if final.exists():
        shutil.rmtree(final)
    partial.rename(final)
    sync_to_disk(final.parent)
    write_durably(final.parent / LATEST, final.name)


def _forget_old(folder: Path, keep_last: int) -> None:
    for old in list(complete_checkpoints(folder))[keep_last:]:
        shutil.rmtree(old)


def _rng_state() -> dict[str, torch.Tensor]:
    state = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state
