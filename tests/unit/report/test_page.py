"""The report: one file that loads nothing, honest about what its runs have in common."""

from __future__ import annotations

import csv
import json
import math
import re
from pathlib import Path

import pytest

from seqaware.metrics.intervals import mean, wilson
from seqaware.report.compare import differences, groups_of, last_evaluation, paired
from seqaware.report.page import write_report
from seqaware.report.run_record import read_run
from tests.unit.report.runs import write_run


def _text(page: Path) -> str:
    return re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", page.read_text()))


def test_one_run(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run")
    item = {"item": "loss", "step": 1, "expected": 1e-7, "seen": 1e-9, "verdict": "holds", "note": ""}
    (folder / "certificate.json").write_text(json.dumps({"verdict": "holds", "mathematics_hash": "h", "items": [item]}))
    results = folder / "evaluations" / "model" / "results.json"
    results.parent.mkdir(parents=True)
    results.write_text(
        json.dumps({"exact_match": 0.75, "exact_match_low": 0.7, "exact_match_high": 0.8, "questions": 9})
    )
    page = write_report([folder], out=tmp_path / "report")
    source = page.read_text()
    assert not re.search(r'(src|href)="(?!data:)', source) and "<script" not in source and "@import" not in source
    text = _text(page)
    for word in (
        "6.0000 → 1.0000",
        "Certificate: run",
        "The plan and what happened",
        "highest learning rate",
        "70.0% to 80.0%",
    ):
        assert word in text
    assert "The runs have" not in text
    for name in ("loss", "position_time", "weights", "throughput", "memory", "padding"):
        assert (tmp_path / "report" / f"{name}.png").read_bytes()[:4] == b"\x89PNG"
    rows = list(csv.DictReader((tmp_path / "report" / "by_position.csv").open()))
    assert len(rows) == 4 and rows[-1]["loss"] == "0.5"


def test_several_runs_are_grouped_compared_and_cautioned_about(tmp_path: Path) -> None:
    folders = [
        write_run(tmp_path / f"g{gamma}-{seed}", gamma=gamma, seed=seed, loss=1.0 + 0.01 * seed - 0.1 * gamma)
        for gamma in (0.9, 0.0)
        for seed in (1, 2, 3)
    ]
    text = _text(write_report(folders, out=tmp_path / "report"))
    assert "6 runs, 2 settings" in text
    assert "The runs have 2 different objectives" in text
    # Every pair differs by 0.09 exactly: rounding is all the spread there is.
    assert "γ = 0.9 against γ = 0: held-out loss -0.0900 ± 0.0000 (better); exact match +0.0000 ± 0.0000" in text
    assert "training.sft.gamma" in text


def test_runs_that_never_began_and_titles_that_would_be_markup(tmp_path: Path) -> None:
    whole = write_run(tmp_path / "<b>whole")
    begun = write_run(tmp_path / "begun", gamma=0.5, done=1)
    (begun / "metrics.jsonl").unlink()
    page = write_report([whole, begun], out=tmp_path / "report")
    assert "<b>whole" not in page.read_text()
    assert "has not begun to train" in _text(page)


def test_an_objective_without_gamma_is_shown(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / "known"), write_run(tmp_path / "unknown", loss=2.0)]
    for name in ("manifest.json", "plan.json"):
        content = json.loads((runs[1] / name).read_text())
        del content["mathematics"]["objective"]["gamma"]
        (runs[1] / name).write_text(json.dumps(content))
    assert "gamma —" in _text(write_report(runs, out=tmp_path / "report"))


def test_groups_differ_in_more_than_their_seed(tmp_path: Path) -> None:
    runs = [read_run(write_run(tmp_path / str(i), gamma=g, seed=s)) for i, (g, s) in enumerate([(0.9, 1), (0.9, 2)])]
    (group,) = groups_of(runs)
    assert group.label == "γ = 0.9" and len(group.runs) == 2
    assert [name for name, _ in differences(runs)] == ["training.control.seed"]
    assert paired(group, group, last_evaluation("no such figure")) is None


@pytest.mark.parametrize(
    ("values", "half"),
    # s = 1, t(2) = 4.303; s = √2 · ½, t(1) = 12.706.
    [([1.0, 2.0, 3.0], 4.303 / math.sqrt(3)), ([1.0, 2.0], 12.706 * math.sqrt(0.5) / math.sqrt(2))],
)
def test_the_interval_of_a_mean(values: list[float], half: float) -> None:
    found = mean(values)
    assert found.value == sum(values) / len(values) and found.half == pytest.approx(half)


def test_an_interval_needs_two_runs_and_nears_the_normal() -> None:
    assert mean([1.0]).half is None and mean([]).runs == 0
    many = mean([float(i % 2) for i in range(1000)])
    # t with 999 degrees of freedom is 1.9623; s² = ¼ · 1000 / 999.
    assert many.half == pytest.approx(1.9623 * math.sqrt(0.25 * 1000 / 999 / 1000), rel=1e-4)


def test_wilsons_interval() -> None:
    # 15 of 20: 0.531 to 0.888, as worked out by hand from the quadratic (p̂ − p)² = z² p (1 − p) / n.
    low, high = wilson(0.75, 20)
    for p in (low, high):
        assert (0.75 - p) ** 2 == pytest.approx(1.959964**2 * p * (1 - p) / 20)
    assert low < 0.75 < high and wilson(0.0, 10)[0] == 0.0 and wilson(1.0, 10)[1] == pytest.approx(1.0, abs=1e-15)
