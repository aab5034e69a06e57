"""A run that stops and goes on is the run that never stopped: bitwise, on the same ranks."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file

from tests import launch, tiny


def _steps(folder: Path) -> list[tuple[int, float, float]]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [(line["step"], line["loss"], line["grad_norm"]) for line in lines if line["kind"] == "step"]


@pytest.mark.parametrize(("ranks", "stage"), [(2, 3), (1, 1)])
def test_resume_is_never_having_stopped(tmp_path: Path, ranks: int, stage: int) -> None:
    workshop = tiny.build(tmp_path)
    # Five rows a step: the thirteen rows make a ragged epoch of three steps, and step 4 lies in the second epoch.
    schedule = {"num_epochs": 2, "global_batch_size": 5, "scheduler_type": "constant", "micro_batch_tokens": 128}
    path = workshop.write("run", workshop.config(training__schedule=schedule, output__save_every=2))

    def request(name: str, max_steps: int) -> dict[str, object]:
        sets = [f"output.dir={tmp_path / name}", f"training.schedule.max_steps={max_steps}"]
        return {"config": str(path), "deepspeed": str(launch.DS_CONFIGS / f"zero{stage}.json"), "set": sets}

    requests = tmp_path / "requests.json"
    requests.write_text(json.dumps([request("whole", 5), request("parts", 2), request("parts", 5)]))
    done = launch.deepspeed("tests/e2e/many_runs.py", str(requests), ranks=ranks)
    assert done.returncode == 0, done.stderr[-6000:]

    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert [step for step, *_ in _steps(whole)] == [1, 2, 3, 4, 5]
    assert _steps(parts) == _steps(whole)
    expected, resumed = (
        load_file(whole / "model" / "model.safetensors"),
        load_file(parts / "model" / "model.safetensors"),
    )
    for name, tensor in expected.items():
        assert resumed[name].equal(tensor), name
    attempts = json.loads((parts / "manifest.json").read_text())["attempts"]
    assert len(attempts) == 2
    kept = sorted(child.name for child in (parts / "checkpoints").glob("step-*"))
    assert kept == ["step-00000004", "step-00000005"]
