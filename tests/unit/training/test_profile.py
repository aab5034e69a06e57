"""The profiler records the steps that were asked for, and leaves a trace that a viewer can read."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from seqaware.config.load import load_config
from seqaware.config.profile import ProfileConfig
from seqaware.errors import ConfigError
from seqaware.training.profile import ProfileWindow


def _trained(folder: Path, *, steps: int) -> list[str]:
    said: list[str] = []
    config = ProfileConfig.model_validate({"from": 2, "steps": 2})
    window = ProfileWindow(config, folder, last=steps, device=torch.device("cpu"), say=said.append)
    for step in range(1, steps + 1):
        with window.around(step):
            torch.ones(2) @ torch.ones(2)
    return said


def test_a_window_of_steps_becomes_one_trace(tmp_path: Path) -> None:
    said = _trained(tmp_path / "profile", steps=5)
    (path,) = (tmp_path / "profile").iterdir()
    names = [event.get("name") for event in json.loads(path.read_text())["traceEvents"]]
    assert path.name == "steps-2-3.json" and len(said) == 1 and str(path) in said[0]
    assert [name for name in names if str(name).startswith("step ")] == ["step 2", "step 3"]
    assert names.count("aten::dot") == 2


def test_a_run_that_is_over_inside_the_window_leaves_what_it_recorded(tmp_path: Path) -> None:
    _trained(tmp_path, steps=2)
    assert [path.name for path in tmp_path.iterdir()] == ["steps-2-2.json"]


def test_from_is_written_and_read_as_from() -> None:
    config = load_config(None, ["logging.profile={from: 4}"])
    assert config.model_dump(mode="json")["logging"]["profile"] == {"from": 4, "steps": 3}
    with pytest.raises(ConfigError, match=r"profile.first; the keys of logging\.profile are from, steps"):
        load_config(None, ["logging.profile={first: 4}"])
