"""Checkpoints: written aside, made durable, renamed, and only then called the latest.

    checkpoints/step-00000120/           what DeepSpeed writes, rng-<rank>.pt, and seqaware.json, written last
    checkpoints/latest                   the name of the newest complete one

A folder without a `seqaware.json` whose sizes agree with the files is not a checkpoint, whatever its name.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial as partial_call
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from seqaware.config.schema import LoraConfig
from seqaware.data.store_writer import sync_to_disk
from seqaware.engine.engine import Engine
from seqaware.engine.ranks import Ranks
from seqaware.errors import CheckpointError

MANIFEST = "seqaware.json"
_LATEST = "latest"


@dataclass(frozen=True)
class RunState:
    """Where a run stands after an optimizer step: enough to go on, because a step's examples follow from its number."""

    step: int
    epoch: int
    data_fingerprint: str
    mathematics: Mapping[str, Any]


def save_checkpoint(engine: Engine, folder: Path, *, state: RunState, keep_last: int) -> Path:
    """Write `folder`/step-N. Collective. Returns the checkpoint's folder.

    Raises:
        CheckpointError: it could not be written, on any rank; what was there before is untouched.
    """
    ranks = engine.ranks
    final = folder / f"step-{state.step:08d}"
    partial = folder / f"{final.name}.partial"
    _together(ranks, lambda: _make_empty(partial), on_first_only=True)
    _write_shards(engine, partial)

    def complete() -> None:
        _complete(partial, final, state, engine)
        _forget_old(folder, keep_last)

    _together(ranks, complete, on_first_only=True)
    return final


def _together(ranks: Ranks, action: Callable[[], None], *, on_first_only: bool) -> None:
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

    _together(engine.ranks, finish, on_first_only=False)


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
    write_durably(final.parent / _LATEST, final.name)


def set_aside_later(folder: Path, step: int) -> None:
    """Rename the checkpoints of later steps, when a run goes back to an earlier one: they are no part of it now."""
    for checkpoint in list(complete_checkpoints(folder)):
        if read_state(checkpoint).step > step:
            checkpoint.rename(folder / f"abandoned-{time.strftime('%Y%m%d-%H%M%S')}-{checkpoint.name}")


def _forget_old(folder: Path, keep_last: int) -> None:
    for old in list(complete_checkpoints(folder))[keep_last:]:
        shutil.rmtree(old)


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


def load_checkpoint(engine: Engine, checkpoint: Path) -> None:
    """Put model, optimizer and random state of `checkpoint` into the engine. Collective.

    Raises:
        CheckpointError: it was written by another number of ranks, or another ZeRO stage with files of another kind.
    """
    manifest = json.loads((checkpoint / MANIFEST).read_text())
    ranks, stage = manifest["world_size"], manifest["zero_stage"]
    same_kind = stage == engine.zero_stage or {stage, engine.zero_stage} == {1, 2}
    if ranks != engine.ranks.size or not same_kind:
        raise CheckpointError(
            "the checkpoint was written on another topology",
            got=f"{ranks} ranks with ZeRO-{stage} then, {engine.ranks.size} with ZeRO-{engine.zero_stage} now",
            do=f"resume on {ranks} ranks with ZeRO-{stage}",
        )
    path, _ = engine.deepspeed.load_checkpoint(
        str(checkpoint.parent), tag=checkpoint.name, load_module_strict=engine.wrapped.adapters is None
    )
    if path is None:
        raise CheckpointError("DeepSpeed could not read the checkpoint", got=checkpoint)
    rng = torch.load(checkpoint / f"rng-{engine.ranks.rank}.pt", weights_only=True)
    torch.set_rng_state(rng["cpu"])
    if "cuda" in rng and torch.cuda.is_available():
        torch.cuda.set_rng_state(rng["cuda"])


def _rng_state() -> dict[str, torch.Tensor]:
    state = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def export_model(
    engine: Engine, folder: Path, *, tokenizer: PreTrainedTokenizerBase, lora: LoraConfig | None = None
) -> None:
    """Write a Hugging Face folder of the trained model: safetensors, config, generation config, tokenizer. Collective.

    With adapters, `lora.export` says whether it is the whole model with the update added in, or the adapter alone.
    Under ZeRO-3 one parameter at a time is gathered; only rank 0 holds the whole, on the CPU.
    """
    adapters, first = engine.wrapped.adapters, engine.ranks.is_first
    write_weights: Callable[[Path, dict[str, torch.Tensor]], None]
    if adapters is None or lora is None:
        weights, write_weights = _whole_weights(engine), partial_call(_write_model, engine.wrapped.model)
    elif lora.export == "merged":
        weights, write_weights = adapters.merged_weights(keep=first), adapters.write_merged
    else:
        weights, write_weights = adapters.adapter_weights(keep=first), adapters.write_adapter

    def write() -> None:
        partial = folder.with_name(folder.name + ".partial")
        shutil.rmtree(partial, ignore_errors=True)
        write_weights(partial, weights)
        tokenizer.save_pretrained(partial)
        shutil.rmtree(folder, ignore_errors=True)
        partial.rename(folder)

    _together(engine.ranks, write, on_first_only=True)


def _write_model(model: PreTrainedModel, folder: Path, weights: dict[str, torch.Tensor]) -> None:
    weights |= {name: buffer.detach().cpu() for name, buffer in model.named_buffers() if name in model.state_dict()}
    model.config.use_cache = True
    model.save_pretrained(folder, state_dict=weights)
    model.config.use_cache = False


def _whole_weights(engine: Engine) -> dict[str, torch.Tensor]:
    """Every weight on the CPU of rank 0, and none elsewhere. Collective."""
    import deepspeed

    model = engine.wrapped.model
    weights: dict[str, torch.Tensor] = {}
    for name, parameter in model.named_parameters():
        with deepspeed.zero.GatheredParameters([parameter], enabled=hasattr(parameter, "ds_id")):
            if engine.ranks.is_first:
                weights[name] = parameter.detach().cpu().clone()
    return weights


def write_durably(path: Path, text: str) -> None:
    """Replace a small file so that a crash leaves the old one or the new one, never a torn one."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text, encoding="utf-8")
    sync_to_disk(partial)
    partial.replace(path)
    sync_to_disk(path.parent)
