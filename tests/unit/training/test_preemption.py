"""What asks a run to save or to leave: signals, files, the clock."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest

from seqaware.config.output_config import FaultsConfig
from seqaware.distributed.launch_environment import LaunchEnvironment
from seqaware.training.preemption import (
    Minutes,
    PreemptedExit,
    PreemptionMonitor,
    ShutdownRequest,
    Signals,
    clock_ahead_of_job,
    seconds_until_shutdown,
)


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def _interrupts(folder: Path, signals: Signals | None = None, **changes: Any) -> tuple[PreemptionMonitor, Clock]:
    clock = Clock()
    settings: dict[str, Any] = {"first": True, "seconds_left": None, "minutes": Minutes(), **changes}
    return PreemptionMonitor(signals or Signals(), folder, clock=clock, **settings), clock


def test_nothing_is_asked(tmp_path: Path) -> None:
    interrupts, _ = _interrupts(tmp_path)
    assert interrupts.asked() == ShutdownRequest.NOTHING and interrupts.reason is None


@pytest.mark.parametrize(
    ("number", "reason"),
    [(signal.SIGTERM, "SIGTERM"), (signal.SIGUSR2, "SIGUSR2"), (signal.SIGINT, "SIGINT (Ctrl-C)")],
)
def test_a_signal_while_training_is_noted_for_the_vote(tmp_path: Path, number: signal.Signals, reason: str) -> None:
    with Signals() as signals:
        interrupts, _ = _interrupts(tmp_path, signals, first=False)
        signals.hold()
        assert interrupts.asked() == ShutdownRequest.NOTHING
        os.kill(os.getpid(), number)
        assert interrupts.asked() == ShutdownRequest.LEAVE
        assert interrupts.reason == reason


def test_the_launchers_sigterm_does_not_hide_ctrl_c(tmp_path: Path) -> None:
    """The terminal sends SIGINT to deepspeed and to its ranks; deepspeed then sends SIGTERM to the ranks."""
    with Signals() as signals:
        signals.hold()
        interrupts, _ = _interrupts(tmp_path, signals)
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGTERM)
        assert interrupts.asked() == ShutdownRequest.LEAVE and interrupts.reason == "SIGINT (Ctrl-C)"
        with pytest.raises(KeyboardInterrupt):  # a second Ctrl-C still ends the process
            os.kill(os.getpid(), signal.SIGINT)


def test_a_rank_that_leaves_before_the_training_is_not_disturbed_by_the_launchers_sigterm() -> None:
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR2)}
    try:
        with pytest.raises(PreemptedExit) as left, Signals():
            try:
                os.kill(os.getpid(), signal.SIGINT)
            finally:
                os.kill(os.getpid(), signal.SIGTERM)  # no second exception here
        assert left.value.reason == "SIGINT (Ctrl-C)"
        os.kill(os.getpid(), signal.SIGTERM)  # while the command reports how it ends
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def test_before_the_training_a_signal_ends_the_process_with_the_code_for_going_on() -> None:
    with Signals(), pytest.raises(PreemptedExit) as left:
        os.kill(os.getpid(), signal.SIGUSR2)
    assert left.value.code == 85 and not left.value.together


def test_the_second_interrupt_from_the_keyboard_ends_at_once() -> None:
    before = signal.getsignal(signal.SIGINT)
    with Signals() as signals:
        signals.hold()
        os.kill(os.getpid(), signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before


def test_a_rank_that_is_left_alone_does_not_try_to_save() -> None:
    with Signals(abandoned=lambda: True) as signals:
        os.kill(os.getpid(), signal.SIGTERM)
        signals.hold()
        os.kill(os.getpid(), signal.SIGTERM)
        assert signals.caught is None


def test_a_stop_file_asks_to_leave_and_is_gone_for_the_next_run(tmp_path: Path) -> None:
    interrupts, _ = _interrupts(tmp_path)
    (tmp_path / "STOP").touch()
    assert interrupts.asked() == ShutdownRequest.LEAVE
    assert interrupts.reason is not None and "STOP" in interrupts.reason
    interrupts.left()
    assert not (tmp_path / "STOP").exists()


def test_only_the_first_rank_looks_at_files(tmp_path: Path) -> None:
    (tmp_path / "STOP").touch()
    interrupts, _ = _interrupts(tmp_path, first=False)
    assert interrupts.asked() == ShutdownRequest.NOTHING
    interrupts.left()
    assert (tmp_path / "STOP").exists()


def test_a_save_file_asks_once(tmp_path: Path) -> None:
    interrupts, clock = _interrupts(tmp_path)
    (tmp_path / "SAVE").touch()
    assert interrupts.asked() == ShutdownRequest.SAVE
    assert interrupts.asked() == ShutdownRequest.SAVE  # until it is done
    interrupts.saved()
    clock.now += 10.0
    assert interrupts.asked() == ShutdownRequest.NOTHING


def test_files_are_looked_for_once_a_second(tmp_path: Path) -> None:
    interrupts, clock = _interrupts(tmp_path)
    assert interrupts.asked() == ShutdownRequest.NOTHING
    (tmp_path / "SAVE").touch()
    clock.now += 0.5
    assert interrupts.asked() == ShutdownRequest.NOTHING
    clock.now += 0.6
    assert interrupts.asked() == ShutdownRequest.SAVE


def test_minutes_between_checkpoints_count_from_the_last_one(tmp_path: Path) -> None:
    interrupts, clock = _interrupts(tmp_path, minutes=Minutes(save=2.0))
    clock.now += 119.0
    assert interrupts.asked() == ShutdownRequest.NOTHING
    clock.now += 1.0
    assert interrupts.asked() == ShutdownRequest.SAVE
    interrupts.saved()
    clock.now += 119.0
    assert interrupts.asked() == ShutdownRequest.NOTHING


def test_minutes_between_looks_at_held_out_rows_count_by_themselves(tmp_path: Path) -> None:
    interrupts, clock = _interrupts(tmp_path, minutes=Minutes(save=2.0, evaluate=3.0))
    clock.now += 150.0
    assert interrupts.asked() == ShutdownRequest.SAVE
    interrupts.saved()
    clock.now += 30.0
    assert interrupts.asked() == ShutdownRequest.EVALUATE
    clock.now += 120.0
    assert interrupts.asked() == ShutdownRequest.EVALUATE | ShutdownRequest.SAVE < ShutdownRequest.LEAVE
    interrupts.evaluated()
    assert interrupts.asked() == ShutdownRequest.SAVE


def test_the_time_limit(tmp_path: Path) -> None:
    interrupts, clock = _interrupts(tmp_path, seconds_left=30.0)
    assert interrupts.asked() == ShutdownRequest.NOTHING
    clock.now += 30.0
    assert interrupts.asked() == ShutdownRequest.LEAVE and interrupts.reason == "the time limit is near"


def _in_job(began: float | None, ends: float | None) -> LaunchEnvironment:
    return LaunchEnvironment(0, 1, 0, 1, 1, "srun", "n1", 20000, job_began=began, job_ends=ends)


@pytest.mark.parametrize(
    ("written", "job_ends", "seconds"),
    [
        ({}, None, None),
        ({"time_limit_minutes": 60}, None, 55 * 60.0),
        ({"time_limit_minutes": 60, "leave_minutes": 10}, None, 50 * 60.0),
        ({"time_limit_minutes": 8}, None, 6 * 60.0),  # at most a quarter of it
        ({}, 1000.0 + 3600.0, 55 * 60.0),
        ({"time_limit_minutes": 30}, 1000.0 + 3600.0, 25 * 60.0),  # whichever comes first
        ({"time_limit_minutes": 90}, 1000.0 + 3600.0, 55 * 60.0),
    ],
)
def test_how_long_a_run_may_train(written: dict[str, Any], job_ends: float | None, seconds: float | None) -> None:
    assert seconds_until_shutdown(FaultsConfig(**written), _in_job(900.0, job_ends), now=1000.0) == seconds


@pytest.mark.parametrize(
    ("now", "ahead", "seconds"),
    [
        (400.0, -600.0, None),
        (990.0, 0.0, 3310.0),  # seconds do no harm
        (1300.0, 0.0, 3000.0),
        (4600.0, 0.0, 0.0),
        (9000.0, 4400.0, None),
    ],
)
def test_a_clock_that_cannot_be_right_does_not_tell_when_a_job_ends(
    now: float, ahead: float, seconds: float | None
) -> None:
    """Else the run would leave after its first step, in every attempt anew."""
    job = _in_job(1000.0, 4600.0)
    assert clock_ahead_of_job(job, now=now) == ahead
    assert seconds_until_shutdown(FaultsConfig(), job, now=now) == seconds


def test_a_limit_of_ones_own_needs_no_such_clock() -> None:
    job = _in_job(1000.0, 4600.0)
    assert seconds_until_shutdown(FaultsConfig(time_limit_minutes=8), job, now=9000.0) == 6 * 60.0


def test_a_clock_out_of_any_job_is_right() -> None:
    assert clock_ahead_of_job(_in_job(None, None), now=1000.0) == 0.0
