"""The folder a run leaves: claimed before any work, never shared with another run.

config.yaml    the resolved config          metrics.jsonl   one line an optimizer step or evaluation
plan.json      every derived number         checkpoints/    what a rerun resumes from
manifest.json  what made the run            model/          the trained model, for transformers
certificate.json   what launcher/verify.py found, before or after the run
"""

from __future__ import annotations

import json
import shutil
import tempfile
import time
from collections.abc import Collection
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from seqaware import __version__
from seqaware.checkpoint.manifest import RunState, survey, write_durably
from seqaware.data.file_records import Count, Text, first_problem
from seqaware.distributed.launch_environment import LaunchEnvironment
from seqaware.engine.versions import git_revision, versions
from seqaware.errors import ConfigError
from seqaware.estimate.disk import DiskUse
from seqaware.files import MalformedError, read_json
from seqaware.locks import lease_of
from seqaware.plan.plan import Plan, mathematics_hash
from seqaware.training.resume import ResumeRequest, changes, listed, resume_advice
from seqaware.training.run_lock import LOCK

# What a run, or its verification, makes before the folder is claimed: with nothing else in it, the folder is free.
_BEFORE_THE_CLAIM = (
    "initial",
    "initial.lock",
    "initial.partial",
    "certificate.json",
    "certificate.json.partial",
    "manifest.json.partial",
    LOCK,
    lease_of(Path("initial.lock")).lock_file,
    lease_of(Path(LOCK)).lock_file,
)


class _Attempt(BaseModel):
    """What a later attempt reads of an earlier one."""

    asked: dict[str, Any] | None = None


class _RunManifest(BaseModel):
    """What a rerun reads of manifest.json."""

    mathematics: dict[str, Any]
    attempts: list[_Attempt] = []
    goes_on_from: list[Text] = []
    finished_steps: Count | None = None


@dataclass(frozen=True)
class RunDirectory:
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


def check_claim(folder: RunDirectory, plan: Plan, *, resume: str, anyway: Collection[str] = ()) -> None:
    """Refuse a folder that holds something else. Changes nothing.

    Args:
        resume: "auto" resumes the same run, "never" requires an empty folder, anything else is a checkpoint's path. A
            path in this folder adopts a run that has lost its manifest.json.
        anyway: names of `Plan.mathematics()` that may have changed.

    Raises:
        ConfigError: the folder holds another run, or no run at all but other files, or cannot be written.
    """
    path = folder.path
    check_writable(path)
    if not path.exists() or not any(child.name not in _BEFORE_THE_CLAIM for child in path.iterdir()):
        return
    if not folder.manifest.is_file():
        return _check_adoption(folder, resume)
    if resume == "never":
        raise ConfigError("output.dir already holds a run", got=path, do="choose another output.dir, or --resume auto")
    if not folder.metrics.exists() and not survey(folder.checkpoints).whole:
        return  # claimed by a run that stopped before its first step: nothing is lost
    others = changes(_read_manifest(folder)["mathematics"], plan.mathematics())
    refused = {name: change for name, change in others.items() if name not in anyway}
    if refused:
        raise ConfigError(
            "output.dir holds another run",
            got=f"{path}, where {listed(refused)}",
            do=f"choose another output.dir, go back to that run's config, or {resume_advice(refused, plan)}",
        )


def _check_adoption(folder: RunDirectory, resume: str) -> None:
    """Refuse a folder without manifest.json, unless the user names one of its own valid checkpoints.

    Whether that checkpoint belongs to this config is checked where it is resumed from, as for every checkpoint.
    """
    path, valid = folder.path, survey(folder.checkpoints).whole
    if not valid:
        raise ConfigError("output.dir is not empty and holds no run", got=path, do="choose another output.dir")
    if resume not in ("auto", "never") and Path(resume).resolve() in [each.resolve() for each in valid]:
        return
    raise ConfigError(
        "output.dir has checkpoints but no manifest.json, so it is not known which run they belong to",
        got=f"{path} with valid checkpoints {', '.join(each.name for each in valid)}",
        do=f"adopt the newest with --resume {valid[0]}, or choose another output.dir",
    )


def check_writable(path: Path, *, name: str = "output.dir") -> None:
    """Refuse a folder in which, or as which, nothing can be written.

    Raises:
        ConfigError: it is a file, or files cannot be made where it is or would be.
    """
    existing = _nearest_existing(path)
    if not existing.is_dir():
        got = str(path) if existing == path else f"{path}, where {existing} is a file"
        raise ConfigError(f"{name} is not a folder", got=got, do=f"choose another {name}")
    try:
        # Tried, not asked: rights, read-only mounts and full disks all answer the same way.
        with tempfile.TemporaryFile(dir=existing):
            pass
    except OSError as error:
        got, do = f"{path} ({error.strerror})", f"choose another {name}, or mend its rights"
        raise ConfigError(f"{name} cannot be written", got=got, do=do) from error


def _nearest_existing(path: Path) -> Path:
    return next(parent for parent in (path, *path.absolute().parents) if parent.exists())


def check_disk(path: Path, plan: Plan, parameters: int, *, trained: int) -> None:
    """Refuse to start a run whose results cannot fit on the disk.

    Args:
        parameters: number of weights of the model. trained: of those that are trained, which checkpoints hold.

    Raises:
        ConfigError: less is free than the model folder and the kept checkpoints need.
    """
    saved = len(survey(path / "checkpoints").whole)
    needed = DiskUse.of(plan, parameters=parameters, trained=trained).total(saved=saved)
    existing = _nearest_existing(path)
    free = shutil.disk_usage(existing).free
    if needed > free:
        raise ConfigError(
            "not enough disk space for the model and its checkpoints",
            got=f"{free / 1e9:.2f} GB free at {existing}, about {needed / 1e9:.2f} GB needed",
            do="free some space, choose another output.dir, or keep fewer (output.keep_last, keep_every, keep_best)",
        )


def is_finished(folder: RunDirectory, plan: Plan) -> bool:
    """Whether the run's last step, export and evaluation are all done, as `finish` has noted."""
    manifest = _read_manifest(folder)
    return bool(manifest.get("finished_steps") == plan.total_steps)


def finish(folder: RunDirectory, plan: Plan, *, card: str) -> None:
    """Note that the run is complete, and put the card beside the model. Rank 0 alone calls it."""
    if plan.config.output.save_model:
        write_durably(folder.model / "README.md", card)
    manifest = _read_manifest(folder)
    manifest["finished_steps"] = plan.total_steps
    write_durably(folder.manifest, json.dumps(manifest, indent=1))


def claim(
    folder: RunDirectory,
    plan: Plan,
    *,
    address: LaunchEnvironment,
    resumed: RunState | None = None,
    asked: ResumeRequest | None = None,
) -> int:
    """Write config.yaml, plan.json and manifest.json. Rank 0 alone calls it. Returns the number of this attempt.

    Args:
        resumed: the state it goes on from. Where the run was another one before, the attempt tells what has changed.
        asked: what the command says of it; for the next attempt to know.
    """
    folder.path.mkdir(parents=True, exist_ok=True)
    before = _read_manifest(folder)
    attempt: dict[str, Any] = {
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "topology": {
            "ranks": address.size,
            "nodes": address.nodes,
            "launcher": address.launcher,
            "zero_stage": plan.zero_stage,
            "dtype": plan.dtype,
        },
    }
    if asked is not None:
        attempt["asked"] = asdict(asked)
    allowed = allowed_before(folder)
    if resumed is not None:
        attempt["from_step"] = resumed.step
        others = changes(before.get("mathematics", {}), plan.mathematics()) if before else {}
        others |= changes(resumed.mathematics, plan.mathematics())
        if others:
            attempt["resumed_anyway"] = {name: asdict(change) for name, change in others.items()}
            # Until this attempt has saved, the checkpoints are still those of the run as it was.
            allowed |= {resumed.plan_hash, *([mathematics_hash(before["mathematics"])] if before else [])}
    attempts = [*before.get("attempts", []), attempt]
    manifest = {
        "seqaware": __version__,
        "git_revision": git_revision(),
        "versions": versions(),
        "data_fingerprint": plan.data.fingerprint if plan.data else None,
        "objective": plan.config.training.sft.model_dump(mode="json", exclude_none=True),
        "mathematics": plan.mathematics(),
        "goes_on_from": sorted(allowed - {plan.mathematics_hash()}),
        "attempts": attempts,
    }
    # First: it is the claim. Ended after it, the run's rerun knows the folder for its own.
    write_durably(folder.manifest, json.dumps(manifest, indent=1))
    # Nulls are written too: leaving one out would bring back a default. The DeepSpeed file is the one that is used.
    config = {**plan.config.model_dump(mode="json"), "deepspeed": str(plan.deepspeed_path)}
    write_durably(folder.path / "config.yaml", yaml.safe_dump(config, sort_keys=False, allow_unicode=True))
    write_durably(folder.path / "plan.json", json.dumps(plan.to_json(), indent=1))
    return len(attempts)


def attempts_before(folder: RunDirectory) -> list[dict[str, Any]]:
    """What the manifest tells of the attempts so far, the first one first."""
    return list(_read_manifest(folder).get("attempts", []))


def allowed_before(folder: RunDirectory) -> set[str]:
    """Plan hashes that this run has gone on from, with a person's leave: checkpoints that bear them are its own."""
    return set(_read_manifest(folder).get("goes_on_from", []))


def _read_manifest(folder: RunDirectory) -> dict[str, Any]:
    """manifest.json; empty where there is none yet.

    Raises:
        ConfigError: it cannot be read, or is not what a run has written.
    """
    try:
        manifest: dict[str, Any] = read_json(folder.manifest)
        _RunManifest.model_validate(manifest)
    except (FileNotFoundError, NotADirectoryError):  # the second is what `check_claim` refuses
        return {}
    except (OSError, MalformedError) as error:
        raise _damaged(folder, str(error)) from error
    except ValidationError as error:
        raise _damaged(folder, first_problem(error)) from error
    return manifest


def _damaged(folder: RunDirectory, problem: str) -> ConfigError:
    whole = survey(folder.checkpoints).whole
    return ConfigError(
        "the run's manifest.json is damaged, so it cannot be told which run this is",
        got=f"{folder.manifest}: {problem}",
        do="choose another output.dir" + (f", and go on there with --resume {whole[0]}" if whole else ""),
    )
