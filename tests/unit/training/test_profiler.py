"""The profiler records the steps that were asked for, and leaves a trace that a viewer can read."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from seqaware.config.loading import load_config
from seqaware.config.profile_config import ProfileConfig
from seqaware.errors import ConfigError
from seqaware.training.profiler import ProfileWindow


def _trained(folder: Path | None, *, steps: int, last: int | None = None) -> tuple[list[str], list[int]]:
    """What was said, and the steps before which the window began and after which it ended."""
    said: list[str] = []
    config = ProfileConfig.model_validate({"from": 2, "steps": 2})
    window = ProfileWindow(config, folder, last=last or steps, device=torch.device("cpu"), say=said.append)
    borders = []
    for step in range(1, steps + 1):
        if window.begins(step):
            window.start(step)
            borders.append(step)
        with window.named(step):
            torch.ones(2) @ torch.ones(2)
        if window.ends(step):
            window.close()
            borders.append(step)
    window.close()
    return said, borders


def test_a_window_of_steps_becomes_one_trace(tmp_path: Path) -> None:
    said, borders = _trained(tmp_path / "profile", steps=5)
    assert borders == [2, 3] == _trained(None, steps=5)[1], "ranks without a trace know where the window is"
    (path,) = (tmp_path / "profile").iterdir()
    names = [event.get("name") for event in json.loads(path.read_text())["traceEvents"]]
    assert path.name == "steps-2-3.json" and len(said) == 1 and str(path) in said[0]
    assert [name for name in names if str(name).startswith("step ")] == ["step 2", "step 3"]
    assert names.count("aten::dot") == 2


def test_a_run_that_is_over_inside_the_window_leaves_what_it_recorded(tmp_path: Path) -> None:
    _trained(tmp_path, steps=2)
    assert [path.name for path in tmp_path.iterdir()] == ["steps-2-2.json"]
    _trained(tmp_path / "left", steps=2, last=5)
    assert [path.name for path in (tmp_path / "left").iterdir()] == ["steps-2-2.json"]


def test_what_is_dropped_leaves_nothing_and_what_comes_again_is_written_anew(tmp_path: Path) -> None:
    said: list[str] = []
    config = ProfileConfig.model_validate({"from": 1, "steps": 1})
    window = ProfileWindow(config, tmp_path, last=1, device=torch.device("cpu"), say=said.append)
    window.start(1)
    window.drop()
    window.close()
    assert not said and not list(tmp_path.iterdir()) and window.begins(1)
    (tmp_path / "steps-1-1.json").write_text("earlier")
    window.start(1)
    with window.named(1):
        pass
    window.close()
    assert "step 1" in (tmp_path / "steps-1-1.json").read_text()


def test_a_trace_that_cannot_be_written_costs_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "profile").write_text("in the way")
    (said,), _ = _trained(tmp_path / "profile", steps=3)
    assert said.startswith("warning     the profile of the steps 2 to 3 could not be written; got [Errno 17]")

    def full_disk(recording: object, path: str) -> None:
        Path(f"{path}.tmp").write_text("{")

    monkeypatch.setattr("torch.profiler.profile.export_chrome_trace", full_disk)
    (said,), _ = _trained(tmp_path / "full", steps=3)
    assert said.startswith("warning     the profile of the steps 2 to 3 could not be written")
    assert not list((tmp_path / "full").iterdir())


def test_from_is_written_and_read_as_from() -> None:
    config = load_config(None, ["logging.profile={from: 4}"])
    assert config.model_dump(mode="json")["logging"]["profile"] == {"from": 4, "steps": 3}
    with pytest.raises(ConfigError, match=r"profile.first; the keys of logging\.profile are from, steps"):
        load_config(None, ["logging.profile={first: 4}"])
