"""The folder a run leaves: claimed before any work, never shared with another run.

config.yaml    the resolved config          metrics.jsonl   one line an optimizer step or evaluation
plan.json      every derived number         checkpoints/    what a rerun resumes from
manifest.json  what made the run            model/          the trained model, for transformers
certificate.json   what launcher/verify.py found, before or after the run
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import yaml

from seqaware import __version__
from seqaware.engine.address import RankAddress
from seqaware.engine.checkpoint.manifest import complete_checkpoints, read_state, write_durably
from seqaware.errors import CheckpointError, ConfigError
from seqaware.plan.plan import Plan

# What a run, or its verification, makes before the folder is claimed: with nothing else in it, the folder is free.
_BEFORE_THE_CLAIM = ("initial", "initial.lock", "initial.partial", "certificate.json", "certificate.json.partial")
_VERSIONS_OF = ("torch", "deepspeed", "transformers", "peft", "datasets", "numpy", "numba", "pydantic")
_BYTES_PER_PARAMETER_MODEL = 4
_BYTES_PER_PARAMETER_CHECKPOINT = 14  # bfloat16 weights, float32 master weights and two moments


@dataclass(frozen=True)
class RunFolder:
    """Paths of a run."""

    path: Path

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def model(self) -> Path:
        return self.path / "model"

    @property
    def initial(self) -> Path:
        return self.path / "initial"

    @property
    def answers(self) -> Path:
        return self.path / "answers.jsonl"

    @property
    def certificate(self) -> Path:
        return self.path / "certificate.json"

    @property
    def manifest(self) -> Path:
        return self.path / "manifest.json"


def check_claim(folder: RunFolder, plan: Plan, *, resume: str) -> None:
    """Refuse a folder that holds something else. Changes nothing.

    Args:
        resume: "auto" goes on with the same run, "never" wants an empty folder, anything else is a checkpoint's path.

    Raises:
        ConfigError: the folder holds another run, or no run at all but other files, or cannot be written.
    """
    path = folder.path
    _check_writable(path)
    if not path.exists() or not any(child.name not in _BEFORE_THE_CLAIM for child in path.iterdir()):
        return
    if not folder.manifest.is_file():
        raise ConfigError("output.dir is not empty and holds no run", got=path, do="choose another output.dir")
    if resume == "never":
        raise ConfigError("output.dir already holds a run", got=path, do="choose another output.dir, or --resume auto")
    if not folder.metrics.exists() and next(complete_checkpoints(folder.checkpoints), None) is None:
        return  # claimed by a run that stopped before its first step: nothing is lost
    before = json.loads(folder.manifest.read_text())["mathematics"]
    now = _as_json(plan.mathematics())
    if before != now:
        raise ConfigError(
            "output.dir holds another run",
            got=f"{path}, where {_difference(before, now)}",
            do="choose another output.dir, or go back to that run's config",
        )


def _check_writable(path: Path) -> None:
    existing = _nearest_existing(path)
    try:
        # Tried, not asked: rights, read-only mounts and full disks all answer the same way.
        with tempfile.TemporaryFile(dir=existing):
            pass
    except OSError as error:
        raise ConfigError(
            "output.dir cannot be written",
            got=f"{path} ({error.strerror})",
            do="choose another output.dir, or mend its rights",
        ) from error


def _nearest_existing(path: Path) -> Path:
    return next(parent for parent in (path, *path.absolute().parents) if parent.exists())


def check_disk(path: Path, plan: Plan, parameters: int, *, trained: int) -> None:
    """Refuse to start a run whose results cannot fit on the disk.

    Args:
        parameters: number of weights of the model. trained: of those that are trained, which checkpoints hold.

    Raises:
        ConfigError: less is free than the model folder and the kept checkpoints need.
    """
    output = plan.config.output
    checkpoints = (output.keep_last + 1) if output.save_every else 1
    initial = parameters if plan.config.model.from_scratch else 0
    lora = plan.config.lora
    exported = trained if lora is not None and lora.export == "adapter" else parameters
    models = _BYTES_PER_PARAMETER_MODEL * (initial + exported * output.save_model)
    needed = models + trained * _BYTES_PER_PARAMETER_CHECKPOINT * checkpoints
    existing = _nearest_existing(path)
    free = shutil.disk_usage(existing).free
    if needed > free:
        raise ConfigError(
            "not enough disk space for the model and its checkpoints",
            got=f"{free / 1e9:.2f} GB free at {existing}, about {needed / 1e9:.2f} GB needed",
            do="free some space, choose another output.dir, or lower output.keep_last",
        )


def resume_point(folder: RunFolder, plan: Plan, *, resume: str) -> tuple[Path | None, int]:
    """The checkpoint to go on from and its step; (None, 0) for a fresh start.

    Raises:
        CheckpointError: the one that was asked for is torn, of another run, or later than this run's end.
    """
    if resume == "auto":
        checkpoint = next(complete_checkpoints(folder.checkpoints), None)
    else:
        checkpoint = None if resume == "never" else Path(resume)
    if checkpoint is None:
        return None, 0
    state = read_state(checkpoint)
    now = _as_json(plan.mathematics())
    if dict(state.mathematics) != now:
        raise CheckpointError("the checkpoint belongs to another run", got=_difference(dict(state.mathematics), now))
    if plan.total_steps is not None and state.step > plan.total_steps:
        raise CheckpointError(
            "the checkpoint is later than the end of this run",
            got=f"{checkpoint} at step {state.step}, and the run has {plan.total_steps} steps",
            do="name an earlier one with --resume, or raise training.schedule.max_steps",
        )
    return checkpoint, state.step


def is_finished(folder: RunFolder, plan: Plan) -> bool:
    """Whether the run's last step, export and evaluation are all done, as `finish` has noted."""
    manifest = json.loads(folder.manifest.read_text())
    return bool(manifest.get("finished_steps") == plan.total_steps)


def finish(folder: RunFolder, plan: Plan, *, card: str) -> None:
    """Note that the run is complete, and put the card beside the model. Rank 0 alone calls it."""
    if plan.config.output.save_model:
        write_durably(folder.model / "README.md", card)
    manifest = json.loads(folder.manifest.read_text())
    manifest["finished_steps"] = plan.total_steps
    write_durably(folder.manifest, json.dumps(manifest, indent=1))


def claim(folder: RunFolder, plan: Plan, *, address: RankAddress) -> None:
    """Write config.yaml, plan.json and manifest.json. Rank 0 alone calls it."""
    folder.path.mkdir(parents=True, exist_ok=True)
    # Nulls are written too: leaving one out would bring back a default. The DeepSpeed file is the one that is used.
    config = {**plan.config.model_dump(mode="json"), "deepspeed": str(plan.deepspeed_path)}
    write_durably(folder.path / "config.yaml", yaml.safe_dump(config, sort_keys=False, allow_unicode=True))
    write_durably(folder.path / "plan.json", json.dumps(plan.to_json(), indent=1))
    attempts = json.loads(folder.manifest.read_text())["attempts"] if folder.manifest.is_file() else []
    attempts.append(
        {
            "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            "topology": {
                "ranks": address.size,
                "nodes": address.nodes,
                "launcher": address.launcher,
                "zero_stage": plan.zero_stage,
                "dtype": plan.dtype,
            },
        }
    )
    manifest = {
        "seqaware": __version__,
        "git_revision": git_revision(),
        "versions": versions(),
        "data_fingerprint": plan.data.fingerprint if plan.data else None,
        "objective": plan.config.training.sft.model_dump(mode="json", exclude_none=True),
        "mathematics": plan.mathematics(),
        "attempts": attempts,
    }
    write_durably(folder.manifest, json.dumps(manifest, indent=1))


def versions() -> dict[str, str]:
    """The versions of Python and of the libraries that decide what a run computes."""
    return {"python": sys.version.split()[0], **{name: metadata.version(name) for name in _VERSIONS_OF}}


def git_revision() -> str | None:
    """The revision of the source tree this package runs from, if it is one."""
    here = Path(__file__).parent
    answer = subprocess.run(["git", "-C", str(here), "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    return answer.stdout.strip() or None


def _as_json(value: Mapping[str, Any]) -> dict[str, Any]:
    # As it reads back from a file: tuples become lists.
    as_read: dict[str, Any] = json.loads(json.dumps(value))
    return as_read


def _difference(before: Mapping[str, Any], now: Mapping[str, Any], prefix: str = "") -> str:
    for name in sorted({*before, *now}):
        old, new = before.get(name), now.get(name)
        if isinstance(old, dict) and isinstance(new, dict) and old != new:
            return _difference(old, new, f"{prefix}{name}.")
        if old != new:
            return f"{prefix}{name} was {json.dumps(old)} and is now {json.dumps(new)}"
    raise AssertionError("no difference")
