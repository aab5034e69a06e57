"""A run's folder is read as far as it can be, and says what could not."""

from __future__ import annotations

import io
import json
import math
import os
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from seqaware.errors import DataError
from seqaware.report import page
from seqaware.report.live_view import frame
from seqaware.report.page import write_report
from seqaware.report.run_record import read_run
from tests.unit.report.runs import evaluation_line, step_line, write_run


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


@pytest.mark.parametrize(
    ("name", "keys", "value"),
    [
        ("manifest.json", (), "[]"),
        ("manifest.json", (), "[" * 5000),
        ("manifest.json", ("seqaware",), "9" * 5000),
        ("manifest.json", ("mathematics",), [1]),
        ("manifest.json", ("mathematics", "objective"), "x"),
        ("manifest.json", ("mathematics", "objective", "gamma"), 1e300),
        ("manifest.json", ("mathematics", "objective", "gamma"), "<b>"),
        ("manifest.json", ("mathematics", "seed"), [1]),
        ("manifest.json", ("attempts",), ["x"]),
        ("manifest.json", ("finished_steps",), "x"),
        ("plan.json", ("config",), "x"),
        ("plan.json", ("config", "training", "optimizer", "max_grad_norm"), "x"),
        ("plan.json", ("config", "evaluation"), 3),
        ("plan.json", ("batches", "total_steps"), -1),
        ("plan.json", ("data", "tokens"), "many"),
        ("plan.json", ("data", "longest"), 10**300),
        ("plan.json", ("world",), [8]),
        ("certificate.json", (), '{"items": [3]}'),
        ("evaluations/m/results.json", (), '{"a": "x", "a_low": 0.1, "a_high": 0.2}'),
        ("evaluations/m/results.json", (), "3"),
    ],
)
def test_a_file_with_invalid_values_is_named_and_the_rest_is_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, keys: tuple[str, ...], value: Any
) -> None:
    # Figures are drawn, not written: that takes a second, and the next test does it.
    monkeypatch.setattr(page, "_saved", lambda name, caption, figure, out: {"caption": caption, "svg": ""})
    path = write_run(tmp_path / "run", done=30) / name
    if keys:
        content = json.loads(path.read_text())
        section = content
        for key in keys[:-1]:
            section = section[key]
        section[keys[-1]] = value
        value = json.dumps(content)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(value)
    run = read_run(tmp_path / "run")
    assert run.done == 30
    assert any(Path(name).name in note for note in run.notes) or '"a_low"' in value
    other = write_run(tmp_path / "other", gamma=0.5)
    assert write_report([tmp_path / "run", other], out=tmp_path / "report").is_file()
    Console(file=io.StringIO()).print(frame(tmp_path / "run", width=80))


def test_a_diverged_run_is_drawn(tmp_path: Path) -> None:
    lines = [step_line(step, loss=1.0, unweighted_loss="inf", loss_="nan", grad_norm="inf") for step in range(1, 70)]
    lines += [evaluation_line(70, loss=1.0)]
    lines[-1]["by_position"][0] |= {"loss": "inf", "weight": "nan"}
    lines[-1]["unweighted_loss"] = "nan"
    folder = write_run(tmp_path / "run", done=3)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert write_report([folder], out=tmp_path / "report").is_file()
    Console(file=io.StringIO()).print(frame(folder, width=80))
