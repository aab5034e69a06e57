"""What a run tells at its end."""

from __future__ import annotations

from pathlib import Path

import pytest

from seqaware.training.run_directory import RunDirectory
from seqaware.training.summary import summary_lines
from tests.unit.plan.test_plan import plan

STEP = '{"kind": "step", "step": 1, "loss": 2.5, "unweighted_loss": 3.5}\n'


@pytest.mark.parametrize(("metrics", "told"), [("", "tell of no step"), (STEP, "loss 2.5000, unweighted 3.5000")])
def test_a_run_that_began_at_its_end_can_end_too(tmp_path: Path, metrics: str, told: str) -> None:
    (tmp_path / "metrics.jsonl").write_text(metrics)
    assert told in summary_lines(plan(), RunDirectory(tmp_path), seconds=1.0)[0]
