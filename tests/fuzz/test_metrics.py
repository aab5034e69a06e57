"""Hostile records of runs: readers of metrics.jsonl skip damaged lines; of other files they make one error."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

import launcher.report
import launcher.watch
from seqaware.config.schema import Config
from seqaware.metrics.metrics_file import MetricsWriter, read_metrics
from seqaware.report import tables
from seqaware.report.compare import groups_of
from seqaware.report.live_view import frame
from seqaware.report.page import findings
from seqaware.report.run_record import read_run
from seqaware.tools.model_card import run_card
from seqaware.training.run_directory import RunDirectory
from seqaware.training.summary import summary_lines
from tests.fuzz import hostile
from tests.fuzz.bounds import corpus, ends_well, fuzzed, refuses_clearly
from tests.fuzz.test_config import DEMO
from tests.unit.plan.test_plan import plan
from tests.unit.report.runs import evaluation_line, step_line, write_run

LINES: list[dict[str, Any]] = [
    step_line(1, loss=3.0),
    step_line(2, loss=2.0),
    evaluation_line(2, loss=2.0),
    {"kind": "pace", "step": 2, "seconds": [0.1, 0.2], "hosts": ["a", "b"]},
    {"kind": "skipped", "step": 3},
    {"kind": "rewind", "step": 3, "to": 2},
    {"kind": "save_failed", "step": 4, "problem": "disk full"},
    {"kind": "checkpoint", "step": 4, "bytes": 10, "seconds": 0.5},
    {"kind": "left", "step": 4},
]
KEYS = sorted({*(key for line in LINES for key in line), "by_position.0", "f1", "f1_low", "f1_high", "exact_match_low"})
KINDS = st.sampled_from([*(line["kind"] for line in LINES), "exported", "\x1b[2J", "x" * 5000])
HUGE = st.sampled_from([1.7e308, -1.7e308, 1e300, "nan", "inf", "-inf", 10**307, 2**53, 1e15, 0, 5e-324])
BUCKET = evaluation_line(2, loss=2.0)["by_position"][0]
BUCKETS = st.lists(
    st.lists(st.tuples(st.sampled_from(list(BUCKET)), hostile.scalars | HUGE), max_size=2).map(
        lambda changes: hostile.mutated(BUCKET, changes)
    ),
    max_size=3,
)
VALUES = st.one_of(st.just(hostile.ABSENT), hostile.values, HUGE, HUGE, KINDS, BUCKETS, st.lists(HUGE, max_size=3))
PIECES = [
    *("\0", "\ufeff", "\ud800", "\\ud800", "\r", "\n", "\n\n", "{", "}", "[", "]", '"', ",", ":", "NaN", "-Infinity"),
    *("[" * 5000, '{"a":' * 2000, "9" * 400, "9" * 5000, "1e999", '"step": 1,', "x" * 2**20, "\n" * 5000, "1e308"),
]
# Files beside the metrics, and what of them is read.
RECORDS = {
    "manifest.json": [
        *("seqaware", "git_revision", "mathematics", "mathematics.seed", "mathematics.objective", "attempts"),
        *("mathematics.objective.gamma", "mathematics.objective.weighting", "finished_steps", "data_fingerprint"),
    ],
    "plan.json": [
        *("config", "config.training", "config.training.optimizer", "config.training.optimizer.max_grad_norm"),
        *("config.evaluation", "world", "world.size", "batches", "batches.total_steps", "batches.global_batch_size"),
        *("data", "data.tokens", "data.documents", "data.supervised_tokens", "mathematics", "mathematics_hash"),
        *("config.training.optimizer.lr", "config.evaluation.dataset", "data.longest"),
    ],
    "certificate.json": ["items", "steps", "verdict", "oracle", "mathematics_hash"],
    "evaluations/model/results.json": [
        *("exact_match", "exact_match_low", "exact_match_high", "questions", "f1", "f1_low", "f1_high", "evaluation"),
        *("evaluation.dataset", "evaluation.dataset.name", "evaluation.dataset.split", "choice_accuracy"),
    ],
    "config.yaml": [
        *("model", "model.base_name", "model.from_scratch", "lora", "training", "training.sft", "training.optimizer"),
        *("training.optimizer.lr", "training.optimizer.type", "dataset", "dataset.name", "dataset.mixture", "zzz"),
    ],
}
PLAN = plan()
Changes = dict[str, list[tuple[str, Any]]]


@st.composite
def lines(draw: st.DrawFn) -> bytes:
    """A metrics file with hostile values, in a line or in all of them, and some of them damaged as text."""
    chosen = draw(st.lists(st.sampled_from([*LINES, *LINES[:3] * 3]), min_size=1, max_size=6))
    everywhere = draw(st.lists(st.tuples(st.sampled_from(KEYS), HUGE | VALUES), max_size=2))
    made = [hostile.mutated(line, everywhere) for line in chosen * draw(st.sampled_from([1, 1, 5]))]
    for change in draw(st.lists(st.tuples(st.sampled_from(KEYS), VALUES), max_size=2)):
        at = draw(st.integers(0, len(made) - 1))
        made[at] = hostile.mutated(made[at], [change])
    text = "".join(json.dumps(line) + "\n" for line in made)
    if draw(st.integers(0, 2)):
        return text.encode()
    return draw(hostile.damaged(text, PIECES))


@st.composite
def changes_of_records(draw: st.DrawFn) -> Changes:
    """Other values in the files beside the metrics."""
    names = draw(st.lists(st.sampled_from(sorted(RECORDS)), max_size=2, unique=True))
    values = hostile.values | HUGE | st.just(hostile.ABSENT)
    return {n: draw(st.lists(st.tuples(st.sampled_from(RECORDS[n]), values), min_size=1, max_size=2)) for n in names}


@pytest.fixture(scope="module")
def run(place: Path) -> Path:
    """A run's folder as training, `verify` and `evaluate` leave it, without its model."""
    folder = write_run(place / "runs" / "run", done=5)
    manifest = json.loads((folder / "manifest.json").read_text())
    topology = {"ranks": 4, "nodes": 2, "launcher": "torchrun", "zero_stage": 3, "dtype": "float32"}
    manifest |= {"git_revision": None, "data_fingerprint": "abc", "attempts": [{"topology": topology}]}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    certificate = {
        "verdict": "holds",
        "items": [{"verdict": "holds", "item": "loss", "step": 1}],
        "oracle": "float64",
        "steps": [1, 2],
    }
    (folder / "certificate.json").write_text(json.dumps(certificate))
    shares = {"exact_match": 0.25, "exact_match_low": 0.2, "exact_match_high": 0.3, "questions": 300}
    (folder / "evaluations" / "model").mkdir(parents=True)
    results = {**shares, "evaluation": {"dataset": {"name": "gsm8k", "split": "test"}}}
    (folder / "evaluations" / "model" / "results.json").write_text(json.dumps(results))
    (folder / "config.yaml").write_text(yaml.safe_dump(Config.model_validate(DEMO).model_dump(mode="json")))
    return folder


def hostile_copy(run: Path, metrics: bytes, changes: Changes) -> Path:
    folder = run.with_name("hostile")
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(run, folder)
    (folder / "metrics.jsonl").write_bytes(metrics)
    for name, changed in changes.items():
        path = folder / name
        is_yaml = path.suffix == ".yaml"
        base = yaml.safe_load(path.read_text()) if is_yaml else json.loads(path.read_text())
        made = hostile.mutated(base, changed)
        text = yaml.dump(made, allow_unicode=True) if is_yaml else json.dumps(made)
        path.write_bytes(text.encode("utf-8", "surrogatepass"))
    return folder


def resume(metrics: Path) -> None:
    """What a run does with the lines of its earlier attempts."""
    MetricsWriter(metrics, from_step=2).close()
    kept = [json.dumps(line) for line in read_metrics(metrics) if line["step"] <= 1]
    file = MetricsWriter(metrics, from_step=1)
    file.write(step_line(2, loss=1.0))
    file.go_back(1)
    file.close()
    assert [json.dumps(line) for line in read_metrics(metrics)] == kept


def tabulate(folder: Path, other: Path) -> None:
    """A report on two runs without its figures."""
    groups = groups_of([read_run(folder), read_run(other)])
    for made in (groups, groups[:1]):
        findings(made)
        for each in (tables.outcomes, tables.positions, tables.runs_table):
            each(made)
    for run in (run for group in groups for run in group.runs):
        tables.plan_against_run(run)
        tables.certificate(run)
    tables.results([run for group in groups for run in group.runs])
    tables.write_csv(folder, groups)


def card(folder: Path) -> bool:
    checkpoint = folder / "checkpoints" / "step-00000002"
    return all(
        refuses_clearly(lambda at=at: run_card(folder, title="x", sent=[], checkpoint=at))  # type: ignore[misc]
        for at in (None, checkpoint)
    )


@fuzzed("metrics")
@given(metrics=lines(), changes=changes_of_records())
def test_hostile_metrics_are_shown_and_resumed_from(run: Path, metrics: bytes, changes: Changes) -> None:
    folder = hostile_copy(run, metrics, changes)
    ends_well(launcher.watch.app, [str(folder), "--once"])
    refuses_clearly(lambda: frame(folder, width=100))
    refuses_clearly(lambda: summary_lines(PLAN, RunDirectory(folder), seconds=1.0))
    refuses_clearly(lambda: tabulate(folder, run))
    refuses_clearly(lambda: resume(folder / "metrics.jsonl"))


@fuzzed("reports")
@given(metrics=lines(), changes=changes_of_records(), alone=st.booleans())
def test_hostile_metrics_end_a_report_well(run: Path, metrics: bytes, changes: Changes, alone: bool) -> None:
    folder = hostile_copy(run, metrics, changes)
    ends_well(launcher.report.app, [str(folder), *([] if alone else [str(run)]), "--out", str(folder / "report")])


@fuzzed("cards")
@given(metrics=lines(), changes=changes_of_records())
def test_a_hostile_record_makes_a_card_or_an_error(run: Path, metrics: bytes, changes: Changes) -> None:
    card(hostile_copy(run, metrics, changes))


@pytest.mark.parametrize("path", corpus("metrics"), ids=lambda path: path.stem)
def test_metrics_that_once_failed(run: Path, path: Path) -> None:
    folder = hostile_copy(run, path.read_bytes(), {})
    shown = ends_well(launcher.watch.app, [str(folder), "--once"])
    assert "lines cannot be read" in shown or "held out" in shown
    assert refuses_clearly(lambda: frame(folder, width=100))
    assert refuses_clearly(lambda: summary_lines(PLAN, RunDirectory(folder), seconds=1.0))
    # Two seeds of one setting are averaged.
    other = json.loads((run / "manifest.json").read_text())
    other["mathematics"]["seed"] = 2
    shutil.rmtree(run.with_name("seed"), ignore_errors=True)
    shutil.copytree(folder, run.with_name("seed"))
    (run.with_name("seed") / "manifest.json").write_text(json.dumps(other))
    assert refuses_clearly(lambda: tabulate(folder, run.with_name("seed")))
    assert card(folder)


@pytest.mark.parametrize("path", corpus("cards"), ids=lambda path: path.stem)
def test_records_that_once_failed(run: Path, path: Path) -> None:
    assert not card(hostile_copy(run, b"", json.loads(path.read_text())))
