"""Whether a checkpoint belongs to the run: what counts as a change, and what an earlier version did not record."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from seqaware.checkpoint.manifest import RunState, checkpoint_name, read_listing
from seqaware.config.loading import REPOSITORY
from seqaware.errors import CheckpointError
from seqaware.plan.plan import Plan
from seqaware.plan.specs import World
from seqaware.training.resume import resume_points, unrecorded
from tests.fakes import checkpoint_folder
from tests.unit.plan.test_plan import config, plan


def _saved(folder: Path, made: Plan, *, step: int = 3) -> Path:
    """A checkpoint of a run of `made`, as far as its manifest goes."""
    state = RunState.of(made, step=step, epoch=0)
    path = folder / checkpoint_name(step)
    recorded = {"mathematics": state.mathematics, "plan_hash": state.plan_hash}
    return checkpoint_folder(path, step, data_fingerprint=state.data_fingerprint, **recorded)


def _resumed(folder: Path, made: Plan, **options: Any) -> Path | None:
    found = resume_points(folder, made, resume="auto", **options).newest
    return None if found is None else found.path


def _of(**schedule: Any) -> Plan:
    return plan(config(training={"schedule": schedule}))


def test_a_run_of_one_epoch_by_default_resumes_as_it_was_written(tmp_path: Path) -> None:
    """Up to 0.1, `num_epochs` was 1 where it was not written, also beside max_steps: 63 steps here."""
    checkpoint = _saved(tmp_path, _of(num_epochs=1, max_steps=100))
    assert _resumed(tmp_path, _of(num_epochs=1, max_steps=100)) == checkpoint
    assert _resumed(tmp_path, _of()) == checkpoint, "one epoch, whether written or not"
    assert _resumed(tmp_path, _of(max_steps=100), anyway=("schedule",)) == checkpoint
    with pytest.raises(
        CheckpointError,
        match=r"schedule\.total_steps was 63 and is now 100; write training\.schedule\.num_epochs: 1, .*; to resume "
        r"all the same, write --resume-anyway schedule",
    ):
        _resumed(tmp_path, _of(max_steps=100))
    # Nothing earlier versions did explains the difference here.
    with pytest.raises(CheckpointError) as refused:
        _resumed(tmp_path, _of(max_steps=100, num_epochs=1.2))
    assert "num_epochs: 1" not in str(refused.value)


def test_a_run_at_a_constant_rate_trains_on_to_its_max_steps(tmp_path: Path) -> None:
    checkpoint = _saved(tmp_path, _of(num_epochs=1, max_steps=100, scheduler_type="constant"), step=63)
    longer = _of(max_steps=100, scheduler_type="constant")
    assert _resumed(tmp_path, longer) == checkpoint and longer.total_steps == 100


def test_an_edited_weighting_function_is_another_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    source = tmp_path / "mine.py"
    source.write_text("def late(k, length):\n    return k\n")
    written = config(training={"sft": {"weighting": "mine:late"}})
    checkpoint = _saved(tmp_path / "checkpoints", plan(written))
    assert _resumed(tmp_path / "checkpoints", plan(written)) == checkpoint
    assert unrecorded(read_listing(checkpoint).state, plan(written)) is None
    source.write_text("def late(k, length):\n    return k * 2\n")
    with pytest.raises(CheckpointError, match=r"objective\.weighting_source was .* --resume-anyway objective"):
        _resumed(tmp_path / "checkpoints", plan(written))
    assert _resumed(tmp_path / "checkpoints", plan(written), anyway=("objective",)) == checkpoint


def test_a_checkpoint_that_records_the_functions_name_alone_resumes_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As earlier versions wrote it."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text("def late(k, length):\n    return k\n")
    now = plan(config(training={"sft": {"weighting": "mine:late"}}))
    before = replace(now, weighting_source=None)
    assert before.mathematics_hash() == "183f45c0bd7c60b3d05e8a831fe246c0317382f6e1c44f98326ed5428ab4eb6a"
    checkpoint = _saved(tmp_path / "checkpoints", before)
    assert _resumed(tmp_path / "checkpoints", now) == checkpoint
    gap = unrecorded(read_listing(checkpoint).state, now)
    assert gap is not None and "does not record the source of training.sft.weighting mine:late" in gap
    # Its name has always counted.
    other = plan(config(training={"sft": {"weighting": "mine:early"}}))
    with pytest.raises(CheckpointError, match=r'objective\.weighting was "mine:late" and is now "mine:early"'):
        _resumed(tmp_path / "checkpoints", other)


@pytest.mark.parametrize(
    ("optimizer", "was", "refused"),
    [
        ("muon", (2, 2), False),
        ("muon", (2, 1), False),
        ("muon", (3, 2), True),
        ("muon", (2, 3), True),
        ("adamw_8bit", (1, 2), True),
        ("adamw", (3, 3), False),
    ],
)
def test_an_optimizer_that_cannot_be_resharded_is_refused_by_the_manifest(
    tmp_path: Path, optimizer: str, was: tuple[int, int], refused: bool
) -> None:
    """Before a model loads, in one sentence, with advice that applies."""
    ranks, stage = was
    here = World(2, 2, 1, "cpu", bf16=True)
    made = plan(world=here, deepspeed_path=REPOSITORY / "ds_configs" / "zero2.json")
    mathematics = made.mathematics()
    mathematics["optimizer"] |= {"type": optimizer}
    topology = {"ranks": ranks, "zero_stage": stage}
    path = checkpoint_folder(tmp_path / checkpoint_name(3), 3, mathematics=mathematics, topology=topology)
    if not refused:
        assert _resumed(tmp_path, made, anyway=("optimizer",)) == path
        return
    with pytest.raises(CheckpointError) as error:
        _resumed(tmp_path, made, anyway=("optimizer",))
    message = str(error.value)
    assert message.count("; got ") == 1
    assert f"a run with {optimizer} cannot resume on another topology" in message
    assert (
        f"start {ranks} rank(s) at ZeRO-{stage}, or train a new run from its weights: seqaware export {path}" in message
    )
