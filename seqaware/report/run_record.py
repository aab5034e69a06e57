"""A run as its folder tells it, to whoever sees the folder: while the run goes on, after it, and if it broke off.

Nothing here needs torch, the machine of the run, or a folder that is whole. What cannot be read is a line in `notes`.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, Field, ValidationError

from seqaware import __version__
from seqaware.data.file_records import Count, Text, first_problem
from seqaware.errors import DataError
from seqaware.files import MalformedError, read_json
from seqaware.metrics.metrics_file import Amount, Share, read_metrics

Line = Mapping[str, Any]

# A run that has not written for so many of its own steps, and so many seconds, is called silent.
_SILENT_STEPS = 20.0
_SILENT_SECONDS = 120.0
_LONGEST_TEXT = 300
_WHERE = "runs lie in output.dir, else in runs/"

TROUBLES = {
    "skipped": "step {step} was passed over: its loss or gradient was not finite",
    "rewind": "the loss jumped; the run went back to step {step}",
    "save_failed": "the checkpoint of step {step} could not be written",
}
"""Kinds of lines that tell of what went wrong, and what each says."""


class _Objective(BaseModel):
    gamma: Share = 0.0
    weighting: Text = ""
    scale: Text = ""
    positions: Text = ""


class _Mathematics(BaseModel):
    objective: _Objective | None = None
    seed: int | str | None = None


class _Manifest(BaseModel):
    """What is read of manifest.json."""

    seqaware: Annotated[str, Field(strict=True, max_length=100)] | None = None
    git_revision: Text | None = None
    mathematics: _Mathematics | None = None
    attempts: list[dict[str, Any]] | None = None
    finished_steps: Count | None = None


class _Counts(BaseModel):
    total_steps: Count | None = None
    global_batch_size: Count | None = None
    documents: Count | None = None
    tokens: Count | None = None
    supervised_tokens: Count | None = None
    longest: Count | None = None
    size: Count | None = None


class _Optimizer(BaseModel):
    max_grad_norm: Amount = 0.0


class _Training(BaseModel):
    optimizer: _Optimizer | None = None


class _Config(BaseModel):
    training: _Training | None = None
    evaluation: dict[str, Any] | None = None


class _Plan(BaseModel):
    """What is read of plan.json."""

    config: _Config | None = None
    world: _Counts | None = None
    batches: _Counts | None = None
    data: _Counts | None = None
    mathematics: _Mathematics | None = None


class _Certificate(BaseModel):
    """What is read of certificate.json."""

    items: list[dict[str, Any]] | None = None


class _Results(BaseModel):
    """What an evaluation has left: shares by name, and other values."""


@dataclass(frozen=True)
class RunRecord:
    """What a run has left.

    Attributes:
        lines: of metrics.jsonl, in its order; non-finite figures are floats again.
        manifest, plan, certificate: as written, empty where they are missing. results: what evaluations of its models
            have left in evaluations/, by name. written: when the metrics last grew, seconds since 1970. notes: what
            could not be read, or is not known here.
    """

    path: Path
    lines: tuple[Line, ...]
    manifest: Mapping[str, Any]
    plan: Mapping[str, Any]
    certificate: Mapping[str, Any]
    results: Mapping[str, Mapping[str, Any]]
    written: float | None
    notes: tuple[str, ...]

    @property
    def name(self) -> str:
        return self.path.resolve().name

    @cached_property
    def steps(self) -> list[Line]:
        return [line for line in self.lines if line.get("kind") == "step" and _has(line, "step", "loss")]

    @cached_property
    def evaluations(self) -> list[Line]:
        wanted = ("step", "unweighted_loss")
        return [line for line in self.lines if line.get("kind") == "evaluation" and _has(line, *wanted)]

    @cached_property
    def troubles(self) -> list[Line]:
        """The lines that tell of what went wrong."""
        return [line for line in self.lines if line.get("kind") in TROUBLES]

    @property
    def mathematics(self) -> Mapping[str, Any]:
        return self.manifest.get("mathematics") or self.plan.get("mathematics") or {}

    @property
    def objective(self) -> Mapping[str, Any]:
        found: Mapping[str, Any] = self.mathematics.get("objective") or {}
        return found

    @property
    def config(self) -> Mapping[str, Any]:
        found: Mapping[str, Any] = self.plan.get("config") or {}
        return found

    @property
    def total_steps(self) -> int | None:
        total: int | None = (self.plan.get("batches") or {}).get("total_steps")
        return total

    @property
    def done(self) -> int:
        return int(self.steps[-1]["step"]) if self.steps else 0

    def state(self, now: float | None = None) -> str:
        """finished, left, running, silent for so long, or has not begun; as far as files can tell."""
        if self.manifest.get("finished_steps") is not None:
            return "finished"
        if self.lines and self.lines[-1].get("kind") == "left":
            return "left, and goes on with the same command"
        if self.written is None:
            return "has not begun to train"
        age = (time.time() if now is None else now) - self.written
        seconds = [float(line.get("step_seconds", 0.0)) for line in self.steps[-20:]]
        usual = sum(seconds) / len(seconds) if seconds else 0.0
        if age > max(_SILENT_SECONDS, _SILENT_STEPS * usual):
            return f"silent for {age / 60:.0f} min: hanging, ended, or saving"
        return "running"


def read_run(path: Path) -> RunRecord:
    """The run in a folder, as far as it can be read.

    Raises:
        DataError: there is no such folder, or it holds nothing of a run.
    """
    if not path.is_dir():
        raise DataError("there is no such run folder", got=path, do=_runs_beside(path))
    notes: list[str] = []
    manifest = _json(path / "manifest.json", _Manifest, notes)
    plan = _json(path / "plan.json", _Plan, notes)
    certificate = _json(path / "certificate.json", _Certificate, notes)
    found = sorted(path.glob("evaluations/*/results.json"))
    results = {file.parent.name: _json(file, _Results, notes) for file in found}
    metrics = path / "metrics.jsonl"
    lines = tuple(_lines(metrics, notes))
    if not lines and not manifest and not plan:
        raise DataError("the folder holds no run", got=path, do=_runs_inside(path) or "; ".join(notes) or _WHERE)
    if not manifest and not (path / "manifest.json").exists():
        notes.append("manifest.json is missing: the run may have broken off while it began")
    version = manifest.get("seqaware")
    if version is not None and _numbers(str(version)) > _numbers(__version__):
        notes.append(f"written by seqaware {version}, newer than this {__version__}: some of it may be unknown here")
    written = metrics.stat().st_mtime if metrics.is_file() else None
    return RunRecord(path, lines, manifest, plan, certificate, results, written, tuple(notes))


def _has(line: Line, *names: str) -> bool:
    return all(isinstance(line.get(name), int | float) for name in names)


def _json(path: Path, model: type[BaseModel], notes: list[str]) -> dict[str, Any]:
    """The content of a file, whose values the model checks; empty, with a note, where it is damaged."""
    try:
        content: dict[str, Any] = read_json(path)
        model.model_validate(content)
    except FileNotFoundError:
        return {}
    except (OSError, MalformedError) as error:
        notes.append(f"{path.name} cannot be read ({str(error)[:_LONGEST_TEXT]})")
        return {}
    except ValidationError as error:
        notes.append(f"{path.name} is not valid ({first_problem(error)})")
        return {}
    return content


def _lines(path: Path, notes: list[str]) -> Iterator[Line]:
    """The valid lines. The last may be torn, as a crash or a look in mid-write finds it."""
    lost: list[int] = []
    try:
        yield from read_metrics(path, lost=lost)
    except FileNotFoundError:
        return
    except OSError as error:
        notes.append(f"{path.name} cannot be read ({error.strerror})")
    if lost:
        notes.append(f"{path.name}: {len(lost)} lines cannot be read, the first of them line {lost[0]}")


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", version)[:3])


def _runs_inside(path: Path) -> str | None:
    inside = sorted(child.parent.name for child in path.glob("*/manifest.json"))
    return f"runs inside it are {', '.join(inside[:8])}" if inside else None


def _runs_beside(path: Path) -> str | None:
    beside = sorted(child.parent.name for child in path.parent.glob("*/manifest.json")) if path.parent.is_dir() else []
    return f"runs in {path.parent} are {', '.join(beside[:8])}" if beside else _WHERE
