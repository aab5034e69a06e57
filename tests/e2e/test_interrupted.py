"""A run that is asked to leave, that meets numbers which are none, or whose loss jumps: on two ranks, ZeRO-3.

All scenarios share one launch: each is a run of its own in `interrupted_runs.py`, compared with an undisturbed one.
"""

from __future__ import annotations

import json

import pytest
from safetensors.torch import load_file

from tests import tiny
from tests.e2e.disturbed import BEYOND, STEPS, Launch, Told, weighted_rows

POISON = "rows.jsonl:8"


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Told]:
    workshop = tiny.build(tmp_path_factory.mktemp("interrupted"))
    # Beyond float32, `first` in step 1; and merely large.
    poisoned = str(weighted_rows(workshop, "poison", place=7, weight=BEYOND))
    first = str(weighted_rows(workshop, "first", place=12, weight=BEYOND))
    jump = str(weighted_rows(workshop, "jump", place=7, weight=500.0))
    runs = Launch(workshop)
    runs.add("whole", "whole")
    recorded = {"logging__profile": {"from": 2, "steps": 50}}
    runs.add("signal on rank 1", "signal", {"step": 3, "rank": 1, "signal": "SIGUSR2"}, **recorded)
    runs.add("after the signal", "signal", **recorded)
    runs.add("signal on rank 0", "term", {"step": 3, "rank": 0, "signal": "SIGTERM"})
    # Due by the clock of the host, each would save or leave at once after a jump of a day.
    timed = {"output__save_every_minutes": 60.0, "faults__time_limit_minutes": 600.0}
    for name, seconds in (("clock ahead", 86400.0), ("clock back", -86400.0)):
        runs.add(name, name, {"step": 2, "clock": seconds, "undo": 5}, **timed)
    runs.add("stop file", "files", {"step": 1, "touch": "STOP"})
    runs.add("save file", "files", {"step": 2, "touch": "SAVE"})
    runs.add("time limit", "limit", faults__time_limit_minutes=1e-9)
    held_out = {"dataset": {"name": str(workshop.rows), "max_examples": 1}, "metric": "exact_match"}
    held_out |= {"max_new_tokens": 4, "answer_pattern": "(?P<answer>.+)", "batch_size": 1}
    # One held-out row: rank 1 has none of its own, neither for the loss nor to answer.
    one_row = {"num_epochs": 1, "max_steps": 2, "global_batch_size": 2, "scheduler_type": "constant"}
    runs.add("one row", "one_row", evaluation=held_out, training__schedule=one_row)
    in_evaluation = {"step": 2, "rank": 1, "signal": "SIGTERM", "phase": "evaluating"}
    runs.add("leave an evaluation", "evaluating", in_evaluation, evaluation=held_out, training__schedule=one_row)
    runs.add("after the evaluation", "evaluating", evaluation=held_out, training__schedule=one_row)
    stop = {"step": 2, "touch": "STOP", "phase": "evaluating"}
    runs.add("stop an evaluation", "stopped", stop, evaluation=held_out, training__schedule=one_row)
    midway = {**held_out, "every_steps": 1}
    runs.add("leave midway", "midway", {**in_evaluation, "step": 1}, evaluation=midway, training__schedule=one_row)
    runs.add("after midway", "midway", evaluation=midway, training__schedule=one_row)
    poison = {"dataset__name": poisoned}
    runs.add("not finite: stop", "stop", **poison)
    runs.add("not finite at once", "once", dataset__name=first)
    runs.add("not finite: skip", "skip", **poison, faults__nonfinite="skip")
    runs.add("not finite too often", "often", **poison, faults={"nonfinite": "skip", "max_skipped_steps": 1})
    spike = {"dataset__name": jump, "output__save_every": 1}
    runs.add("spike", "spike", **spike, **recorded, faults={"spike_factor": 5, "spike_window": 1})
    runs.add("no spike", "no_spike", **spike)
    return runs.start()


def test_a_signal_to_one_rank_is_heard_by_all_and_the_rerun_is_the_whole_run(told: dict[str, Told]) -> None:
    first, again, whole = told["signal on rank 1"], told["after the signal"], told["whole"]
    assert first.hows == ["left", "left"] and {ending["text"] for ending in first.endings} == {"SIGUSR2"}
    assert any("left" in line and "step 3" in line and "SIGUSR2" in line for line in first.endings[0]["said"])
    assert again.hows == ["trained", "trained"]
    assert any("after step 3" in line for line in again.endings[0]["said"])
    assert again.losses == whole.losses and list(again.losses) == list(range(1, STEPS + 1))
    expected, resumed = (load_file(run.folder / "model" / "model.safetensors") for run in (whole, again))
    assert all(resumed[name].equal(tensor) for name, tensor in expected.items())


def test_a_run_that_leaves_while_it_is_profiled_leaves_the_trace(told: dict[str, Told]) -> None:
    traces = sorted((told["signal on rank 1"].folder / "profile").iterdir())
    assert [path.name for path in traces] == ["steps-2-3.json", f"steps-4-{STEPS}.json"]
    for path in traces:
        json.loads(path.read_text())


def test_sigterm_leaves_a_checkpoint_of_the_same_step(told: dict[str, Told]) -> None:
    run = told["signal on rank 0"]
    assert run.hows == ["left", "left"] and run.checkpoints() == [3]
    assert [line["reason"] for line in run.lines("left")] == ["SIGTERM"]


@pytest.mark.parametrize("name", ["clock ahead", "clock back"])
def test_a_clock_that_jumps_changes_nothing(told: dict[str, Told], name: str) -> None:
    run, whole = told[name], told["whole"]
    assert run.hows == ["trained", "trained"] and run.losses == whole.losses
    assert run.checkpoints() == whole.checkpoints() == [STEPS]
    expected, weights = (load_file(each.folder / "model" / "model.safetensors") for each in (whole, run))
    assert all(weights[key].equal(tensor) for key, tensor in expected.items())


def test_files_in_the_folder_ask_to_leave_and_to_save(told: dict[str, Told]) -> None:
    stopped, saved = told["stop file"], told["save file"]
    assert stopped.hows == ["left", "left"] and "STOP" in stopped.endings[1]["text"]
    assert saved.hows == ["trained", "trained"]
    assert any("after step 1" in line for line in saved.endings[0]["said"])
    assert not (saved.folder / "STOP").exists() and not (saved.folder / "SAVE").exists()
    assert saved.checkpoints() == [2, STEPS]


def test_a_time_limit_leaves_in_time(told: dict[str, Told]) -> None:
    run = told["time limit"]
    assert run.hows == ["left", "left"] and run.checkpoints() == [1]
    assert run.endings[1]["text"] == "the time limit is near"


def test_a_rank_without_rows_is_not_left_behind(told: dict[str, Told]) -> None:
    run = told["one row"]
    assert run.hows == ["trained", "trained"]
    assert [line["questions"] for line in run.lines("evaluation") if "questions" in line] == [1]


def test_an_evaluation_is_left_and_done_again(told: dict[str, Told]) -> None:
    left, again = told["leave an evaluation"], told["after the evaluation"]
    assert left.hows == ["left", "left"] and left.checkpoints() == [2]
    assert again.hows == ["trained", "trained"]
    assert again.losses == told["one row"].losses
    assert again.lines("evaluation") == told["one row"].lines("evaluation")
    stopped = told["stop an evaluation"]
    assert stopped.hows == ["left", "left"] and stopped.checkpoints() == [2]
    assert not (stopped.folder / "STOP").exists(), "the rerun would leave again, for ever"


def test_an_evaluation_that_was_left_midway_is_caught_up_on(told: dict[str, Told]) -> None:
    left, again = told["leave midway"], told["after midway"]
    assert left.hows == ["left", "left"] and again.hows == ["trained", "trained"]
    assert any("after step 1" in line for line in again.endings[0]["said"])
    assert [line["step"] for line in again.lines("evaluation")] == [0, 1, 2]
    assert again.losses == told["one row"].losses


def test_a_loss_that_is_not_finite_stops_the_run_and_names_the_document(told: dict[str, Told]) -> None:
    run = told["not finite: stop"]
    assert run.hows == ["DivergenceError", "DivergenceError"]
    text = run.endings[0]["text"]
    assert text == run.endings[1]["text"]
    assert f"from {POISON};" in text, text
    bad = max(run.losses, default=0) + 1
    assert f"step {bad} is not finite" in text
    # Nothing is lost: the last good step is saved, though no checkpoint was due.
    assert run.checkpoints() == ([bad - 1] if bad > 1 else [])


def test_a_first_step_that_is_not_finite_is_the_datas_fault_and_not_the_kernels(told: dict[str, Told]) -> None:
    run = told["not finite at once"]
    assert run.hows == ["DivergenceError", "DivergenceError"]
    assert all("step 1 is not finite" in ending["text"] for ending in run.endings)
    assert all("rows.jsonl:13" in ending["text"] and "nothing is saved" in ending["text"] for ending in run.endings)


def test_steps_that_are_not_finite_can_be_passed_over_and_are_counted(told: dict[str, Told]) -> None:
    run = told["not finite: skip"]
    assert run.hows == ["trained", "trained"]
    skipped = [line["step"] for line in run.lines("skipped")]
    assert skipped and sorted([*skipped, *run.losses]) == list(range(1, STEPS + 1))
    assert all(POISON in line["documents"][0] and len(line["documents"]) == 1 for line in run.lines("skipped"))
    state = json.loads((run.folder / "checkpoints" / f"step-{STEPS:08d}" / "seqaware.json").read_text())
    assert state["passed_over"] == skipped
    # Until the first of them, it is the run that stopped there.
    assert {step: loss for step, loss in run.losses.items() if step < skipped[0]} == told["not finite: stop"].losses
    weights = load_file(run.folder / "model" / "model.safetensors")
    assert all(bool(tensor.isfinite().all()) for tensor in weights.values())


def test_too_many_of_them_stop_the_run(told: dict[str, Told]) -> None:
    run = told["not finite too often"]
    assert run.hows == ["DivergenceError", "DivergenceError"]
    assert len(run.lines("skipped")) == 1


def test_a_spike_is_gone_back_from_and_passed_over(told: dict[str, Told]) -> None:
    run, plain = told["spike"], told["no spike"]
    assert run.hows == ["trained", "trained"]
    spikes = [line["spike"] for line in run.lines("rewind")]
    assert spikes, "the planted document is in one of the first steps"
    assert sorted([*spikes, *run.losses]) == list(range(1, STEPS + 1))
    before = [step for step in plain.losses if step < spikes[0]]
    assert [run.losses[step] for step in before] == [plain.losses[step] for step in before]
    assert plain.losses[spikes[0]][0] == run.lines("rewind")[0]["loss"]
    state = json.loads((run.folder / "checkpoints" / f"step-{STEPS:08d}" / "seqaware.json").read_text())
    assert state["passed_over"] == spikes
    # The profiler's window begins anew where the run went back to.
    traces = [path.name for path in (run.folder / "profile").iterdir()]
    assert f"steps-{spikes[-1]}-{STEPS}.json" in traces and all(name.endswith(".json") for name in traces), traces
