"""The folder a run leaves: claimed before any work, never shared with another run.

config.yaml    the resolved config          metrics.jsonl   one line an optimizer step or evaluation
plan.json      every derived number         checkpoints/    what a rerun resumes from
manifest.json  what made the run            model/          the trained model, for transformers
certificate.json   what launcher/verify.py found, before or after the run
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import tempfile
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from filelock import FileLock, Timeout

from seqaware import __version__
from seqaware.engine.address import RankAddress
from seqaware.engine.checkpoint.manifest import read_state, step_of, survey, write_durably
from seqaware.engine.versions import git_revision, versions
from seqaware.errors import CheckpointError, ConfigError
from seqaware.plan.plan import Plan

# What a run, or its verification, makes before the folder is claimed: with nothing else in it, the folder is free.
_BEFORE_THE_CLAIM = (
    "initial",
    "initial.lock",
    "initial.partial",
    "certificate.json",
    "certificate.json.partial",
    ".lock",
    ".lock.owner",
)
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

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keep other runs out. Rank 0 holds it for as long as it works; whatever ends the process frees it.

        Raises:
            ConfigError: another run is at work in the folder.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        owner = self.path / ".lock.owner"
        lock = FileLock(self.path / ".lock", timeout=0)
        try:
            lock.acquire()
        except Timeout as error:
            by = owner.read_text().strip() if owner.is_file() else "another process"
            raise ConfigError(
                "another run is at work in output.dir",
                got=f"{self.path}, held by {by}",
                do="wait for it, end it, or choose another output.dir",
            ) from error
        try:
            since = time.strftime("%Y-%m-%d %H:%M:%S %z")
            owner.write_text(f"pid {os.getpid()} on {socket.gethostname()} since {since}")
            yield
        finally:
            owner.unlink(missing_ok=True)
            lock.release()


def check_claim(folder: RunFolder, plan: Plan, *, resume: str, anyway: Collection[str] = ()) -> None:
    """Refuse a folder that holds something else. Changes nothing.

    Args:
        resume: "auto" goes on with the same run, "never" wants an empty folder, anything else is a checkpoint's path.
        anyway: names of `Plan.mathematics()` that may have changed.

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
    if not folder.metrics.exists() and not survey(folder.checkpoints).whole:
        return  # claimed by a run that stopped before its first step: nothing is lost
    differences = changed(json.loads(folder.manifest.read_text())["mathematics"], plan.mathematics(), anyway)
    if differences:
        raise ConfigError(
            "output.dir holds another run",
            got=f"{path}, where {_listed(differences)}",
            do=f"choose another output.dir, go back to that run's config, or {_how_to_go_on(differences)}",
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


@dataclass(frozen=True)
class ResumePoints:
    """Checkpoints that a run may go on from, best first, and damaged ones that are passed over.

    Attributes:
        candidates: whole by their manifests and sizes; their hashes are yet to be checked. asked: a person named it.
        damaged: what is wrong with newer ones, a line each.
    """

    candidates: tuple[Path, ...]
    damaged: tuple[str, ...]
    asked: bool


def resume_points(folder: RunFolder, plan: Plan, *, resume: str, anyway: Collection[str] = ()) -> ResumePoints:
    """Where a run may go on; no candidates for a fresh start. Looks at manifests and sizes only.

    Args:
        anyway: names of `Plan.mathematics()` that may have changed.

    Raises:
        CheckpointError: one is torn that was asked for, of another run, or later than this run's end.
    """
    if resume == "never":
        return ResumePoints((), (), asked=False)
    if resume == "auto":
        found = survey(folder.checkpoints)
        newest = step_of(found.whole[0]) if found.whole else -1
        damaged = tuple(f"{each.path}: {each.problem}" for each in found.damaged if step_of(each.path) > newest)
        candidates, asked = found.whole, False
    else:
        candidates, damaged, asked = (Path(resume),), (), True
    for checkpoint in candidates[:1]:
        _check_checkpoint(checkpoint, plan, anyway)
    return ResumePoints(candidates, damaged, asked)


def _check_checkpoint(checkpoint: Path, plan: Plan, anyway: Collection[str]) -> None:
    state = read_state(checkpoint)
    differences = changed(state.mathematics, plan.mathematics(), anyway)
    if differences:
        raise CheckpointError(
            "the checkpoint belongs to another run", got=_listed(differences), do=_how_to_go_on(differences)
        )
    if plan.total_steps is not None and state.step > plan.total_steps:
        raise CheckpointError(
            "the checkpoint is later than the end of this run",
            got=f"{checkpoint} at step {state.step}, and the run has {plan.total_steps} steps",
            do="name an earlier one with --resume, or raise training.schedule.max_steps",
        )


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


def claim(folder: RunFolder, plan: Plan, *, address: RankAddress, anyway: Sequence[str] = ()) -> int:
    """Write config.yaml, plan.json and manifest.json. Rank 0 alone calls it. Returns the number of this attempt.

    Args:
        anyway: names of `Plan.mathematics()` that may have changed; the attempt tells it.
    """
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
            **({"resumed_anyway": list(anyway)} if anyway else {}),
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
    return len(attempts)


def _as_json(value: Mapping[str, Any]) -> dict[str, Any]:
    # As it reads back from a file: tuples become lists.
    as_read: dict[str, Any] = json.loads(json.dumps(value))
    return as_read


def changed(before: Mapping[str, Any], now: Mapping[str, Any], anyway: Collection[str]) -> dict[str, str]:
    """What has changed in the mathematics of a run, by its top names, but for those in `anyway`.

    Raises:
        ConfigError: a name in `anyway` is none of the mathematics.
    """
    now = _as_json(now)
    unknown = [name for name in anyway if name not in {*before, *now}]
    if unknown:
        raise ConfigError(
            "--resume-anyway names nothing that a run is made of",
            got=", ".join(unknown),
            do=f"the names are {', '.join(sorted({*before, *now}))}",
        )
    names = [name for name in sorted({*before, *now}) if name not in anyway and before.get(name) != now.get(name)]
    return {name: _difference(before.get(name), now.get(name), name) for name in names}


def _difference(old: Any, new: Any, name: str) -> str:
    if isinstance(old, dict) and isinstance(new, dict):
        inner = [each for each in sorted({*old, *new}) if old.get(each) != new.get(each)]
        return ", ".join(_difference(old.get(each), new.get(each), f"{name}.{each}") for each in inner)
    return f"{name} was {json.dumps(old)} and is now {json.dumps(new)}"


def _listed(differences: Mapping[str, str]) -> str:
    return "; ".join(differences.values())


def _how_to_go_on(differences: Mapping[str, str]) -> str:
    return f"to go on all the same write {' '.join(f'--resume-anyway {name}' for name in differences)}"
