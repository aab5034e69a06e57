"""A run that stops and goes on is the run that never stopped: bitwise, on the same ranks."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file

from tests import launch, tiny
from tests.e2e.many_runs import check_all, launch_all


def _steps(folder: Path) -> list[tuple[int, float, float]]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [(line["step"], line["loss"], line["grad_norm"]) for line in lines if line["kind"] == "step"]


def _check_requests(folder: Path, ranks: int) -> None:
    """Rank 0 validates the checkpoint; the other ranks ask for files of their own, which do not grow with the ranks."""
    for rank in range(1, ranks):
        asked = json.loads((folder / f"requests-{rank}.json").read_text())
        of_resumed = [name for name in asked if name.startswith("step-00000002/")]
        own = re.compile(rf"step-00000002/(zero_pp_rank_{rank}_mp_rank_00_(model|optim)_states\.pt|rng-{rank}\.pt)")
        assert [name for name in of_resumed if own.fullmatch(name)]
        assert [name for name in of_resumed if not own.fullmatch(name)] == [
            "step-00000002/zero"
        ]  # a universal checkpoint has it


def _evaluations(folder: Path) -> list[tuple[int, float]]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [(line["step"], line["loss"]) for line in lines if line["kind"] == "evaluation"]


@pytest.mark.parametrize(("ranks", "stage"), [(2, 3), (1, 1)])
def test_resume_is_never_having_stopped(tmp_path: Path, ranks: int, stage: int) -> None:
    workshop = tiny.build(tmp_path)
    # Five rows a step: the thirteen rows make a ragged epoch of three steps, and step 4 lies in the second epoch.
    # max_steps alone decides how many epochs there are.
    schedule = {"global_batch_size": 5, "scheduler_type": "constant", "micro_batch_tokens": 128}
    # Evaluated after the export: a resumed run once died there under ZeRO-3.
    held_out = {"dataset": {"name": str(workshop.rows)}}
    config = workshop.config(training__schedule=schedule, output__save_every=2, evaluation=held_out)
    path = workshop.write("run", config)

    def request(name: str, max_steps: int, **more: str) -> dict[str, object]:
        sets = [f"output.dir={tmp_path / name}", f"training.schedule.max_steps={max_steps}"]
        return {"config": str(path), "deepspeed": str(launch.DS_CONFIGS / f"zero{stage}.json"), "set": sets, **more}

    last = request("parts", 5, requests=str(tmp_path))
    requests = [request("whole", 5), request("parts", 2), last]
    check_all(launch_all(requests, ranks=ranks, folder=tmp_path / "launches"))

    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert [step for step, *_ in _steps(whole)] == [1, 2, 3, 4, 5]
    assert _steps(parts) == _steps(whole)
    # The first part evaluated at its own end too.
    assert _evaluations(whole) == [each for each in _evaluations(parts) if each[0] != 2]
    assert [step for step, _ in _evaluations(whole)] == [0, 5]
    expected, resumed = (
        load_file(whole / "model" / "model.safetensors"),
        load_file(parts / "model" / "model.safetensors"),
    )
    for name, tensor in expected.items():
        assert resumed[name].equal(tensor), name
    attempts = json.loads((parts / "manifest.json").read_text())["attempts"]
    assert len(attempts) == 2
    _check_requests(tmp_path, ranks)
    kept = sorted(child.name for child in (parts / "checkpoints").glob("step-*"))
    assert kept == ["step-00000004", "step-00000005"]


def test_a_rank_that_cannot_write_is_heard_by_all(tmp_path: Path) -> None:
    workshop = tiny.build(tmp_path)
    run = tmp_path / "run"
    path = str(workshop.write("full", workshop.config(output__dir=str(run), training__schedule__max_steps=1)))
    prepared = launch.forked("launcher/prepare.py", path, ranks=1)
    assert prepared.returncode == 0, prepared.stderr
    done = launch.forked("tests/e2e/failing_save.py", path, ranks=2)
    assert done.returncode == 0, done.stderr[-4000:]
    for rank in (0, 1):
        assert f"rank {rank} heard: the checkpoint of step 1 could not be written; got rank 1 on " in done.stderr
    assert not list((run / "checkpoints").glob("step-*[0-9]"))


def test_a_run_that_was_ended_after_its_last_evaluation_does_not_report_it_again(tmp_path: Path) -> None:
    workshop = tiny.build(tmp_path)
    held_out = {"dataset": {"name": str(workshop.rows)}, "metric": "exact_match", "max_new_tokens": 2}
    held_out["answer_pattern"] = r"(?P<answer>\w+)"
    config = workshop.config(output__dir=str(tmp_path / "run"), evaluation=held_out)
    path = str(workshop.write("ended", config))
    first = launch.forked("launcher/train.py", path, ranks=1)
    assert first.returncode == 0, first.stderr[-4000:]
    run = tmp_path / "run"
    expected = _evaluations(run)
    for reported, lost in ((True, "model"), (False, "answers.jsonl")):
        # As if it had been killed then: it does not know that it has finished.
        manifest = json.loads((run / "manifest.json").read_text())
        del manifest["finished_steps"]
        (run / "manifest.json").write_text(json.dumps(manifest))
        shutil.rmtree(run / lost) if lost == "model" else (run / lost).unlink()
        again = launch.forked("launcher/train.py", path, ranks=1)
        assert again.returncode == 0, again.stderr[-4000:]
        assert (run / "model" / "model.safetensors").exists() and (run / "answers.jsonl").exists()
        assert not reported or _evaluations(run) == expected


def test_a_finished_run_is_left_alone_and_an_earlier_checkpoint_can_be_gone_back_to(tmp_path: Path) -> None:
    workshop = tiny.build(tmp_path)
    run = tmp_path / "run"
    schedule = {"num_epochs": 9, "max_steps": 4, "scheduler_type": "constant", "global_batch_size": 13}
    config = workshop.config(output__dir=str(run), output__save_every=1, training__schedule=schedule)
    config["output"]["keep_last"] = 4
    path = str(workshop.write("again", config))
    first = launch.forked("launcher/train.py", path, ranks=1)
    assert first.returncode == 0, first.stderr[-4000:]
    before = {file: file.read_bytes() for file in run.rglob("*") if file.is_file()}

    again = launch.forked("launcher/train.py", path, ranks=1)
    assert again.returncode == 0 and "complete: all 4 steps" in again.stdout
    assert {file: file.read_bytes() for file in run.rglob("*") if file.is_file()} == before

    steps = _steps(run)
    earlier = str(run / "checkpoints" / "step-00000002")
    back = launch.forked("launcher/train.py", path, "--resume", earlier, ranks=1)
    assert back.returncode == 0, back.stderr[-4000:]
    assert "resumed     after step 2" in back.stdout
    assert _steps(run) == steps
    abandoned = [child.name[-8:] for child in sorted((run / "checkpoints").glob("abandoned-*"))]
    assert abandoned == ["00000003", "00000004"]

    late = launch.forked("launcher/train.py", path, "--set", "training.schedule.max_steps=3", ranks=1)
    assert late.returncode == 2 and "later than the end" in late.stderr
