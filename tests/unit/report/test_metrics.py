"""metrics.jsonl survives a crash and tells every step once after a resume."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from seqaware.errors import DataError, StorageError
from seqaware.report.metrics import MetricsFile, read_metrics


def test_lines_are_complete_while_the_file_is_open(tmp_path: Path) -> None:
    metrics = MetricsFile(tmp_path / "run" / "metrics.jsonl")
    metrics.write({"kind": "step", "step": 1, "loss": float("nan")})
    assert json.loads((tmp_path / "run" / "metrics.jsonl").read_text()) == {"kind": "step", "step": 1, "loss": "nan"}
    metrics.close()


def test_a_resumed_run_drops_the_steps_it_does_again(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps({"step": step, "run": 1}) + "\n" for step in (1, 2, 3)) + '{"step": 4, "lo')
    metrics = MetricsFile(path, from_step=2)
    metrics.write({"step": 3, "run": 2})
    metrics.close()
    assert [(line["step"], line["run"]) for line in read_metrics(path)] == [(1, 1), (2, 1), (3, 2)]


def test_a_broken_line_in_the_middle_is_named(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"st\n{"step": 3}\n')
    with pytest.raises(DataError, match=r"metrics.jsonl:2"):
        list(read_metrics(path))


def test_lines_that_a_full_disk_refuses_come_later_or_are_missed_by_name(tmp_path: Path) -> None:
    metrics = MetricsFile(tmp_path / "metrics.jsonl")
    disk, full = metrics._file, Path("/dev/full").open("ab", buffering=0)  # noqa: SIM115 (closed by the metrics)
    metrics._file = full
    metrics.write({"step": 1})
    metrics._file = disk
    metrics.write({"step": 2})
    assert [line["step"] for line in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2]
    metrics._file = full
    metrics.write({"step": 3})
    with pytest.raises(StorageError, match=r"last lines of .* cannot be written.*No space left"):
        metrics.close()
    disk.close()


def test_a_run_that_begins_anew_tells_nothing_twice(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"kind": "evaluation", "step": 0}\n{"kind": "step", "step": 1}\n')
    MetricsFile(path).close()
    assert list(read_metrics(path)) == []
