"""Which checkpoint a run goes on from: damaged ones are passed over, changed runs refused, one run at a time.

All runs but one share a process: what happens to their folders before each of them is in `damage.py`.
"""

from __future__ import annotations

import json
import signal
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from seqaware.checkpoint.manifest import read_manifest
from tests import launch, tiny
from tests.e2e.damage import checkpoint, largest
from tests.e2e.many_runs import Outcome, launch_all

LAST = 5


@dataclass(frozen=True)
class Told:
    """How a run ended, and the folder it was in."""

    folder: Path
    outcome: Outcome

    @property
    def how(self) -> str:
        return str(self._ending["how"])

    @property
    def text(self) -> str:
        return str(self._ending["text"])

    @property
    def said(self) -> list[str]:
        return list(self._ending["said"])

    @property
    def _ending(self) -> dict[str, Any]:
        (ending,) = self.outcome.check().results
        return dict(ending)

    @property
    def everything(self) -> str:
        return " ".join("\n".join(self.said).split())

    @property
    def manifest(self) -> dict[str, Any]:
        manifest: dict[str, Any] = json.loads((self.folder / "manifest.json").read_text())
        return manifest

    @property
    def steps(self) -> list[tuple[int, float, float]]:
        lines = [json.loads(line) for line in (self.folder / "metrics.jsonl").read_text().splitlines()]
        return [(line["step"], line["loss"], line["grad_norm"]) for line in lines if line["kind"] == "step"]

    def same_as(self, other: Told) -> bool:
        """Whether both trained the same: every step and the last weights, bitwise."""
        ours, others = (load_file(each.folder / "model" / "model.safetensors") for each in (self, other))
        return self.steps == other.steps and all(ours[name].equal(tensor) for name, tensor in others.items())


class Stages:
    """Collects runs, and does them in one process."""

    def __init__(self, workshop: tiny.Workshop) -> None:
        self.workshop = workshop
        self.requests: list[dict[str, Any]] = []
        self.names: list[tuple[str, Path]] = []

    def add(
        self, name: str, run: str, *before: list[Any], resume: str = "auto", anyway: str = "", **changes: Any
    ) -> None:
        """A run in the folder `run`, after what is done to the disk before it."""
        path = self.config(run, **changes)
        zero1 = str(launch.DS_CONFIGS / "zero1.json")
        names = anyway.split(",") if anyway else []
        self.names.append((name, Path(run)))
        request = {"config": str(path), "deepspeed": zero1, "resume": resume, "anyway": names, "before": before}
        self.requests.append(request)

    def config(self, run: str, **changes: Any) -> Path:
        schedule = {"num_epochs": 9, "max_steps": LAST, "scheduler_type": "constant", "global_batch_size": 5}
        output = {"dir": run, "save_every": 1, "keep_last": LAST, **changes.pop("output", {})}
        settings = {"training__schedule": schedule, "output": output, "model__dropout": 0.1, **changes}
        return self.workshop.write(f"run-{len(self.requests)}", self.workshop.config(**settings))

    def start(self) -> dict[str, Told]:
        script, folder = "tests/e2e/staged_runs.py", self.workshop.folder / "launches"
        outcomes = launch_all(self.requests, ranks=1, folder=folder, script=script)
        return {name: Told(run, outcome) for (name, run), outcome in zip(self.names, outcomes, strict=True)}


def _other_tokenizer(workshop: tiny.Workshop) -> Path:
    """One that reads capitals as small letters: the vocabulary stays."""
    tokenizer = tiny.train_tokenizer()
    folder = workshop.folder / "tokenizer"
    tokenizer.save_pretrained(folder)
    content = json.loads((folder / "tokenizer.json").read_text())
    (folder / "tokenizer.json").write_text(json.dumps({**content, "normalizer": {"type": "Lowercase"}}))
    return folder


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Told]:
    workshop = tiny.build(tmp_path_factory.mktemp("trusted"))
    stages = Stages(workshop)
    at = {name: str(workshop.folder / name) for name in ("whole", "damaged", "hopeless", "killed", "kept", "changed")}
    more = (
        "best",
        "taken",
        "planted",
        "outside",
        "elsewhere",
        "made by the pickle",
        "moved",
        "the good one",
        "foreign",
        "orphan",
    )
    at |= {name: str(workshop.folder / name) for name in more}
    behind = {"async_save": True}
    killed = stages.config(at["killed"], output=behind)
    assert launch.forked("tests/e2e/killed_save.py", str(killed), ranks=1).returncode == -signal.SIGKILL

    stages.add("whole", at["whole"], output=behind)
    damages = [["flip", at["damaged"], 2], ["truncate", at["damaged"], 3], ["lose", at["damaged"], 4]]
    stages.add("damaged", at["damaged"], ["copy_until", at["whole"], at["damaged"], 4], *damages)
    torn = str(Path(at["damaged"], "checkpoints", "abandoned-0001-step-00000003"))
    stages.add("asked for a torn one", at["whole"], resume=torn)
    flipped = str(Path(at["damaged"], "checkpoints", "abandoned-0001-step-00000002"))
    stages.add("asked for a flipped one", at["elsewhere"], resume=flipped)
    hopeless = [
        ["copy_until", at["whole"], at["hopeless"], 2],
        ["flip", at["hopeless"], 1],
        ["lose", at["hopeless"], 2],
    ]
    stages.add("hopeless", at["hopeless"], *hopeless)
    stages.add("after the kill", at["killed"], output=behind)

    new = {"training__sft": {"gamma": 0.5}, "training__optimizer": {"lr": 2e-3}}
    stages.add("changed", at["changed"], ["copy_until", at["whole"], at["changed"], 4], **new)
    stages.add("half allowed", at["changed"], anyway="optimizer", **new)
    stages.add("misspelt", at["changed"], anyway="objektive", **new)
    stages.add("allowed", at["changed"], anyway="objective,optimizer", **new)
    # As if it had been killed before it saved: only the checkpoints of the run as it was are there.
    stages.add("after it was allowed", at["changed"], ["forget_after", at["changed"], 4], **new)
    stages.add("changed back", at["changed"])
    stages.add("another tokenizer", at["changed"], **new, model__tokenizer=str(_other_tokenizer(workshop)))

    stages.add(
        "taken", at["taken"], ["copy_until", at["whole"], at["taken"], 4], ["lock", at["taken"], "process 1 on moon"]
    )
    stages.add("given back", at["taken"], ["unlock"])
    plant = ["plant", at["planted"], 4, at["made by the pickle"]]
    stages.add("planted", at["planted"], ["copy_until", at["whole"], at["planted"], 4], plant)
    stages.add(
        "outside", at["outside"], ["copy_until", at["whole"], at["outside"], 4], ["name_outside", at["outside"], 4]
    )

    moved = [["copy_until", at["whole"], at["moved"], 3], ["copy_checkpoint", at["whole"], 2, at["the good one"]]]
    stages.add("moved", at["moved"], *moved, resume=at["the good one"])

    own, stranger = (str(checkpoint(at["foreign"], step)) for step in (2, LAST))
    foreign = [["copy_until", at["whole"], at["foreign"], 2], ["copy_checkpoint", at["changed"], LAST, stranger]]
    stages.add("foreign", at["foreign"], *foreign)
    stages.add("own, asked for", at["foreign"], resume=own)

    named = str(checkpoint(at["orphan"], 2))
    lost = ["remove", at["orphan"], "manifest.json", "plan.json", "config.yaml", "metrics.jsonl"]
    stages.add("orphan", at["orphan"], ["copy_until", at["whole"], at["orphan"], 3], lost)
    stages.add("adopted from outside", at["orphan"], resume=at["the good one"])
    stages.add("adopted by another run", at["orphan"], resume=named, **new)
    stages.add("adopted", at["orphan"], resume=named)

    held_out = {"dataset": {"name": str(workshop.rows), "max_examples": 4}, "every_steps": 1}
    keep = {"keep_last": 1, "keep_every": 2, "keep_best": 1}
    schedule = {"num_epochs": 9, "scheduler_type": "constant", "global_batch_size": 5}
    for steps in (3, LAST):
        short = {**schedule, "max_steps": steps}
        stages.add(f"kept until {steps}", at["kept"], output=keep, evaluation=held_out, training__schedule=short)
    # Evaluated by the clock, after every step; a rate at which the loss rises and falls. Saved only where an evaluation
    # asks for it, in the background, while the next one may already be due.
    stages.add(
        "best",
        at["best"],
        output={"save_every": None, "keep_last": 1, "keep_best": 2, "async_save": True},
        evaluation={"dataset": held_out["dataset"], "every_minutes": 1e-9},
        training__optimizer={"lr": 0.03},
    )
    return stages.start()


def test_damaged_checkpoints_are_passed_over_by_name_and_the_run_is_the_whole_one(told: dict[str, Told]) -> None:
    whole, damaged = told["whole"], told["damaged"]
    assert whole.how == damaged.how == "trained", damaged.text
    for step, what in ((4, "is missing"), (3, "has"), (2, "is damaged: its SHA-256 is")):
        file = "zero_pp_rank_0_mp_rank_00_optim_states.pt"
        path = checkpoint(damaged.folder, step)
        assert f"skipped the invalid checkpoint {path}: {file} {what}" in damaged.everything
    assert "resumed after step 1" in damaged.everything
    # Saved at once here and in the background there, dropout drawn on from where it was: bitwise the same.
    assert damaged.same_as(whole)
    assert (damaged.folder / "checkpoints" / "latest").read_text() == f"step-{LAST:08d}"


def test_a_damaged_checkpoint_that_is_asked_for_is_refused(told: dict[str, Told]) -> None:
    torn, flipped = told["asked for a torn one"], told["asked for a flipped one"]
    assert torn.how == flipped.how == "CheckpointError"
    assert "zero_pp_rank_0_mp_rank_00_optim_states.pt has" in torn.text
    assert "zero_pp_rank_0_mp_rank_00_optim_states.pt is damaged" in flipped.text


def test_a_run_without_a_whole_checkpoint_begins_anew_and_says_so(told: dict[str, Told]) -> None:
    hopeless = told["hopeless"]
    assert hopeless.everything.count("skipped the invalid") == 2 and "starting from scratch" in hopeless.everything
    assert hopeless.same_as(told["whole"])


def test_a_checkpoint_may_be_named_wherever_it_lies_and_whatever_it_is_called(told: dict[str, Told]) -> None:
    moved = told["moved"]
    assert "resumed after step 2" in moved.everything and moved.same_as(told["whole"]), moved.text
    assert [path.name[-8:] for path in (moved.folder / "checkpoints").glob("abandoned-*")] == ["00000003"]


def test_another_runs_checkpoint_in_the_folder_is_refused_and_set_aside(told: dict[str, Told]) -> None:
    foreign, asked = told["foreign"], told["own, asked for"]
    assert foreign.how == "CheckpointError" and "belongs to another run" in foreign.text
    assert f"step-{LAST:08d}" in foreign.text and "objective.gamma was 0.5 and is now 0.98" in foreign.text
    assert asked.same_as(told["whole"]), asked.text
    assert [path.name[-8:] for path in (asked.folder / "checkpoints").glob("abandoned-*")] == [f"{LAST:08d}"]


def test_a_run_without_its_manifest_names_its_checkpoints_and_is_adopted(told: dict[str, Told]) -> None:
    orphan, adopted = told["orphan"], told["adopted"]
    newest = checkpoint(orphan.folder, 3)
    for refused in (orphan, told["adopted from outside"]):
        assert refused.how == "ConfigError" and "no manifest.json" in refused.text
        assert "step-00000003, step-00000002, step-00000001" in refused.text and f"--resume {newest}" in refused.text
    other = told["adopted by another run"]
    assert other.how == "CheckpointError" and "objective.gamma was 0.98 and is now 0.5" in other.text
    assert adopted.how == "trained" and "resumed after step 2" in adopted.everything
    assert adopted.manifest["attempts"][0]["from_step"] == 2
    whole = told["whole"]
    # The metrics of the first steps went with the manifest.
    assert adopted.steps == whole.steps[2:]
    weights = load_file(adopted.folder / "model" / "model.safetensors")
    expected = load_file(whole.folder / "model" / "model.safetensors")
    assert all(weights[name].equal(tensor) for name, tensor in expected.items())


def test_a_kill_while_a_checkpoint_is_written_leaves_the_one_before_as_the_newest(told: dict[str, Told]) -> None:
    killed = told["after the kill"]
    assert "resumed after step 1" in killed.everything and "skipped" not in killed.everything
    assert killed.same_as(told["whole"])
    assert not list((killed.folder / "checkpoints").glob("*.partial"))


def test_a_checkpoint_tells_what_it_is_of(told: dict[str, Told]) -> None:
    plan = json.loads((told["whole"].folder / "plan.json").read_text())
    manifest = read_manifest(checkpoint(told["whole"].folder, LAST)).model_dump(mode="json")
    assert (manifest["step"], manifest["epoch"], manifest["passed_over"]) == (LAST, 1, [])
    assert manifest["plan_hash"] == plan["mathematics_hash"] and manifest["mathematics"] == plan["mathematics"]
    assert manifest["data_fingerprint"] == plan["data"]["fingerprint"]
    assert manifest["tokenizer"] == {"digest": plan["data"]["tokenizer"]} and len(plan["data"]["tokenizer"]) == 64
    assert manifest["objective"]["gamma"] == 0.98
    assert manifest["topology"] == {"ranks": 1, "nodes": 1, "zero_stage": 1, "sequence": 1}
    assert {"torch", "deepspeed", "python"} <= set(manifest["versions"])
    folder = checkpoint(told["whole"].folder, LAST)
    assert set(manifest["files"]) == {path.name for path in folder.glob("*.pt")}


def test_a_changed_run_is_refused_with_every_difference(told: dict[str, Told]) -> None:
    changed, half = told["changed"], told["half allowed"]
    assert changed.how == half.how == "ConfigError"
    gamma, rate = "objective.gamma was 0.98 and is now 0.5", "optimizer.lr was 0.001 and is now 0.002"
    assert gamma in changed.text and rate in changed.text and "--resume-anyway objective,optimizer" in changed.text
    assert gamma in half.text and "optimizer.lr" not in half.text
    assert (
        told["misspelt"].how == "ConfigError" and "'objektive'; the names are objective, data" in told["misspelt"].text
    )
    back = told["changed back"]
    assert back.how == "ConfigError" and "objective.gamma was 0.5 and is now 0.98" in back.text


def test_a_changed_run_goes_on_where_its_changes_are_named_and_plainly_from_then_on(told: dict[str, Told]) -> None:
    allowed, after = told["allowed"], told["after it was allowed"]
    assert allowed.how == after.how == "trained", allowed.text + after.text
    assert "resumed after step 4" in allowed.everything and "resumed after step 4" in after.everything
    attempts = after.manifest["attempts"]
    assert attempts[1]["from_step"] == 4 and set(attempts[1]["resumed_anyway"]) == {"objective", "optimizer"}
    gamma = attempts[1]["resumed_anyway"]["objective"]
    assert (gamma["was"]["gamma"], gamma["now"]["gamma"]) == (0.98, 0.5)


def test_a_changed_tokenizer_is_named_as_such(told: dict[str, Told]) -> None:
    text = told["another tokenizer"].text
    assert "tokenizer.digest was" in text and "data.fingerprint was" in text
    assert "--resume-anyway data,tokenizer" in text and "model" not in text.partition("got")[2]


def test_a_second_run_in_the_folder_is_refused(told: dict[str, Told]) -> None:
    taken, given_back = told["taken"], told["given back"]
    assert taken.how == "ConfigError" and "another run is at work" in taken.text and "process 1 on moon" in taken.text
    assert given_back.how == "trained" and given_back.same_as(told["whole"])
    assert len(given_back.manifest["attempts"]) == 2


def test_nothing_that_a_checkpoint_names_is_run_or_opened_outside_it(told: dict[str, Told]) -> None:
    planted, outside = told["planted"], told["outside"]
    assert planted.how == "CheckpointError" and "mp_rank_00_model_states.pt" in planted.text
    assert "posix.mkdir" in planted.text and not (planted.folder.parent / "made by the pickle").exists()
    assert "does not lie in that folder" in outside.everything and "resumed after step 3" in outside.everything
    assert outside.same_as(told["whole"])


def test_the_last_the_regular_and_the_best_checkpoints_are_kept(told: dict[str, Told]) -> None:
    folder = told[f"kept until {LAST}"].folder
    losses = {
        int(step): loss for step, loss in json.loads((folder / "checkpoints" / "evaluations.json").read_text()).items()
    }
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert losses == {line["step"]: line["loss"] for line in lines if line["kind"] == "evaluation" and line["step"]}
    kept = {int(path.name[5:]) for path in (folder / "checkpoints").glob("step-*")}
    assert kept == {2, 4, LAST, min(losses, key=losses.__getitem__)}
    assert largest(checkpoint(folder, LAST)).stat().st_size > 0


def test_the_best_evaluated_steps_are_saved_when_nothing_else_saves_them(told: dict[str, Told]) -> None:
    best = told["best"]
    assert best.how == "trained", best.text
    lines = [json.loads(line) for line in (best.folder / "metrics.jsonl").read_text().splitlines()]
    losses = {line["step"]: line["loss"] for line in lines if line["kind"] == "evaluation" and line["step"]}
    assert set(losses) == set(range(1, LAST + 1))
    lowest = set(sorted(losses, key=losses.__getitem__)[:2])
    assert lowest - {LAST, LAST - 1}, "an early step must be one of the best: the last two are the newest in any case"
    kept = {int(path.name[5:]) for path in (best.folder / "checkpoints").glob("step-*")}
    assert kept == {*lowest, LAST}
