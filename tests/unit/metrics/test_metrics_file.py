"""metrics.jsonl survives a crash and tells every step once after a resume."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from seqaware.errors import StorageError
from seqaware.metrics.alerts import Alerts, Limits
from seqaware.metrics.metrics_file import MetricsWriter, read_metrics
from seqaware.metrics.sinks import ReportingMetricsWriter
from seqaware.metrics.trackers import Trackers


def test_lines_are_complete_while_the_file_is_open(tmp_path: Path) -> None:
    metrics = MetricsWriter(tmp_path / "run" / "metrics.jsonl")
    metrics.write({"kind": "step", "step": 1, "loss": float("nan")})
    assert json.loads((tmp_path / "run" / "metrics.jsonl").read_text()) == {"kind": "step", "step": 1, "loss": "nan"}
    metrics.close()


def test_a_resumed_run_drops_the_steps_it_does_again(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text(
        "".join(json.dumps({"kind": "", "step": step, "run": 1}) + "\n" for step in (1, 2, 3)) + '{"step": 4, "lo'
    )
    metrics = MetricsWriter(path, from_step=2)
    metrics.write({"kind": "x", "step": 3, "run": 2})
    metrics.close()
    assert [(line["step"], line["run"]) for line in read_metrics(path)] == [(1, 1), (2, 1), (3, 2)]


def test_a_broken_line_in_the_middle_is_told_and_the_run_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"kind": "", "step": 1}\n{"st\n{"kind": "", "step": 3}\n\0\0\0\0\n{"kind": "", "step": 4}\n{"st')
    said: list[str] = []
    alerts = Alerts(Limits(max_grad_norm=1.0, total_steps=9))
    metrics = ReportingMetricsWriter(
        path, from_step=4, trackers=Trackers({}, warn=said.append), alerts=alerts, say=said.append
    )
    metrics.close()
    assert [line["step"] for line in read_metrics(path)] == [1, 3, 4]
    assert path.read_bytes().count(b"\n") == 3
    assert len(said) == 1 and f"{path}: left out 2 lines (the first is line 2) that could not be read" in said[0]


def test_lines_that_a_full_disk_refuses_come_later_or_are_missed_by_name(tmp_path: Path) -> None:
    metrics = MetricsWriter(tmp_path / "metrics.jsonl")
    disk, full = metrics._file, Path("/dev/full").open("ab", buffering=0)  # noqa: SIM115 (closed by the metrics)
    metrics._file = full
    metrics.write({"kind": "x", "step": 1})
    metrics._file = disk
    metrics.write({"kind": "x", "step": 2})
    assert [line["step"] for line in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2]
    metrics._file = full
    metrics.write({"kind": "x", "step": 3})
    with pytest.raises(StorageError, match=r"last lines of .* cannot be written.*No space left"):
        metrics.close()
    disk.close()


def test_a_run_that_begins_anew_tells_nothing_twice(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"kind": "evaluation", "step": 0}\n{"kind": "step", "step": 1}\n')
    MetricsWriter(path).close()
    assert list(read_metrics(path)) == []


@pytest.mark.parametrize(
    "damaged",
    [
        "[" * 5000,
        '{"a":' * 5000,
        "[1]",
        "7",
        "",
        '{"step": 2}',
        '{"kind": "step"}',
        '{"kind": "step", "step": "2", "loss": 1, "unweighted_loss": 1}',
        '{"kind": "step", "step": 1e400, "loss": 1, "unweighted_loss": 1}',
        '{"kind": "step", "step": -2, "loss": 1, "unweighted_loss": 1}',
        '{"kind": "step", "step": 2, "loss": "x", "unweighted_loss": 1}',
        '{"kind": "step", "step": 2, "loss": 1, "unweighted_loss": null}',
        '{"kind": "step", "step": 2, "loss": 1, "unweighted_loss": 1, "step_seconds": "nan"}',
        '{"kind": "step", "step": 2, "loss": 1, "unweighted_loss": 1, "tokens": 1e300}',
        '{"kind": "evaluation", "step": 2, "by_position": "x"}',
        '{"kind": "evaluation", "step": 2, "by_position": [{}]}',
        '{"kind": "evaluation", "step": 2, "exact_match": 2.0}',
        '{"kind": "evaluation", "step": 2, "exact_match": 0.5, "questions": "many"}',
        '{"kind": "pace", "step": 2, "seconds": [], "hosts": []}',
        '{"kind": "pace", "step": 2, "seconds": [1, 2], "hosts": ["a"]}',
        '{"kind": "x", "step": 2, "a": "\\ud800"}',
        '{"kind": "x", "step": ' + "9" * 400 + "}",
        '{"kind": "x", "step": 2, "a": "' + "x" * 3_000_000 + '"}',
    ],
    ids=lambda text: text[:60],
)
def test_a_damaged_line_is_skipped_and_counted(tmp_path: Path, damaged: str) -> None:
    path, lost = tmp_path / "metrics.jsonl", []
    good = '{"kind": "step", "step": 1, "loss": 1, "unweighted_loss": 1}\n'
    path.write_text(good + damaged + "\n" + good)
    assert [line["step"] for line in read_metrics(path, lost=lost)] == [1, 1]
    assert lost == [2]
    path.write_text(good + damaged)  # a crash, or a look in mid-write
    lost.clear()
    assert [line["step"] for line in read_metrics(path, lost=lost)] == [1] and lost == []


def test_metrics_that_are_no_file_are_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "metrics.jsonl")
    with pytest.raises(OSError, match="not a regular file"):
        list(read_metrics(tmp_path / "metrics.jsonl"))
