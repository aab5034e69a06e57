"""TensorBoard, Weights & Biases and MLflow behind one face: a figure that was reported goes to each of them.

None of them may hold a run up or end it. Each has a thread and a queue of its own: what a service does not take in
time waits, what it refuses is told as a warning and tried again, and the training never knows. metrics.jsonl has every
line anyway.
"""

from __future__ import annotations

import netrc
import queue
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from http import HTTPStatus
from http.client import HTTPException
from pathlib import Path
from typing import Any, Protocol, TypeVar
from urllib.error import HTTPError
from urllib.parse import urlsplit
from urllib.request import urlopen

from seqaware.config.output_config import LoggingConfig
from seqaware.config.packages import is_installed
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
# Between the tries: a hiccup is over soon, a server that is mended is found again, and nobody is asked all the time.
_SECONDS_BETWEEN_TRIES = (2.0, 10.0, 60.0)
_TRIES_AT_THE_END = 3
_SECONDS_TO_ASK = 5.0
_LONGEST_REASON = 300


class Tracker(Protocol):
    """A service that keeps figures of runs. Everything may raise."""

    def log(self, figures: Mapping[str, float], step: int) -> None: ...

    def close(self) -> None: ...


T = TypeVar("T")
Opening = Callable[[], Tracker]
Warn = Callable[[str], None]


def check_trackers(logging: LoggingConfig, environment: Mapping[str, str]) -> None:
    """Refuse trackers that cannot work, before anything else is done.

    Raises:
        ConfigError: a package is not installed, or a service asks for a key and there is none.
    """
    for name in logging.trackers:
        module, package = _PACKAGES[name]
        if not is_installed(module):
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
    server = mlflow_server(logging, environment)
    if "mlflow" in logging.trackers and server and not _has_mlflow_login(environment) and _asks_who(server):
        raise ConfigError(
            "logging.trackers names mlflow, whose server asks for a login, and there is none",
            got=f"{masked(server)}, and no MLFLOW_TRACKING_TOKEN in the environment of rank 0",
            do="set it, or MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD",
        )


def mlflow_server(logging: LoggingConfig, environment: Mapping[str, str]) -> str | None:
    """The address of MLflow's server, if it is one and not a folder."""
    uri = logging.mlflow_uri or environment.get("MLFLOW_TRACKING_URI") or ""
    return uri.rstrip("/") if uri.startswith(("http://", "https://")) else None


def _has_mlflow_login(environment: Mapping[str, str]) -> bool:
    """Whether there is any of its ways to log in: what a plug-in or a file does is not for us to judge."""
    names = ("MLFLOW_TRACKING_TOKEN", "MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_AUTH", "MLFLOW_TRACKING_AWS_SIGV4")
    file = Path(environment.get("HOME", "~")).expanduser() / ".mlflow" / "credentials"
    return any(environment.get(name, "").strip() for name in names) or file.is_file()


def _asks_who(server: str) -> bool:
    """Whether the server refuses who does not say who it is. One that does not answer is no reason not to train."""
    if urlsplit(server).username:
        return False
    try:
        urlopen(f"{server}/api/2.0/mlflow/experiments/get?experiment_id=0", timeout=_SECONDS_TO_ASK).close()
    except HTTPError as answer:
        return answer.code in (HTTPStatus.UNAUTHORIZED, HTTPStatus.FORBIDDEN)
    except (OSError, ValueError, HTTPException):
        return False
    return False


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
        self._ending = threading.Event()
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
        self._ending.set()
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
            tracker = self._insist(self._opening, "cannot be reached")
            while not self._dead and (item := self._queue.get()) is not None:
                self._hand_over(tracker, *item)
            tracker.close()
        # Whatever a service's library raises, it is no reason to end a run.
        except Exception as trouble:  # noqa: BLE001
            self._dead = True
            self._say("is given up", trouble, then="metrics.jsonl has it all")

    def _hand_over(self, tracker: Tracker, figures: Mapping[str, float], step: int) -> None:
        self._insist(lambda: tracker.log(figures, step), f"did not take step {step}")

    def _insist(self, act: Callable[[], T], problem: str) -> T:
        """Do it, as often as it takes; what comes meanwhile waits. Only the run's end makes a refusal the last one."""
        attempt = 0
        while True:
            try:
                done = act()
            except Exception as trouble:
                if self._ending.is_set() and attempt >= _TRIES_AT_THE_END - 1:
                    raise
                if attempt == 0:
                    self._say(problem, trouble, then="it is tried again while the run goes on")
                self._rest(attempt)
                attempt += 1
            else:
                if attempt:
                    self._say("is there again")
                return done

    def _rest(self, attempt: int) -> None:
        if self._ending.is_set():
            time.sleep(_SECONDS_BETWEEN_TRIES[0])
        else:
            self._ending.wait(_SECONDS_BETWEEN_TRIES[min(attempt, len(_SECONDS_BETWEEN_TRIES) - 1)])

    def _say(self, text: str, trouble: Exception | None = None, *, then: str = "") -> None:
        reason = (
            f": {type(trouble).__name__}: {self._without_secrets(str(trouble))[:_LONGEST_REASON]}" if trouble else ""
        )
        self._warn(f"warning     tracker {self._name} {text}{reason}{'; ' if then else ''}{then}")

    def _without_secrets(self, text: str) -> str:
        for secret in self._secrets:
            text = text.replace(secret, "***")
        return " ".join(masked(text).split())
