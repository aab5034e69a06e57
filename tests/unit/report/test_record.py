"""A run's folder is read as far as it can be, and says what could not."""

from __future__ import annotations

import math
import os
from pathlib import Path

import pytest

from seqaware.errors import DataError
from seqaware.report.record import read_run
from tests.unit.report.runs import write_run


def test_a_whole_run(tmp_path: Path) -> None:
    run = read_run(write_run(tmp_path / "run"))
    assert (run.state(), run.done, run.total_steps, run.notes) == ("finished", 60, 60, ())
    assert run.objective["gamma"] == 0.98 and len(run.steps) == 60 and len(run.evaluations) == 2


@pytest.mark.parametrize(("make", "word"), [(False, "no such run folder"), (True, "holds no run")])
def test_no_run(tmp_path: Path, make: bool, word: str) -> None:
    write_run(tmp_path / "other")
    folder = tmp_path / "mine"
    if make:
        folder.mkdir()
    with pytest.raises(DataError, match=word):
        read_run(folder)
    with pytest.raises(DataError, match="runs inside it are other"):
        read_run(tmp_path)


def test_a_half_written_run_of_a_newer_version(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", done=30, version="99.0.0")
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('not json\n{"kind": "step", "step": 31, "loss": "nan", "unweighted_loss": "inf"}\n')
        file.write('{"kind": "a kind of later versions", "step": 31}\n{"kind": "st')
    (folder / "plan.json").write_text("{")
    run = read_run(folder)
    notes = " · ".join(run.notes)
    assert "newer than this" in notes and "plan.json cannot be read" in notes and "1 lines cannot be read" in notes
    assert run.done == 31 and math.isnan(run.steps[-1]["loss"]) and math.isinf(run.steps[-1]["unweighted_loss"])
    assert run.total_steps is None
    (folder / "manifest.json").write_text('{"seqaware": "99')
    assert "manifest.json cannot be read" in " ".join(read_run(folder).notes)
    assert "manifest.json is missing" not in " ".join(read_run(folder).notes)


def test_the_state_is_told_from_the_clock(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", done=30)
    os.utime(folder / "metrics.jsonl", (1000.0, 1000.0))
    assert read_run(folder).state(now=1060.0) == "running"
    assert read_run(folder).state(now=1000.0 + 600.0) == "silent for 10 min: hanging, ended, or saving"
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "left", "step": 30, "reason": "SIGTERM"}\n')
    assert read_run(folder).state().startswith("left")
