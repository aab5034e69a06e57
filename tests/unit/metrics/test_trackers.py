"""Trackers: refused in good time where they cannot work, never in the way of a run, and told of everything."""

from __future__ import annotations

import importlib.util
import json
import threading
import time
from collections.abc import Callable, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from seqaware.config.output_config import LoggingConfig
from seqaware.errors import ConfigError
from seqaware.metrics import trackers as module
from seqaware.metrics.tracker_services import TrackedRun, openings
from seqaware.metrics.trackers import Trackers, check_trackers, secrets_in, wandb_mode
from tests.patience import LAUNCH_SECONDS, wait_for
from tests.unit.report.runs import evaluation_line, step_line

KEY = "local-0123456789abcdef0123456789abcdef01234567"


class Kept:
    """A service that keeps what it is told, and fails as long as it is told to."""

    def __init__(self, failures: int = 0, trouble: str = "") -> None:
        self.told: list[tuple[dict[str, float], int]] = []
        self.failures, self.trouble, self.closed = failures, trouble, False

    def log(self, figures: Mapping[str, float], step: int) -> None:
        if self.failures:
            self.failures -= 1
            raise ConnectionError(self.trouble)
        self.told.append((dict(figures), step))

    def close(self) -> None:
        self.closed = True


@pytest.fixture(autouse=True)
def _hurried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_SECONDS_BETWEEN_TRIES", (0.0,))
    monkeypatch.setattr(module, "_SECONDS_TO_CLOSE", 2.0)


def _run(services: Mapping[str, Callable[[], Any]], *lines: dict[str, Any], secrets: tuple[str, ...] = ()) -> list[str]:
    warnings: list[str] = []
    trackers = Trackers(services, warn=warnings.append, secrets=secrets)
    for line in lines:
        trackers.write(line)
    trackers.close()
    return warnings


def test_every_service_gets_every_figure_and_no_event() -> None:
    first, second = Kept(), Kept()
    event = {"kind": "save_failed", "step": 1, "problem": "disk"}
    services = {"a": lambda: first, "b": lambda: second}
    assert _run(services, step_line(1, loss=2.0), event, evaluation_line(1, loss=3.0)) == []
    assert first.told == second.told and first.closed
    (step, _), (evaluation, number) = first.told
    assert step["train/unweighted_loss"] == 2.0 and "train/step" not in step and number == 1
    assert evaluation["evaluation/loss_from_k_00002"] == 1.5 and evaluation["evaluation/exact_match"] == 0.5


def test_a_network_that_comes_back_is_a_warning_and_nothing_is_lost() -> None:
    service = Kept(failures=2, trouble=f"no route, with key {KEY} for https://me:pass@host" + " so" * 300)
    warnings = _run({"a": lambda: service}, step_line(1, loss=2.0), step_line(2, loss=1.0), secrets=(KEY,))
    assert [step for _, step in service.told] == [1, 2]
    assert len(warnings) == 2 and "did not take step 1" in warnings[0] and "is there again" in warnings[1]
    assert warnings[0].endswith("it is tried again while the run goes on") and len(warnings[0]) < 500
    assert KEY not in warnings[0] and "pass" not in warnings[0]


def test_a_service_that_is_away_for_long_gets_everything_when_it_is_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_SECONDS_BETWEEN_TRIES", (0.001,))
    service, warnings = Kept(failures=50, trouble="gone"), list[str]()
    trackers = Trackers({"a": lambda: service}, warn=warnings.append)
    for step in range(1, 5):
        trackers.write(step_line(step, loss=1.0))
    wait_for("four steps", lambda: len(service.told) == 4, every=0.001)
    trackers.close()
    assert [step for _, step in service.told] == [1, 2, 3, 4] and service.closed
    assert len(warnings) == 2  # the first refusal, and that it is over


def test_a_service_that_is_gone_is_given_up_and_the_others_go_on() -> None:
    gone, well = Kept(failures=99, trouble="gone"), Kept()

    def cannot_open() -> Kept:
        raise OSError("no such server")

    services = {"gone": lambda: gone, "never": cannot_open, "well": lambda: well}
    warnings = _run(services, *(step_line(step, loss=1.0) for step in range(1, 5)))
    assert [step for _, step in well.told] == [1, 2, 3, 4]
    assert sum("gone is given up" in each for each in warnings) == 1
    assert sum("never is given up: OSError: no such server" in each for each in warnings) == 1


def test_a_service_that_hangs_holds_nothing_up_least_of_all_a_run_that_leaves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_SECONDS_TO_CLOSE", LAUNCH_SECONDS)
    monkeypatch.setattr(module, "_SECONDS_TO_LEAVE", 0.2)
    service = Kept()
    released = threading.Event()
    service.log = lambda figures, step: released.wait()  # type: ignore[method-assign,assignment,return-value]
    started = time.monotonic()
    warnings = _run({"slow": lambda: service}, step_line(1, loss=1.0), {"kind": "left", "step": 1})
    released.set()
    assert time.monotonic() - started < LAUNCH_SECONDS and "has not taken everything in" in warnings[0]


def test_what_cannot_work_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    online = LoggingConfig(trackers=("wandb",))
    home = {"HOME": str(tmp_path)}
    with pytest.raises(ConfigError, match="no WANDB_API_KEY"):
        check_trackers(online, home)
    check_trackers(online, {**home, "WANDB_API_KEY": KEY})
    check_trackers(online, {**home, "WANDB_MODE": "offline"})
    check_trackers(LoggingConfig(trackers=("wandb",), wandb_mode="offline"), home)
    (tmp_path / ".netrc").write_text("machine api.wandb.ai\n  login user\n  password abc\n")
    check_trackers(online, home)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"whose package is not installed.*pip install mlflow-skinny"):
        check_trackers(LoggingConfig(trackers=("mlflow",)), home)


class _Asks(BaseHTTPRequestHandler):
    """A server that tells nobody anything who does not say who he is."""

    def do_GET(self) -> None:
        self.send_response(401)
        self.end_headers()

    def log_message(self, *told: object) -> None:
        del told


def test_a_server_that_asks_for_a_login_is_found_out_before_the_run(tmp_path: Path) -> None:
    home = {"HOME": str(tmp_path)}
    with ThreadingHTTPServer(("127.0.0.1", 0), _Asks) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        logging = LoggingConfig(trackers=("mlflow",), mlflow_uri=f"http://127.0.0.1:{server.server_port}")
        with pytest.raises(ConfigError, match=r"asks for a login.*no MLFLOW_TRACKING_TOKEN.*MLFLOW_TRACKING_USERNAME"):
            check_trackers(logging, home)
        check_trackers(logging, {**home, "MLFLOW_TRACKING_TOKEN": "mine"})
        server.shutdown()
    # One that is not there, and a folder, are no reason not to train.
    check_trackers(logging, home)
    check_trackers(LoggingConfig(trackers=("mlflow",), mlflow_uri=tmp_path.as_uri()), home)


def test_the_config_wins_over_the_environment() -> None:
    assert wandb_mode(LoggingConfig(wandb_mode="online"), {"WANDB_MODE": "offline"}) == "online"
    assert wandb_mode(LoggingConfig(), {"WANDB_MODE": "dryrun"}) == "offline"
    assert wandb_mode(LoggingConfig(), {}) == "online"
    assert secrets_in({"WANDB_API_KEY": KEY, "HF_TOKEN": "", "HOME": "/root"}) == (KEY,)


def test_the_real_services_go_on_with_the_run_they_have(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.setattr(module, "_SECONDS_TO_CLOSE", 60.0)
    folder = tmp_path / "runs" / "mine"
    folder.mkdir(parents=True)
    logging = LoggingConfig(trackers=("tensorboard", "wandb", "mlflow"), wandb_mode="offline")
    for done in (0, 2):
        run = TrackedRun(folder, done, {"training": {"sft": {"gamma": 0.9}}})
        lines = [step_line(step, loss=1.0 / step) for step in range(done + 1, done + 4)]
        assert _run(openings(run, logging, {}), *lines) == []
    names = json.loads((folder / "trackers.json").read_text())

    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    # The first attempt told step 3 as well; the second took it back.
    assert [event.step for event in events.Scalars("train/unweighted_loss")] == [1, 2, 3, 4, 5]

    assert len(list((folder / "wandb").glob(f"offline-run-*-{names['wandb']['id']}"))) >= 1
    (metric,) = (tmp_path / "runs" / "mlruns").glob(f"*/{names['mlflow']['run_id']}/metrics/train/unweighted_loss")
    assert [int(line.split()[2]) for line in metric.read_text().splitlines()] == [1, 2, 3, 3, 4, 5]
    (gamma,) = (tmp_path / "runs" / "mlruns").glob("*/*/params/training.sft.gamma")
    assert gamma.read_text() == "0.9"
