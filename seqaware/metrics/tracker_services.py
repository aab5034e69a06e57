"""The services that trackers.py talks to, each opened where the run stands, and going on with the run it already has.

`trackers.json` in the run's folder keeps what a service calls the run, so that a resumed run goes on there.
"""

from __future__ import annotations

import json
import threading
import time
import uuid
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from seqaware.config.output_config import LoggingConfig
from seqaware.files import MalformedError, read_json
from seqaware.metrics.trackers import Opening, wandb_mode

_NAMES = "trackers.json"
_NAMES_FILE = TypeAdapter(dict[str, dict[str, str]])
_MLFLOW_PARAMS_AT_ONCE = 100
_MLFLOW_LONGEST = 500
# The services open in threads of their own.
_writing = threading.Lock()


@dataclass(frozen=True)
class TrackedRun:
    """What a service is told of a run.

    Attributes:
        folder: the run's. done: steps that it already has. config: as it is written into the folder.
    """

    folder: Path
    done: int
    config: Mapping[str, Any]


def openings(run: TrackedRun, logging: LoggingConfig, environment: Mapping[str, str]) -> dict[str, Opening]:
    """How each service that the config names is opened."""
    known: dict[str, Opening] = {
        "tensorboard": partial(TensorBoard, run),
        "wandb": partial(WeightsAndBiases, run, logging.project, wandb_mode(logging, environment)),
        "mlflow": partial(MLflow, run, logging.project, _mlflow_uri(run, logging, environment)),
    }
    return {name: known[name] for name in logging.trackers}


def _mlflow_uri(run: TrackedRun, logging: LoggingConfig, environment: Mapping[str, str]) -> str:
    beside = (run.folder.absolute().parent / "mlruns").as_uri()
    return logging.mlflow_uri or environment.get("MLFLOW_TRACKING_URI") or beside


class TensorBoard:
    """Event files in the run's folder: `tensorboard --logdir runs`."""

    def __init__(self, run: TrackedRun) -> None:
        from torch.utils.tensorboard.writer import SummaryWriter

        # Steps that are done again replace those that were told before.
        again = run.done + 1 if run.done else None
        self._writer: Any = SummaryWriter(str(run.folder / "tensorboard"), purge_step=again)

    def log(self, figures: Mapping[str, float], step: int) -> None:
        for name, value in figures.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


class WeightsAndBiases:
    """A run of W&B, online or as a folder that `wandb sync` sends later."""

    def __init__(self, run: TrackedRun, project: str, mode: Any) -> None:
        import wandb

        name = _kept(run.folder, "wandb") or {"id": uuid.uuid4().hex[:12]}
        _keep(run.folder, "wandb", name)
        self._run: Any = wandb.init(
            project=project,
            name=run.folder.name,
            id=name["id"],
            resume="allow",
            mode=mode,
            dir=str(run.folder),
            config=dict(run.config),
            settings=wandb.Settings(console="off", silent=True, disable_git=True, x_disable_stats=True),
        )
        # Its own count of calls would refuse a step that is told again after a resume.
        self._run.define_metric("*", step_metric="step")

    def log(self, figures: Mapping[str, float], step: int) -> None:
        self._run.log({"step": step, **figures})

    def close(self) -> None:
        self._run.finish()


class MLflow:
    """A run of an MLflow server, or of a folder."""

    def __init__(self, run: TrackedRun, project: str, uri: str) -> None:
        from mlflow import MlflowClient
        from mlflow.entities import Param

        self._client: Any = MlflowClient(uri)
        known = _kept(run.folder, "mlflow")
        if known is not None and known.get("project") == project:
            self._id = known["run_id"]
            self._client.update_run(self._id, status="RUNNING")
            return
        experiment = self._client.get_experiment_by_name(project)
        number = self._client.create_experiment(project) if experiment is None else experiment.experiment_id
        self._id = self._client.create_run(number, run_name=run.folder.name).info.run_id
        _keep(run.folder, "mlflow", {"run_id": self._id, "project": project})
        params = [Param(key, str(value)[:_MLFLOW_LONGEST]) for key, value in _flat(run.config)]
        for first in range(0, len(params), _MLFLOW_PARAMS_AT_ONCE):
            self._client.log_batch(self._id, params=params[first : first + _MLFLOW_PARAMS_AT_ONCE])

    def log(self, figures: Mapping[str, float], step: int) -> None:
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        self._client.log_batch(self._id, metrics=[Metric(name, value, now, step) for name, value in figures.items()])

    def close(self) -> None:
        self._client.set_terminated(self._id)


def _flat(values: Mapping[str, Any], above: str = "") -> Iterable[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{above}{key}.")
        else:
            yield f"{above}{key}", value


def _names(folder: Path) -> dict[str, dict[str, str]]:
    try:
        return _NAMES_FILE.validate_python(read_json(folder / _NAMES))
    except (OSError, MalformedError, ValidationError):
        return {}  # the run is then a new one for the services


def _kept(folder: Path, service: str) -> dict[str, str] | None:
    return _names(folder).get(service)


def _keep(folder: Path, service: str, name: dict[str, str]) -> None:
    with _writing:
        whole = folder / f"{_NAMES}.partial"
        whole.write_text(json.dumps({**_names(folder), service: name}, indent=1), encoding="utf-8")
        whole.replace(folder / _NAMES)
