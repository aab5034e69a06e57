"""Sequences of actions on ZeRO-3 engines, in one launch; every rank writes what each action returned.

Started with a JSON file: {"config": YAML file, "sequences": [{"set": [overrides], "deepspeed": ZeRO json, "folder": a
new one, "checkpoints": those of an undisturbed run, "start": step of one or 0, "actions": [names]}]}. Results lie
beside the file, in `results-<rank>.json`: per sequence a list of [action, step before it, returned value].
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from seqaware.config.loading import load_config
from seqaware.distributed.launch_environment import LaunchEnvironment
from seqaware.distributed.process_group import Ranks, connect
from tests.e2e.many_runs import do_each

LEARNING_RATE = 1e-2


@dataclass
class Subject:
    """One engine, and the actions on it. Every method is collective."""

    ranks: Ranks
    engine: Any
    prepared: Any
    batches: Any
    held_out: Any
    checkpoints: Any
    folder: Path
    source: Path
    step: int = 0

    @classmethod
    def of(cls, config: Path, wanted: dict[str, Any], ranks: Ranks) -> Subject:
        """A new engine, started as a run is: probed, then loaded."""
        from seqaware.checkpoint.checkpointer import Checkpoints
        from seqaware.checkpoint.retention import Retention
        from seqaware.data.batch_loader import StepBatches
        from seqaware.evaluation.evaluator import Evaluator
        from seqaware.training.assembly import build_engine, model_source, row_format, world_of
        from seqaware.training.launch import _probe
        from seqaware.training.prepare import prepare
        from seqaware.training.run_directory import RunDirectory

        settings, zero = load_config(config, wanted["set"]), Path(wanted["deepspeed"])
        prepared = prepare(settings, world=world_of(ranks.address), deepspeed_path=zero, progress=None)
        folder = RunDirectory(Path(wanted["folder"]))
        folder.path.mkdir(parents=True, exist_ok=True)
        engine = build_engine(prepared, model_source(prepared, folder), ranks=ranks, say=_silent)
        _probe(engine, prepared.plan, say=_silent)
        rows = row_format(prepared.plan, prepared)
        batches = StepBatches(prepared.store, prepared.order, rows=rows, rank=ranks.rank, size=ranks.size)
        held_out = Evaluator.of(prepared, engine, rows=rows)
        checkpoints = Checkpoints(engine, folder.checkpoints, keep=Retention(keep_last=99))
        subject = cls(ranks, engine, prepared, batches, held_out, checkpoints, folder.path, Path(wanted["checkpoints"]))
        if wanted["start"]:
            subject.go_back(wanted["start"])
        return subject

    def go_back(self, step: int = 1) -> None:
        from seqaware.checkpoint.manifest import checkpoint_name, read_listing
        from seqaware.checkpoint.restore import load_checkpoint

        load_checkpoint(self.engine, read_listing(self.source / checkpoint_name(step)))
        self.step = step

    def train(self) -> list[float]:
        self.step += 1
        result = self.engine.train_step(self.batches.of_step(self.step), learning_rate=LEARNING_RATE)
        assert result.applied
        return [float(result.sums["weighted_loss"]), float(result.grad_norm)]

    def evaluate(self) -> Any:
        return self.held_out.loss(leaving=lambda: False)

    def generate(self) -> list[str | None]:
        return [answer.generated for answer in self.held_out.answers(leaving=lambda: False)]

    def export(self) -> str:
        from seqaware.checkpoint.engine_export import export_model

        folder, lora = self.folder / "model", self.prepared.plan.config.lora
        export_model(self.engine, folder, tokenizer=self.prepared.inference, lora=lora)
        return hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()

    def save(self) -> None:
        from seqaware.checkpoint.manifest import RunState

        self.checkpoints.save(RunState.of(self.prepared.plan, step=self.step, epoch=0))


def _silent(text: str) -> None:
    del text


_connect = cache(connect)


def _act(wanted: dict[str, Any], address: LaunchEnvironment) -> list[list[Any]]:
    subject = Subject.of(Path(wanted["config"]), wanted, _connect(address))
    found: list[list[Any]] = []
    for name in wanted["actions"]:
        before = subject.step
        try:
            found.append([name, before, getattr(subject, name)()])
        except RuntimeError as error:  # on every rank, or the launch would hang and fail
            found.append([name, before, f"{type(error).__name__}: {error}"])
            break
    return found


if __name__ == "__main__":
    do_each(_act)
