"""Ranks that die, hang, fail or end as they should: who tells, what, and how soon. Real processes without a model.

What happens to them takes waiting more than work: all scenarios go on at the same time.
"""

from __future__ import annotations

import fcntl
import os
import signal
import socket
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import pytest

from tests.patience import slowness, wait_for
from tests.unit.watchdog.watched_ranks import Launch, launch

# Long beside the pauses that a busy machine makes.
HANG_SECONDS = 6.0 * slowness()
HANG_MINUTES = HANG_SECONDS / 60
# Until ranks have seen each other, also in the files of their hosts.
SEEN_SECONDS = HANG_SECONDS / 2
# What takes a second or two; far less than the hang of a rank that waits.
SOON = 8.0 * slowness()


Scenario = Callable[[Path], None]
SCENARIOS: dict[str, Scenario] = {}
AT_ONCE = 7


def scenario(function: Scenario) -> Scenario:
    SCENARIOS[function.__name__] = function
    return function


@pytest.fixture(scope="module")
def under_way(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[str, Future[None]]]:
    """The scenarios that were asked for, all started."""
    asked = [name for name in SCENARIOS if any(item.name == f"test_ranks[{name}]" for item in request.session.items)]
    with ThreadPoolExecutor(AT_ONCE) as pool:
        yield {name: pool.submit(SCENARIOS[name], tmp_path_factory.mktemp(name[:30])) for name in asked}


def _first_line(text: str) -> str:
    return text.strip().splitlines()[0]


def _saved(run: Path, step: int) -> None:
    (run / "checkpoints").mkdir(parents=True)
    (run / "checkpoints" / "latest").write_text(f"step-{step:08d}")


@scenario
def the_killed_rank_is_named_first_and_once(tmp_path: Path) -> None:
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


@scenario
def a_victims_traceback_goes_to_its_log(tmp_path: Path) -> None:
    with launch(tmp_path / "ranks", 2) as ranks:
        ranks.tell(0, f"settle {tmp_path / 'run'}", "phase forward 3")
        ranks.tell(1, f"settle {tmp_path / 'run'}", "phase forward 3")
        ranks.send(1, signal.SIGKILL)
        ranks.order(0, "lose")
        assert ranks.codes(0) == [1]
        screen = ranks.screen
    assert "rank 1 of 2" in _first_line(screen) and "Connection closed" not in screen
    assert "Connection closed by peer" in (tmp_path / "run" / "logs" / "attempt-001" / "rank-0000.log").read_text()


@scenario
def a_victim_that_hears_of_it_before_its_monitor_waits(tmp_path: Path) -> None:
    """The other rank is still there when the connection breaks: it is on its way out, with an error of its own."""
    with launch(tmp_path / "ranks", 2) as ranks:
        ranks.order(0, "lose")
        time.sleep(0.5)
        ranks.order(1, "fail a bug")
        assert ranks.codes() == [1, 1]
        screen = ranks.screen
    assert _first_line(screen).startswith("rank 1 of 2") and "ValueError: a bug" in _first_line(screen)
    assert "Connection closed" not in screen


@scenario
def a_word_that_is_read_late_is_not_lost(tmp_path: Path) -> None:
    """The monitor is still writing when the main thread, which has lost its connection, is through with its own."""
    read_end, write_end = os.pipe()
    filler = b"." * fcntl.fcntl(write_end, fcntl.F_GETPIPE_SZ)
    os.write(write_end, filler)
    with launch(tmp_path / "ranks", 2, stderr=write_end) as ranks:
        ranks.send(1, signal.SIGKILL)
        ranks.order(0, "lose")
        time.sleep(2.0)
        assert os.read(read_end, len(filler)) == filler
        assert ranks.codes(0) == [1]
        os.close(write_end)
        assert b"rank 1 of 2" in os.read(read_end, 100)
    os.close(read_end)


@scenario
def a_segmentation_fault_shows_its_stack(tmp_path: Path) -> None:
    with launch(tmp_path / "ranks", 2) as ranks:
        ranks.send(1, signal.SIGSEGV)
        assert ranks.codes(0) == [1]
        screen = ranks.screen
    assert "was killed by SIGSEGV in starting" in _first_line(screen)
    assert "Fatal Python error: Segmentation fault" in screen and "fake_rank.py" in screen


@scenario
def an_own_error_is_told_with_its_traceback_and_ends_the_others(tmp_path: Path) -> None:
    with launch(tmp_path / "ranks", 3) as ranks:
        ranks.tell(2, "phase forward 5")
        ranks.order(2, "fail the sum is wrong")
        assert ranks.codes() == [1, 1, 1]
        screen = ranks.screen
    assert _first_line(screen).startswith("rank 2 of 3 on host ")
    assert _first_line(screen).endswith("failed at step 5, in forward: ValueError: the sum is wrong")
    assert screen.count("Traceback (most recent call last)") == 1


@scenario
def the_same_error_everywhere_is_told_once_by_rank_0(tmp_path: Path) -> None:
    with launch(tmp_path / "ranks", 3) as ranks:
        for rank in (2, 1, 0):
            ranks.order(rank, "mend no such column")
        assert ranks.codes() == [2, 2, 2]
        assert ranks.screen.strip() == "error: no such column"
    assert not list((tmp_path / "ranks").glob("seqaware-*/*"))


@scenario
def an_error_for_people_on_one_rank_is_told_by_it(tmp_path: Path) -> None:
    with launch(tmp_path / "ranks", 2) as ranks:
        ranks.order(1, "mend its disk is full")
        assert ranks.codes() == [2, 2]
        assert ranks.screen.strip() == f"error on {_name(ranks, 1)}: its disk is full"


def _name(ranks: Launch, rank: int) -> str:
    return f"rank {rank} of {len(ranks.ranks)} on host {socket.gethostname()} (pid {ranks.ranks[rank].pid})"


@scenario
def clean_ends_raise_no_alarm_and_leave_nothing(tmp_path: Path) -> None:
    with launch(tmp_path / "ranks", 3) as ranks:
        for rank, code in enumerate((0, 85, 2)):
            ranks.tell(rank, f"settle {tmp_path / 'run'}")
            ranks.order(rank, f"end {code}")
            assert ranks.codes(rank) == [code]
        assert ranks.screen == ""
    assert not list((tmp_path / "ranks").glob("seqaware-*/*"))


@scenario
def an_earlier_launch_in_the_same_folder_alarms_nobody(tmp_path: Path) -> None:
    """As when torchrun starts its ranks again: the same parent, the same port."""
    with launch(tmp_path / "ranks", 2) as first:
        first.send(1, signal.SIGKILL)
        assert first.codes(0) == [1]
        told = first.screen
    (left,) = (tmp_path / "ranks").glob("seqaware-*/*")
    assert (left / "told").exists() and (left / "rank-0001.json").exists()
    with launch(tmp_path / "ranks", 2) as again:
        time.sleep(SEEN_SECONDS)
        for rank in range(2):
            assert again.ask(rank, "dead?") == "False"
            again.order(rank, "end 0")
        assert again.codes() == [0, 0]
        assert again.screen == told


@scenario
def a_signal_handler_learns_that_a_sibling_is_dead(tmp_path: Path) -> None:
    with launch(tmp_path / "ranks", 2) as ranks:
        assert ranks.ask(0, "dead?") == "False"
        # No monitor could act in its place.
        ranks.send(0, signal.SIGSTOP)
        ranks.send(1, signal.SIGKILL)
        ranks.order(0, "dead?")
        ranks.send(0, signal.SIGCONT)
        assert ranks.codes(0) == [1]


@scenario
def a_stopped_rank_is_named_and_ended(tmp_path: Path) -> None:
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


@scenario
def a_rank_that_keeps_the_interpreters_lock_is_named_and_ended(tmp_path: Path) -> None:
    with launch(tmp_path / "ranks", 2) as ranks:
        for rank in range(2):
            ranks.tell(rank, f"hang {HANG_MINUTES}", "phase forward 4")
        ranks.order(1, "grab")
        ranks.order(0, "wait")
        assert ranks.codes() == [1, -signal.SIGKILL]
        assert _first_line(ranks.screen).startswith(f"{_name(ranks, 1)} does not answer since ")


def _hang(tmp_path: Path, *, hanging: int, waiting: int) -> None:
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


@scenario
def hanging_rank_0_is_named_with_its_line(tmp_path: Path) -> None:
    _hang(tmp_path, hanging=0, waiting=1)


@scenario
def hanging_rank_1_is_named_with_its_line(tmp_path: Path) -> None:
    _hang(tmp_path, hanging=1, waiting=0)


@scenario
def who_waits_for_a_working_rank_does_not_hang(tmp_path: Path) -> None:
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


@scenario
def a_job_that_is_stopped_and_goes_on_does_not_hang(tmp_path: Path) -> None:
    seconds = 1.5 * HANG_SECONDS
    with launch(tmp_path / "ranks", 2) as ranks:
        for rank in range(2):
            ranks.tell(rank, f"hang {seconds / 60}", "phase forward 4")
        time.sleep(SEEN_SECONDS)  # each has looked at the other
        for number in (signal.SIGSTOP, signal.SIGCONT):
            for rank in range(2):
                ranks.send(rank, number)
            if number == signal.SIGSTOP:
                time.sleep(2 * seconds)
        time.sleep(SEEN_SECONDS)
        for rank in range(2):
            ranks.tell(rank, "phase backward 4")
            ranks.order(rank, "end 0")
        assert ranks.codes() == [0, 0]
        assert ranks.screen == ""


@scenario
def an_operator_that_is_being_built_is_progress(tmp_path: Path) -> None:
    """For the rank that builds, and for the one that waits for it, on whatever host."""
    lock, built = tmp_path / "cpu_adam" / "lock", tmp_path / "built"
    lock.parent.mkdir()
    # A compiler uses CPU time, little of it on a busy machine.
    until_built = f"iter(lambda: os.path.exists('{built}'), True)"
    compiler = f"import os, time; any(time.sleep(0.2) or 0 * sum(range(10**6)) for _ in {until_built})"
    with launch(tmp_path / "ranks", 2) as ranks:
        for rank in range(2):
            ranks.tell(rank, f"hang {HANG_MINUTES}", "phase connecting 0")
        ranks.order(0, f"build {lock} {compiler}")
        wait_for("the lock", lock.exists)
        ranks.order(1, f"build {lock} pass")
        time.sleep(3 * HANG_SECONDS)
        assert ranks.screen == "" and [rank.poll() for rank in ranks.ranks] == [None, None]
        built.touch()
        for rank in range(2):
            assert ranks.answer(rank) == "done"
            ranks.order(rank, "end 0")
        assert ranks.codes() == [0, 0]
        assert ranks.screen == ""


@scenario
def a_build_that_stands_still_is_named_and_not_who_waits_for_it(tmp_path: Path) -> None:
    lock = tmp_path / "cpu_adam" / "lock"
    lock.parent.mkdir()
    with launch(tmp_path / "ranks", 2) as ranks:
        for rank in range(2):
            ranks.tell(rank, f"hang {HANG_MINUTES}", "phase connecting 0")
        ranks.order(1, f"build {lock} import time; time.sleep(600)")
        wait_for("the lock", lock.exists)
        ranks.order(0, f"build {lock} pass")
        assert ranks.codes() == [1, 1]
        screen = ranks.screen
    assert _first_line(screen).startswith(f"{_name(ranks, 1)} hangs since ")
    assert "rank 0 on host" in screen and "build_lock.py" in screen


def _under_mpirun(size: int) -> list[dict[str, object]]:
    return [{"launcher": "mpirun"} for _ in range(size)]


def _killed_one_after_another(tmp_path: Path, *, guard_is_late: bool) -> str:
    """What is shown once a launcher has ended ranks 0 and 2 for rank 1, as soon as it had heard of its end."""
    with launch(tmp_path / "ranks", 3, options=_under_mpirun(3)) as ranks:
        for rank in range(3):
            ranks.tell(rank, f"settle {tmp_path / 'run'}", "phase backward 17")
        wait_for("the guards", lambda: _watched_by_guards(tmp_path) == 3)
        (guard,) = _guards(tmp_path)
        if guard_is_late:
            os.kill(guard, signal.SIGSTOP)
        for rank in (1, 0, 2):
            ranks.send(rank, signal.SIGKILL)
            os.waitid(os.P_PID, ranks.ranks[rank].pid, os.WEXITED | os.WNOWAIT)
        os.kill(guard, signal.SIGCONT)
        wait_for("the last line", lambda: "same command" in ranks.screen)
        return ranks.screen


@scenario
def a_launcher_that_kills_all_at_once_leaves_time_to_name_the_first(tmp_path: Path) -> None:
    screen = _killed_one_after_another(tmp_path, guard_is_late=False)
    assert _first_line(screen).startswith("rank 1 of 3") and "at step 17, in backward" in _first_line(screen)
    assert "rank 0" not in screen and "rank 2" not in screen


@scenario
def a_guard_that_comes_late_still_names_the_first(tmp_path: Path) -> None:
    screen = _killed_one_after_another(tmp_path, guard_is_late=True)
    assert _first_line(screen).startswith("rank 1 of 3")
    assert "rank 0" not in screen and "rank 2" not in screen


@scenario
def a_rank_that_nobody_had_met_hides_no_other(tmp_path: Path) -> None:
    """Rank 2 has come since the guard looked last, and dies after rank 1: which of them was the first is not known."""
    folder, options = tmp_path / "ranks", _under_mpirun(3)
    with launch(folder, 3, options=options, only=(0, 1)) as early:
        wait_for("the guards", lambda: _watched_by_guards(tmp_path) == 2)
        (guard,) = _guards(tmp_path)
        os.kill(guard, signal.SIGSTOP)
        with launch(folder, 3, options=options, only=(2,)) as late:
            for process in (early.ranks[1], early.ranks[0], late.ranks[0]):
                process.kill()
                os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
            os.kill(guard, signal.SIGCONT)
            wait_for("the last line", lambda: "same command" in early.screen)
    assert "rank 1 of 3" in early.screen and "rank 2 of 3" in early.screen and "rank 0" not in early.screen


@scenario
def a_launcher_that_ends_all_after_one_that_left_is_no_alarm(tmp_path: Path) -> None:
    with launch(tmp_path / "ranks", 2, options=_under_mpirun(2)) as ranks:
        wait_for("the guards", lambda: _watched_by_guards(tmp_path) == 2)
        ranks.order(0, "end 85")
        assert ranks.codes(0) == [85]
        ranks.send(1, signal.SIGKILL)
        wait_for("the end of the guards", lambda: not _guards(tmp_path))
        assert ranks.screen == ""


@scenario
def a_guard_ends_with_its_ranks(tmp_path: Path) -> None:
    with launch(tmp_path / "ranks", 2, options=_under_mpirun(2)) as ranks:
        wait_for("the guards", lambda: _watched_by_guards(tmp_path) == 2)
        for rank in range(2):
            ranks.order(rank, "end 0")
            assert ranks.codes(rank) == [0]
        wait_for("the end of the guards", lambda: not _guards(tmp_path))
        assert ranks.screen == ""


def _guards(folder: Path) -> list[int]:
    """The processes that are guards of a test's launches."""
    found = []
    for entry in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError):
            line = entry.read_text()
            found += [int(entry.parent.name)] if "watchdog.guard" in line and str(folder) in line else []
    return found


def _watched_by_guards(folder: Path) -> int:
    """How many processes the guards have asked the kernel to tell them about."""
    found = 0
    for guard in _guards(folder):
        for entry in Path(f"/proc/{guard}/fd").iterdir():
            with suppress(OSError):
                found += "pidfd" in str(entry.readlink())
    return found


def _two_hosts(ranks_each: int) -> list[dict[str, object]]:
    """Hosts h0 and h1: what a rank sees of the other is in the run's folder alone."""
    return [
        {"host": f"h{host}", "base": f"h{host}", "nodes": 2, "local_size": ranks_each}
        for host in range(2)
        for _ in range(ranks_each)
    ]


@scenario
def a_rank_that_dies_on_another_host_is_told_by_its_sibling_alone(tmp_path: Path) -> None:
    with launch(tmp_path / "ranks", 4, options=_two_hosts(2)) as ranks:
        for rank in range(4):
            ranks.tell(rank, f"settle {tmp_path / 'run'}", "phase backward 8")
        ranks.send(3, signal.SIGKILL)
        assert ranks.codes(0, 1, 2) == [1, 1, 1]
        screen = ranks.screen
    assert _first_line(screen).startswith("rank 3 of 4 on host h1") and screen.count("was killed by") == 1


@scenario
def a_host_that_is_gone_is_named_by_who_lost_it(tmp_path: Path) -> None:
    with launch(tmp_path / "ranks", 2, options=_two_hosts(1)) as ranks:
        for rank in range(2):
            ranks.tell(rank, f"hang {HANG_MINUTES}", f"settle {tmp_path / 'run'}", "say alive", "phase backward 8")
        time.sleep(SEEN_SECONDS)
        ranks.send(1, signal.SIGKILL)
        ranks.order(0, "lose")
        assert ranks.codes(0) == [1]
        screen = ranks.screen
    assert _first_line(screen).startswith("rank 0 of 2 on host h0")
    assert "lost its connection to another rank at step 8, in backward: RuntimeError: [gloo" in _first_line(screen)
    assert "rank 1 of 2 on host h1" in screen and "answers no more; last seen at step 8, in backward" in screen
    assert "    20" in screen and " alive" in screen


@scenario
def a_rank_that_stands_still_on_another_host_is_named(tmp_path: Path) -> None:
    with launch(tmp_path / "ranks", 4, options=_two_hosts(2)) as ranks:
        for rank in range(4):
            ranks.tell(rank, f"hang {HANG_MINUTES}", f"settle {tmp_path / 'run'}", "phase forward 8")
        ranks.order(3, "stand")
        for rank in range(3):
            ranks.order(rank, "wait")
        assert ranks.codes() == [1, 1, 1, 1]
        screen = ranks.screen
    assert _first_line(screen).startswith("rank 3 of 4 on host h1") and "hangs since" in _first_line(screen)
    assert screen.count("hangs since") == 1


@pytest.mark.parametrize("name", SCENARIOS)
def test_ranks(name: str, under_way: dict[str, Future[None]]) -> None:
    under_way[name].result()
