"""Ranks that die, hang, fail or end as they should: who tells, what, and how soon. Real processes without a model."""

from __future__ import annotations

import signal
import time
from pathlib import Path

import pytest

from tests.unit.training.watched_ranks import Launch, launch

HANG_MINUTES = 0.05
HANG_SECONDS = 60 * HANG_MINUTES
# What a busy machine may add to what takes a second or two.
SOON = 8.0


def _first_line(text: str) -> str:
    return text.strip().splitlines()[0]


def _saved(run: Path, step: int) -> None:
    (run / "checkpoints").mkdir(parents=True)
    (run / "checkpoints" / "latest").write_text(f"step-{step:08d}")


def test_the_killed_rank_is_named_first_and_once(tmp_path: Path) -> None:
    run = tmp_path / "run"
    _saved(run, 16)
    with launch(tmp_path / "ranks", 3) as ranks:
        for rank in range(3):
            ranks.tell(rank, f"settle {run}", "say the last thing said", "phase backward 17")
        ranks.send(1, signal.SIGKILL)
        assert ranks.seconds_until_end(0, 2) < SOON
        assert ranks.codes(0, 2) == [1, 1]
        screen = ranks.screen
    assert _first_line(screen).startswith("rank 1 of 3 on host ")
    assert _first_line(screen).endswith(f"(pid {ranks.ranks[1].pid}) was killed by SIGKILL at step 17, in backward")
    assert screen.count("was killed") == 1
    assert "the last thing said" in screen
    assert str(run / "logs" / "attempt-001" / "rank-0001.log") in screen
    assert "The same command goes on after step 16" in screen
    assert "Traceback" not in screen


def test_a_victims_traceback_goes_to_its_log(tmp_path: Path) -> None:
    with launch(tmp_path / "ranks", 2) as ranks:
        ranks.tell(0, f"settle {tmp_path / 'run'}", "phase forward 3")
        ranks.tell(1, f"settle {tmp_path / 'run'}", "phase forward 3")
        ranks.send(1, signal.SIGKILL)
        ranks.order(0, "lose")
        assert ranks.codes(0) == [1]
        screen = ranks.screen
    assert "rank 1 of 2" in _first_line(screen) and "Connection closed" not in screen
    assert "Connection closed by peer" in (tmp_path / "run" / "logs" / "attempt-001" / "rank-0000.log").read_text()


def test_a_victim_that_hears_of_it_before_its_monitor_waits(tmp_path: Path) -> None:
    """The other rank is still there when the connection breaks: it is on its way out, with an error of its own."""
    with launch(tmp_path / "ranks", 2) as ranks:
        ranks.order(0, "lose")
        time.sleep(0.5)
        ranks.order(1, "fail a bug")
        assert ranks.codes() == [1, 1]
        screen = ranks.screen
    assert _first_line(screen).startswith("rank 1 of 2") and "ValueError: a bug" in _first_line(screen)
    assert "Connection closed" not in screen


def test_a_segmentation_fault_shows_its_stack(tmp_path: Path) -> None:
    with launch(tmp_path / "ranks", 2) as ranks:
        ranks.send(1, signal.SIGSEGV)
        assert ranks.codes(0) == [1]
        screen = ranks.screen
    assert "was killed by SIGSEGV in starting" in _first_line(screen)
    assert "Fatal Python error: Segmentation fault" in screen and "fake_rank.py" in screen


def test_an_own_error_is_told_with_its_traceback_and_ends_the_others(tmp_path: Path) -> None:
    with launch(tmp_path / "ranks", 3) as ranks:
        ranks.tell(2, "phase forward 5")
        ranks.order(2, "fail the sum is wrong")
        assert ranks.codes() == [1, 1, 1]
        screen = ranks.screen
    assert _first_line(screen).startswith("rank 2 of 3 on host ")
    assert _first_line(screen).endswith("failed at step 5, in forward: ValueError: the sum is wrong")
    assert screen.count("Traceback (most recent call last)") == 1


def test_the_same_error_everywhere_is_told_once_by_rank_0(tmp_path: Path) -> None:
    with launch(tmp_path / "ranks", 3) as ranks:
        for rank in (2, 1, 0):
            ranks.order(rank, "mend no such column")
        assert ranks.codes() == [2, 2, 2]
        assert ranks.screen.strip() == "error: no such column"


def test_an_error_for_people_on_one_rank_is_told_by_it(tmp_path: Path) -> None:
    with launch(tmp_path / "ranks", 2) as ranks:
        ranks.order(1, "mend its disk is full")
        assert ranks.codes() == [2, 2]
        assert ranks.screen.strip() == f"error on {_name(ranks, 1)}: its disk is full"


def _name(ranks: Launch, rank: int) -> str:
    import socket

    return f"rank {rank} of {len(ranks.ranks)} on host {socket.gethostname()} (pid {ranks.ranks[rank].pid})"


def test_clean_ends_raise_no_alarm_and_leave_nothing(tmp_path: Path) -> None:
    with launch(tmp_path / "ranks", 3) as ranks:
        for rank, code in enumerate((0, 85, 2)):
            ranks.tell(rank, f"settle {tmp_path / 'run'}")
            ranks.order(rank, f"end {code}")
            assert ranks.codes(rank) == [code]
        assert ranks.screen == ""
    assert not list((tmp_path / "ranks").glob("seqaware-*/*"))


def test_an_earlier_launch_in_the_same_folder_alarms_nobody(tmp_path: Path) -> None:
    """As when torchrun starts its ranks again: the same parent, the same port."""
    with launch(tmp_path / "ranks", 2) as first:
        first.send(1, signal.SIGKILL)
        assert first.codes(0) == [1]
        told = first.screen
    (left,) = (tmp_path / "ranks").glob("seqaware-*/*")
    assert (left / "told").exists() and (left / "rank-0001.json").exists()
    with launch(tmp_path / "ranks", 2) as again:
        time.sleep(2.5)
        for rank in range(2):
            assert again.ask(rank, "dead?") == "False"
            again.order(rank, "end 0")
        assert again.codes() == [0, 0]
        assert again.screen == told


def test_a_signal_handler_learns_that_a_sibling_is_dead(tmp_path: Path) -> None:
    with launch(tmp_path / "ranks", 2) as ranks:
        assert ranks.ask(0, "dead?") == "False"
        # No monitor could act in its place.
        ranks.send(0, signal.SIGSTOP)
        ranks.send(1, signal.SIGKILL)
        ranks.order(0, "dead?")
        ranks.send(0, signal.SIGCONT)
        assert ranks.codes(0) == [1]


def test_a_stopped_rank_is_named_and_ended(tmp_path: Path) -> None:
    with launch(tmp_path / "ranks", 2) as ranks:
        for rank in range(2):
            ranks.tell(rank, f"hang {HANG_MINUTES}", "phase forward 4")
        ranks.send(1, signal.SIGSTOP)
        ranks.order(0, "wait")
        assert ranks.seconds_until_end(0) > HANG_SECONDS / 2
        assert ranks.codes() == [1, -signal.SIGKILL]
        screen = ranks.screen
    assert _first_line(screen).startswith(f"{_name(ranks, 1)} does not answer since ")
    assert "(its process is stopped); last seen at step 4, in forward" in _first_line(screen)
    assert "rank 0 on host" in screen and "all_reduce" in screen


def test_a_rank_that_keeps_the_interpreters_lock_is_named_and_ended(tmp_path: Path) -> None:
    with launch(tmp_path / "ranks", 2) as ranks:
        for rank in range(2):
            ranks.tell(rank, f"hang {HANG_MINUTES}", "phase forward 4")
        ranks.order(1, "grab")
        ranks.order(0, "wait")
        assert ranks.codes() == [1, -signal.SIGKILL]
        assert _first_line(ranks.screen).startswith(f"{_name(ranks, 1)} does not answer since ")


@pytest.mark.parametrize(("hanging", "waiting"), [(1, 0), (0, 1)])
def test_a_hanging_rank_is_named_with_its_line(tmp_path: Path, hanging: int, waiting: int) -> None:
    with launch(tmp_path / "ranks", 2) as ranks:
        for rank in range(2):
            ranks.tell(rank, f"hang {HANG_MINUTES}", f"settle {tmp_path / 'run'}", "phase forward 9")
        ranks.order(hanging, "stand")
        ranks.order(waiting, "wait")
        assert ranks.codes() == [1, 1]
        screen = ranks.screen
    first = _first_line(screen)
    assert first.startswith(f"{_name(ranks, hanging)} hangs since ")
    assert "at step 9, in forward: " in first and first.endswith(" in stand_in_forward")
    assert f"rank {waiting} on host" in screen
    log = (tmp_path / "run" / "logs" / "attempt-001" / f"rank-{waiting:04d}.log").read_text()
    assert "stands still since" in log and "all_reduce" in log


def test_who_waits_for_a_working_rank_does_not_hang(tmp_path: Path) -> None:
    with launch(tmp_path / "ranks", 2) as ranks:
        for rank in range(2):
            ranks.tell(rank, f"hang {HANG_MINUTES}", "phase exporting 9")
        ranks.order(0, "wait")
        for _ in range(round(3 * HANG_SECONDS)):
            time.sleep(1.0)
            ranks.tell(1, "phase exporting 9")
        assert ranks.screen == "" and ranks.ranks[0].poll() is None
        ranks.order(1, "stand")
        assert ranks.codes() == [1, 1]
        assert _first_line(ranks.screen).startswith(f"{_name(ranks, 1)} hangs since ")


def test_a_job_that_is_stopped_and_goes_on_does_not_hang(tmp_path: Path) -> None:
    with launch(tmp_path / "ranks", 2) as ranks:
        for rank in range(2):
            ranks.tell(rank, f"hang {HANG_MINUTES}", "phase forward 4")
        for number in (signal.SIGSTOP, signal.SIGCONT):
            for rank in range(2):
                ranks.send(rank, number)
            if number == signal.SIGSTOP:
                time.sleep(3 * HANG_SECONDS)
        for rank in range(2):
            ranks.tell(rank, "phase backward 4")
            ranks.order(rank, "end 0")
        assert ranks.codes() == [0, 0]
        assert ranks.screen == ""
