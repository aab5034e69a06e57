"""TensorBoard, Weights & Biases and MLflow behind one face: a figure that was reported goes to each of them.

None of them may hold a run up or end it. Each has a thread and a queue of its own: what a service does not take in
time waits, what it refuses is told as a warning, and the training never knows. metrics.jsonl has every line anyway.
"""

from __future__ import annotations

import importlib.util
import netrc
import queue
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import urlsplit

from seqaware.config.output import LoggingConfig
from seqaware.errors import ConfigError
from seqaware.masking import masked

# The module that is imported, and the package that brings it.
_PACKAGES = {
    "tensorboard": ("tensorboard", "tensorboard"),
    "wandb": ("wandb", "wandb"),
    "mlflow": ("mlflow", "mlflow-skinny"),
}
_WAITING_LINES = 10_000
_SECONDS_TO_CLOSE = 60.0
# A run that was asked to leave is killed if it takes too long.
_SECONDS_TO_LEAVE = 5.0
_TRIES = 3
_SECONDS_BETWEEN_TRIES = 2.0


class Tracker(Protocol):
    """A service that keeps figures of runs. Everything may raise."""

    def log(self, figures: Mapping[str, float], step: int) -> None: ...

    def close(self) -> None: ...


Opening = Callable[[], Tracker]
Warn = Callable[[str], None]


def check_trackers(logging: LoggingConfig, environment: Mapping[str, str]) -> None:
    """Refuse trackers that cannot work, before anything else is done.

    Raises:
        ConfigError: a package is not installed, or W&B shall be reached and there is no key for it.
    """
    for name in logging.trackers:
        module, package = _PACKAGES[name]
        if importlib.util.find_spec(module) is None:
            raise ConfigError(
                f"logging.trackers names {name}, whose package is not installed",
                got=f"no module {module}",
                do=f"pip install {package}, or take {name} out of logging.trackers",
            )
    if "wandb" in logging.trackers and wandb_mode(logging, environment) == "online" and not _has_wandb_key(environment):
        raise ConfigError(
            "logging.trackers names wandb, and there is no key for it",
            got="no WANDB_API_KEY in the environment of rank 0",
            do="set it, run `wandb login`, or write logging.wandb_mode: offline",
        )


def wandb_mode(logging: LoggingConfig, environment: Mapping[str, str]) -> str:
    """online, offline or disabled: the config's, else the environment's, else online."""
    mode = logging.wandb_mode or environment.get("WANDB_MODE", "online")
    return {"dryrun": "offline", "run": "online"}.get(mode, mode)


def _has_wandb_key(environment: Mapping[str, str]) -> bool:
    if environment.get("WANDB_API_KEY", "").strip():
        return True
    host = urlsplit(environment.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname or ""
    file = environment.get("NETRC") or Path(environment.get("HOME", "~")).expanduser() / ".netrc"
    try:
        return netrc.netrc(str(file)).authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False


def secrets_in(environment: Mapping[str, str]) -> tuple[str, ...]:
    """The values that no warning may repeat, whatever a library puts into its messages."""
    names = ("WANDB_API_KEY", "MLFLOW_TRACKING_TOKEN", "MLFLOW_TRACKING_PASSWORD", "HF_TOKEN")
    return tuple(environment[name] for name in names if environment.get(name, "").strip())


class Trackers:
    """Hands every reported line to all services.

    Args:
        openings: by name; each is called in the service's own thread.
        warn: shows a line to the person. secrets: never shown.
    """

    def __init__(self, openings: Mapping[str, Opening], *, warn: Warn, secrets: Sequence[str] = ()) -> None:
        self._patience = _SECONDS_TO_CLOSE
        self._lanes = [_Lane(name, opening, warn, tuple(secrets)) for name, opening in openings.items()]

    def write(self, line: Mapping[str, Any]) -> None:
        """Take in a line of metrics.jsonl; those that are neither a step nor an evaluation tell no figures."""
        if line["kind"] == "left":
            self._patience = _SECONDS_TO_LEAVE
        if line["kind"] not in ("step", "evaluation"):
            return
        figures = dict(_figures(line))
        for lane in self._lanes:
            lane.put(figures, int(line["step"]))

    def close(self) -> None:
        """Let them finish, but not for ever."""
        for lane in self._lanes:
            lane.end()
        deadline = time.monotonic() + self._patience
        for lane in self._lanes:
            lane.wait(max(0.0, deadline - time.monotonic()))


def _figures(line: Mapping[str, Any]) -> Iterable[tuple[str, float]]:
    group = "train" if line["kind"] == "step" else "evaluation"
    for name, value in line.items():
        if isinstance(value, int | float) and name != "step" and not isinstance(value, bool):
            yield f"{group}/{name}", float(value)
    for entry in line.get("by_position", ()):
        for name in ("loss", "accuracy"):
            yield f"{group}/{name}_from_k_{entry['from']:05d}", float(entry[name])


class _Lane:
    """One service: its queue, its thread, and what went wrong with it."""

    def __init__(self, name: str, opening: Opening, warn: Warn, secrets: tuple[str, ...]) -> None:
        self._name, self._opening, self._warn, self._secrets = name, opening, warn, secrets
        self._queue: queue.Queue[tuple[Mapping[str, float], int] | None] = queue.Queue(_WAITING_LINES)
        self._dropped = 0
        self._dead = False
        # A daemon: a service that hangs cannot keep the process from ending.
        self._thread = threading.Thread(target=self._work, name=f"tracker-{name}", daemon=True)
        self._thread.start()

    def put(self, figures: Mapping[str, float], step: int) -> None:
        if self._dead:
            return
        try:
            self._queue.put_nowait((figures, step))
        except queue.Full:
            self._dropped += 1
            if self._dropped == 1:
                self._say("does not keep up; lines are left out there, and metrics.jsonl has them all")

    def end(self) -> None:
        try:
            self._queue.put_nowait(None)
        except queue.Full:
            self._dead = True

    def wait(self, seconds: float) -> None:
        self._thread.join(seconds)
        if self._thread.is_alive():
            self._say("has not taken everything in by the end of the run; metrics.jsonl has it all")

    def _work(self) -> None:
        tracker: Tracker | None = None
        try:
            tracker = self._opening()
            while not self._dead and (item := self._queue.get()) is not None:
                self._hand_over(tracker, *item)
            tracker.close()
        # Whatever a service's library raises, it is no reason to end a run.
        except Exception as trouble:  # noqa: BLE001
            self._dead = True
            self._say(f"is given up: {type(trouble).__name__}: {trouble}; the run goes on, metrics.jsonl has it all")

    def _hand_over(self, tracker: Tracker, figures: Mapping[str, float], step: int) -> None:
        for attempt in range(1, _TRIES + 1):
            try:
                return tracker.log(figures, step)
            except Exception as trouble:
                if attempt == _TRIES:
                    raise
                if attempt == 1:
                    self._say(f"did not take step {step}: {type(trouble).__name__}: {trouble}; it is tried again")
                time.sleep(_SECONDS_BETWEEN_TRIES)

    def _say(self, text: str) -> None:
        for secret in self._secrets:
            text = text.replace(secret, "***")
        first = " ".join(masked(text).split())
        self._warn(f"warning     tracker {self._name} {first[:400]}")
