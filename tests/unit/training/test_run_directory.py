"""A run's folder, claimed: whatever a crash has left of it, the same command goes on, or says what is wrong."""

from __future__ import annotations

import errno
import fcntl
import itertools
import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from seqaware.checkpoint.manifest import MANIFEST, checkpoint_name, read_listing
from seqaware.distributed.launch_environment import LaunchEnvironment
from seqaware.errors import CheckpointError, ConfigError
from seqaware.locks import LEASE_SECONDS
from seqaware.training import run_directory as claiming
from seqaware.training import run_lock
from seqaware.training.resume import ResumePoints, ResumeRequest, first_valid, refuse_different_plans
from seqaware.training.run_directory import (
    RunDirectory,
    allowed_before,
    attempts_before,
    check_claim,
    claim,
    is_finished,
)
from seqaware.training.run_lock import LOCK, locked_run
from tests.fakes import checkpoint_folder
from tests.unit.plan.test_plan import plan

ALONE = LaunchEnvironment(0, 1, 0, 1, 1, "none", "127.0.0.1", 29500)


class TwoRanks:
    """Rank 0, beside a rank 1 that always says the same."""

    rank, size, is_first = 0, 2, True

    def __init__(self, other: Any) -> None:
        self.other = other

    def gather(self, value: Any) -> list[Any]:
        return [value, self.other]


def _checkpoint(run: Path, step: int) -> Path:
    return checkpoint_folder(run / "checkpoints" / checkpoint_name(step), step)


@pytest.mark.parametrize("written", range(4))
def test_a_claim_that_is_broken_off_at_any_file_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, written: int
) -> None:
    run, files = RunDirectory(tmp_path / "run"), []
    write = claiming.write_durably

    def killed(path: Path, text: str) -> None:
        if len(files) == written:
            path.with_name(path.name + ".partial").write_text(text[:100])
            raise KeyboardInterrupt
        files.append(path)
        write(path, text)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(claiming, "write_durably", killed)
        claim(run, plan(), address=ALONE)
        raise KeyboardInterrupt
    check_claim(run, plan(), resume="auto")
    claim(run, plan(), address=ALONE)
    assert json.loads(run.manifest.read_text())["attempts"] and (run.path / "config.yaml").exists()


@pytest.mark.parametrize("path", ["/dev/null", "/dev/null/x/y", "file", "file/x"])
def test_a_folder_that_is_a_file_or_lies_in_one_is_refused(tmp_path: Path, path: str) -> None:
    (tmp_path / "file").touch()
    run = RunDirectory(tmp_path / path)
    # What a start asks first: see training/run.py.
    assert attempts_before(run) == [] and not allowed_before(run)
    with pytest.raises(ConfigError, match=r"output\.dir is not a folder; got .*; choose another"):
        check_claim(run, plan(), resume="auto")


@pytest.mark.parametrize("content", ["", '{"mathematics": {', "[]", "{}", "\x00\x00"])
def test_a_damaged_manifest_is_an_error_that_says_how_to_go_on(tmp_path: Path, content: str) -> None:
    run = RunDirectory(tmp_path)
    claim(run, plan(), address=ALONE)
    checkpoint = _checkpoint(tmp_path, 3)
    run.manifest.write_text(content)
    with pytest.raises(ConfigError, match=rf"manifest.json is damaged.*another output.dir.*--resume {checkpoint}"):
        check_claim(run, plan(), resume="auto")
    with pytest.raises(ConfigError, match=r"manifest\.json is damaged"):
        allowed_before(run)
    with pytest.raises(ConfigError, match=r"manifest\.json is damaged"):
        is_finished(run, plan())


def test_a_lock_that_cannot_be_opened_is_an_error_in_words(tmp_path: Path) -> None:
    (tmp_path / LOCK).mkdir()
    with (
        pytest.raises(ConfigError, match=r"output\.dir cannot be locked.*Is a directory"),
        locked_run(tmp_path, ALONE, say=print),
    ):
        pass


FOREIGN = "filelock/2\npid=7\nhost=other\nmode=lease\ntoken=0123\nduration={seconds!r}\n"


@pytest.fixture
def no_flock(monkeypatch: pytest.MonkeyPatch) -> None:
    """A file system without locks."""

    def missing(file: int, operation: int) -> None:
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", missing)


def test_on_a_disk_without_locks_a_run_that_lives_keeps_others_out(
    tmp_path: Path, no_flock: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    renewing = iter(range(2_000_000_000, 2_000_000_100))
    lease = tmp_path / ".lease"
    monkeypatch.setattr(run_lock.time, "sleep", lambda seconds: os.utime(lease, (next(renewing),) * 2))
    with locked_run(tmp_path, ALONE, say=said.append):
        assert "expires after 180 s" in said[0]
    assert not lease.exists()
    lease.write_text(FOREIGN.format(seconds=LEASE_SECONDS))  # another host's; it renews it while we look
    with (
        pytest.raises(ConfigError, match=r"another run is at work in output\.dir.*process 7 on other"),
        locked_run(tmp_path, ALONE, say=said.append),
    ):
        pass
    assert lease.read_text().startswith("filelock/2\npid=7\n")


def test_on_a_disk_without_locks_a_run_of_a_dead_host_gives_way(
    tmp_path: Path, no_flock: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By what has gone by while it was watched, not by its age: clocks of hosts differ."""
    said: list[str] = []
    clock = itertools.count(0, 100)
    lease = tmp_path / ".lease"
    lease.write_text(FOREIGN.format(seconds=LEASE_SECONDS))
    monkeypatch.setattr(run_lock.time, "sleep", lambda seconds: None)
    monkeypatch.setattr("filelock._soft.time.monotonic", lambda: float(next(clock)))
    with locked_run(tmp_path, ALONE, say=said.append):
        assert f"pid={os.getpid()}\n" in lease.read_text()
    assert "held by process 7 on other" in said[1]
    assert not lease.exists()
    check_claim(RunDirectory(tmp_path), plan(), resume="auto")  # what is left does not claim the folder


def test_a_host_that_does_not_see_the_checkpoints_makes_no_run_begin_anew(tmp_path: Path) -> None:
    points = ResumePoints(read_listing(_checkpoint(tmp_path, 3)))
    assert first_valid(points, plan(), TwoRanks(None), say=print) == points.newest  # type: ignore[arg-type]
    with pytest.raises(CheckpointError, match=r"does not see.*on rank 1, where seqaware\.json is missing"):
        first_valid(points, plan(), TwoRanks(MANIFEST), say=print)  # type: ignore[arg-type]


def test_ranks_that_read_different_runs_are_refused() -> None:
    class Hosts(TwoRanks):
        """Rank 1 has another file of the weighting function."""

        def gather(self, value: Any) -> list[Any]:
            return [value, self.other.mathematics() if isinstance(value, dict) else self.other.mathematics_hash()]

    other = replace(plan(), weighting_source="f" * 64)
    refuse_different_plans(plan(), Hosts(plan()))  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"different runs; got another objective on rank 1 than on rank 0"):
        refuse_different_plans(plan(), Hosts(other))  # type: ignore[arg-type]


def test_who_starts_again_by_itself_goes_on_and_not_back(tmp_path: Path) -> None:
    run, path = RunDirectory(tmp_path / "run"), "elsewhere/step-00000002"
    job = {"SLURM_JOB_ID": "7"}
    first = ResumeRequest.of(path, job)
    assert first.now(attempts_before(run)) == path
    claim(run, plan(), address=ALONE, asked=first)
    assert ResumeRequest.of(path, job).now(attempts_before(run)) == path, "a person's second srun in one allocation"
    for count in ("1", "2"):  # requeued, and again
        requeued = ResumeRequest.of(path, {**job, "SLURM_RESTART_COUNT": count})
        assert requeued.now(attempts_before(run)) == "auto"
        claim(run, plan(), address=ALONE, asked=requeued)
    other = {"SLURM_JOB_ID": "8", "SLURM_RESTART_COUNT": "3"}
    assert ResumeRequest.of(path, other).now(attempts_before(run)) == path
    assert ResumeRequest.of("never", {**job, "SLURM_RESTART_COUNT": "3"}).now(attempts_before(run)) == "never"
    assert ResumeRequest.of(path, {}).now(attempts_before(run)) == path


def test_ranks_that_torchrun_starts_anew_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    elastic = {"TORCHELASTIC_RUN_ID": "none"}
    before = ResumeRequest.of("never", elastic)
    asked = [{"asked": {"resume": "never", "launch": before.launch, "start": before.start}}]
    assert before.now(asked) == "never"
    with monkeypatch.context() as patch:
        patch.setattr("os.getpid", lambda: before.start + 1)
        assert ResumeRequest.of("never", elastic).now(asked) == "auto"
        patch.setattr("os.getppid", lambda: 1)  # another agent: a person has given the command again
        assert ResumeRequest.of("never", elastic).now(asked) == "never"
