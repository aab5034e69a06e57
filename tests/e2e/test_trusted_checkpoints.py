"""Which checkpoint a run goes on from: damaged ones are passed over, changed runs refused, one run at a time."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock
from safetensors.torch import load_file

from tests import launch, tiny

LAST = 5


def _config(workshop: tiny.Workshop, folder: Path, **changes: Any) -> str:
    schedule = {"num_epochs": 9, "max_steps": LAST, "scheduler_type": "constant", "global_batch_size": 5}
    output = {"dir": str(folder), "save_every": 1, "keep_last": LAST}
    settings = {"training__schedule": schedule, "output": output, **changes}
    return str(workshop.write(folder.name, workshop.config(**settings)))


def _train(path: str, *arguments: str) -> tuple[int, str]:
    done = launch.python("launcher/train.py", path, *arguments)
    return done.returncode, done.stdout + done.stderr


def _steps(folder: Path) -> list[tuple[int, float, float]]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [(line["step"], line["loss"], line["grad_norm"]) for line in lines if line["kind"] == "step"]


def _checkpoint(folder: Path, step: int) -> Path:
    return folder / "checkpoints" / f"step-{step:08d}"


def _largest(checkpoint: Path) -> Path:
    return max(checkpoint.glob("*.pt"), key=lambda path: path.stat().st_size)


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> tiny.Workshop:
    return tiny.build(tmp_path_factory.mktemp("trusted"))


@pytest.fixture(scope="module")
def whole(workshop: tiny.Workshop) -> Path:
    """A run of five steps that saves in the background, and keeps the checkpoint of every step."""
    folder = workshop.folder / "whole"
    output = {"dir": str(folder), "save_every": 1, "keep_last": LAST, "async_save": True}
    code, said = _train(_config(workshop, folder, output=output))
    assert code == 0, said
    return folder


def _copy(whole: Path, name: str, *, until: int) -> Path:
    """The run as it was when it was killed after step `until`."""
    folder = whole.with_name(name)
    shutil.copytree(whole, folder, ignore=shutil.ignore_patterns("model", ".lock*"))
    for step in range(until + 1, LAST + 1):
        shutil.rmtree(_checkpoint(folder, step))
    manifest = json.loads((folder / "manifest.json").read_text())
    del manifest["finished_steps"]
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder


def test_damaged_checkpoints_are_passed_over_by_name_and_the_run_is_the_whole_one(
    workshop: tiny.Workshop, whole: Path
) -> None:
    assert len(list((whole / "checkpoints").glob("step-*"))) == LAST
    folder = _copy(whole, "damaged", until=4)
    flipped, truncated = _largest(_checkpoint(folder, 2)), _largest(_checkpoint(folder, 3))
    content = bytearray(flipped.read_bytes())
    content[len(content) // 2] ^= 1
    flipped.write_bytes(content)
    truncated.write_bytes(truncated.read_bytes()[:-1])
    torn = _largest(_checkpoint(folder, 4))
    torn.unlink()
    code, said = _train(_config(workshop, folder))
    assert code == 0, said
    flat = " ".join(said.split())
    assert f"passed over {_checkpoint(folder, 4)}: {torn.name} is missing" in flat
    assert f"passed over {_checkpoint(folder, 3)}: {truncated.name} has" in flat
    assert f"passed over {_checkpoint(folder, 2)}: {flipped.name} is damaged" in flat
    assert "resumed after step 1" in flat
    # Saved at once here and in the background there: bitwise the same.
    assert _steps(folder) == _steps(whole)
    expected, resumed = (load_file(run / "model" / "model.safetensors") for run in (whole, folder))
    assert all(resumed[name].equal(tensor) for name, tensor in expected.items())
    asked = _train(
        _config(workshop, whole), "--resume", str(next((folder / "checkpoints").glob("abandoned-*-step-*3")))
    )
    assert asked[0] == 2 and truncated.name in asked[1], asked


def test_a_changed_run_is_refused_unless_its_changes_are_named(workshop: tiny.Workshop, whole: Path) -> None:
    folder = _copy(whole, "changed", until=4)
    sft, optimizer = {"gamma": 0.5}, {"lr": 2e-3}
    path = _config(workshop, folder, training__sft=sft, training__optimizer=optimizer)
    code, said = _train(path, "--resume-anyway", "optimizer")
    assert code == 2 and "objective.gamma was 0.98 and is now 0.5" in said and "optimizer.lr" not in said
    assert "--resume-anyway objective" in said
    code, said = _train(path, "--resume-anyway", "objektive")
    assert code == 2 and "objektive" in said and "objective" in said
    code, said = _train(path, "--resume-anyway", "objective,optimizer")
    assert code == 0, said
    attempts = json.loads((folder / "manifest.json").read_text())["attempts"]
    assert attempts[-1]["resumed_anyway"] == ["objective", "optimizer"]
    assert [step for step, *_ in _steps(folder)] == list(range(1, LAST + 1))


def test_a_second_run_in_the_folder_is_refused_and_changes_nothing(workshop: tiny.Workshop, whole: Path) -> None:
    folder = _copy(whole, "taken", until=4)
    path = _config(workshop, folder)
    (folder / ".lock.owner").write_text("pid 1 on elsewhere")
    with FileLock(folder / ".lock"):
        before = {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()}
        code, said = _train(path)
        assert {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()} == before
    assert code == 2 and "another run is at work" in said and "pid 1 on elsewhere" in said


def test_a_checkpoint_may_be_named_wherever_it_lies_and_whatever_it_is_called(
    workshop: tiny.Workshop, whole: Path
) -> None:
    folder, elsewhere = _copy(whole, "moved", until=3), workshop.folder / "the good one"
    shutil.copytree(_checkpoint(folder, 2), elsewhere)
    code, said = _train(_config(workshop, folder), "--resume", str(elsewhere))
    assert code == 0 and "after step 2" in said, said
    assert _steps(folder) == _steps(whole)
    assert [path.name[-8:] for path in (folder / "checkpoints").glob("abandoned-*")] == ["00000003"]
