"""The parts of the watch: the dial, the log, the folder, and whom the others wait for."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import threading
import timeit
from dataclasses import replace
from pathlib import Path

import pytest

from seqaware.distributed.launch_environment import LaunchEnvironment
from seqaware.errors import ConfigError
from seqaware.watchdog import exit_cause, failure_messages, launch_directory, monitor
from seqaware.watchdog.guard import guard
from seqaware.watchdog.hang_report import RankStanding, awaited, inspect_main_thread
from seqaware.watchdog.heartbeat import Heartbeat, start_heartbeat
from seqaware.watchdog.host_process import HostProcess, Life, ending
from seqaware.watchdog.launch_directory import TOLD, claim, open_launch_directory
from seqaware.watchdog.monitor import Monitor
from seqaware.watchdog.own_rank import OwnRank
from seqaware.watchdog.peers import Peer, Peers, Stillness, missed_now
from seqaware.watchdog.rank_card import RankCard, Stuck, code_of, read_card
from seqaware.watchdog.rank_log import RankLog, last_lines
from seqaware.watchdog.shared_status import NO_STEP, RankPosition, SharedStatus, read_position
from tests.patience import LAUNCH_SECONDS

HANG = 60.0
# A living process that is not this one.
_SHELL = HostProcess.of(os.getppid())
FORWARD = RankPosition(beats=9, moves=40, step=17, turn=3, phase="forward")
BACKWARD = RankPosition(beats=9, moves=41, step=17, turn=4, phase="backward")


def _card(rank: int = 0, **changes: object) -> RankCard:
    card = RankCard(rank=rank, size=3, host="h", process=HostProcess(10 + rank, 5), log="/nowhere", place=FORWARD)
    return replace(card, **changes)  # type: ignore[arg-type]


def _standing(rank: int, place: RankPosition, *, waits: bool, **changes: object) -> RankStanding:
    stuck = Stuck(70.0, "file.py:1 in f", ["file.py:1 in f"], waits)
    return replace(RankStanding(rank, _card(rank, stuck=stuck), place, 70.0, 0.5), **changes)  # type: ignore[arg-type]


def _awaited(*standings: RankStanding) -> list[int] | None:
    found = awaited(standings, hang_seconds=HANG)
    return None if found is None else [each.rank for each in found]


def test_who_moves_is_waited_for_in_patience() -> None:
    moving = replace(_standing(1, FORWARD, waits=False), card=_card(1), idle=3.0)
    assert _awaited(_standing(0, BACKWARD, waits=True), moving) is None


def test_who_does_not_answer_is_blamed_before_all_others() -> None:
    mute = replace(_standing(2, BACKWARD, waits=True), silent=65.0)
    assert _awaited(_standing(0, FORWARD, waits=False), _standing(1, BACKWARD, waits=True), mute) == [2]
    never_seen = RankStanding(2, None, FORWARD, 70.0, 70.0)
    assert _awaited(_standing(0, FORWARD, waits=True), _standing(1, FORWARD, waits=True), never_seen) == [2]


def test_who_is_outside_of_a_collective_keeps_those_inside_waiting() -> None:
    ahead = _standing(1, BACKWARD, waits=False)
    assert _awaited(_standing(0, FORWARD, waits=True), ahead, _standing(2, FORWARD, waits=True)) == [1]


def test_who_is_behind_keeps_the_others_waiting() -> None:
    # On a GPU who waits for its device and who computes look alike.
    later = FORWARD._replace(step=18, turn=1)
    standings = [_standing(rank, place, waits=False) for rank, place in enumerate((BACKWARD, FORWARD, later))]
    assert _awaited(*standings) == [1]
    assert _awaited(*(replace(each, card=_card(each.rank, stuck=replace(each.stuck, waits=True)))  # type: ignore[type-var]
                      for each in standings)) == [1]  # fmt: skip


def test_ranks_that_wait_for_each_other_are_all_named() -> None:
    standings = [_standing(rank, FORWARD, waits=True) for rank in range(3)]
    assert _awaited(*standings) == [0, 1, 2]
    text = failure_messages.hanging_ranks_message(standings, standings, hang_seconds=HANG, shared=None)
    assert text.startswith("all ranks stand still and nothing tells them apart")


def test_who_has_ended_is_left_out_but_mentioned() -> None:
    ended = RankStanding(2, _card(2, status="ended", code=0), BACKWARD, 70.0, 70.0)
    standings = [_standing(0, FORWARD, waits=True), _standing(1, FORWARD, waits=True), ended]
    assert _awaited(*standings) == [0, 1]
    assert "ended before: rank 2" in failure_messages.hanging_ranks_message(
        standings[:2], standings, hang_seconds=HANG, shared=None
    )


def test_stillness_counts_only_the_time_that_is_told() -> None:
    still = Stillness()
    assert [still.see(value, 1.0) for value in (5, 5, 5, 6, 6)] == [0.0, 1.0, 2.0, 0.0, 1.0]


def test_who_ends_while_it_is_looked_at_is_not_missed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = open_launch_directory(_address(), tmp_path)
    own = OwnRank(_address(), folder)
    sibling = replace(_card(1), size=2)
    sibling.write(folder.card(1))

    def end_meanwhile(process: HostProcess) -> Life:
        replace(sibling, status="ended", code=0).write(folder.card(1))
        return Life.GONE

    monkeypatch.setattr(HostProcess, "life", end_meanwhile)
    peers = Peers(folder, but=0)
    peers.look_around(1.0)
    (peer,) = peers.here()
    assert peer.life is Life.GONE and not peer.missed
    sibling.write(folder.card(1))
    assert missed_now(own) == []


@pytest.mark.parametrize("told", [True, False])
def test_a_victim_ends_with_the_code_of_who_failed_though_no_monitor_comes_to_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, told: bool
) -> None:
    """On a busy machine: the launcher would pass on this rank's code if it were the first to end."""
    address = replace(_address(), rank=1)
    folder = open_launch_directory(address, tmp_path)
    replace(_card(0), size=2, status="failed", code=2, message="no such column").write(folder.card(0))
    if told:
        (folder.path / TOLD).touch()
    for patience in ("_UNTIL_TOLD", "_UNTIL_FAILED_TELLS", "_UNTIL_ENDED"):
        monkeypatch.setattr(exit_cause, patience, 0.05)
    monitor = Monitor(OwnRank(address, folder))
    monkeypatch.setattr(monitor, "join", lambda timeout: None)
    assert exit_cause.fail(OwnRank(address, folder), monitor, RuntimeError("gloo: Connection closed by peer")) == 2


def test_the_stack_of_the_main_thread_is_seen_from_another() -> None:
    found: list[Stuck] = []
    seen = threading.Event()

    def look() -> None:
        while not (found and " in waiting" in "".join(found[-1].stack)):
            found.append(inspect_main_thread(4.0))
        seen.set()

    def waiting() -> bool:
        return seen.wait(20.0)

    threading.Thread(target=look).start()
    assert waiting()
    stuck = found[-1]
    assert stuck.where == stuck.stack[-1] and not stuck.waits and stuck.seconds == 4.0
    assert any(" in test_the_stack_of_the_main_thread_is_seen_from_another" in line for line in stuck.stack)


def test_a_dial_is_read_as_it_was_left(tmp_path: Path) -> None:
    path = tmp_path / "dial"
    assert read_position(path) is None
    dial = SharedStatus(path)
    assert read_position(path) == RankPosition(0, 0, NO_STEP, 0, "")
    assert dial.place().words() == "in starting"
    dial.turn_to("tokenising", None)
    assert dial.place().words() == "in tokenising"
    dial.turn_to("batches", 7)
    dial.turn_to("forward", None)
    dial.move()
    dial.beat()
    assert read_position(path) == dial.place() == RankPosition(beats=1, moves=4, step=7, turn=2, phase="forward")
    dial.turn_to("batches", 8)
    assert read_position(path) == RankPosition(beats=1, moves=5, step=8, turn=1, phase="batches")
    assert dial.place().words() == "at step 8, in batches"
    dial.turn_to("x" * 100, None)
    place = read_position(path)
    assert place is not None and place.phase == "x" * 48


def test_turning_the_dial_costs_next_to_nothing(tmp_path: Path) -> None:
    """Measured: 0.3 µs, and a step turns it some ten times. Writing to a file would cost ten times as much."""
    dial = SharedStatus(tmp_path / "dial")
    seconds = min(timeit.repeat(lambda: dial.turn_to("forward", 17), number=10_000, repeat=20)) / 10_000
    assert seconds < 3e-6


def test_a_card_comes_back_as_it_was_written(tmp_path: Path) -> None:
    path = tmp_path / "card.json"
    card = _card(1, status="failed", code=1, message="x", stuck=Stuck(3.0, "a", ["b", "a"], waits=True))
    card.write(path)
    assert read_card(path) == card
    for torn in ("", "{", '{"rank": 1}', "[]"):
        path.write_text(torn)
        assert read_card(path) is None


def test_a_launch_ends_with_the_code_of_the_lowest_rank_that_failed_by_itself() -> None:
    killed, running = _card(0), _card(1)
    person, crash = (
        _card(2, status="failed", code=2, message="is full"),
        _card(3, status="ended", code=1, message="bug"),
    )
    assert code_of([crash, running, person, killed]) == 2
    assert code_of([crash, running, killed]) == 1
    assert code_of([running, killed, _card(4, status="ended", code=1)]) is None


def test_only_the_first_claims(tmp_path: Path) -> None:
    assert claim(tmp_path, "one") and not claim(tmp_path, "two")
    assert (tmp_path / "told").read_text() == "one"
    assert claim(tmp_path / "cleared away", "three")


def test_what_is_in_use_looks_new(tmp_path: Path) -> None:
    folder = open_launch_directory(_address(), tmp_path)
    _card(0).write(folder.card(0))
    for path in (folder.path, folder.card(0)):
        os.utime(path, (0, 0))
    folder.keep(0)
    assert folder.path.stat().st_mtime > 0 and folder.card(0).stat().st_mtime > 0


def test_a_log_moves_with_all_that_it_holds(tmp_path: Path) -> None:
    log = RankLog(tmp_path / "early.log")
    log.note("before")
    descriptor = log.fileno()
    log.move(tmp_path / "run" / "late.log")
    log.note("after\nthe second line of a message")
    os.write(descriptor, b"by the descriptor that others hold\n")
    assert not (tmp_path / "early.log").exists()
    lines = last_lines(log.path, 10)
    assert [line.split(" ", 2)[-1] for line in lines[:2]] == ["before", "after"]
    assert lines[2:] == ["the second line of a message", "by the descriptor that others hold"]
    assert last_lines(log.path, 1) == lines[-1:]
    assert last_lines(tmp_path / "none.log", 1) == []


def test_warnings_and_loggers_reach_the_log_and_still_the_screen(tmp_path: Path) -> None:
    code = (
        "import logging, sys, warnings; from pathlib import Path\n"
        "from seqaware.watchdog.rank_log import RankLog\n"
        "RankLog(Path(sys.argv[1])).hear_the_process()\n"
        "warnings.warn('an old habit'); logging.getLogger('library').warning('a %s', 'trifle')\n"
        "logging.getLogger('library').info('nothing')"
    )
    path = tmp_path / "rank.log"
    done = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=True)
    for text in (path.read_text(), done.stderr):
        assert "UserWarning: an old habit" in text and "a trifle" in text and "nothing" not in text


def _address(size: int = 2, port: int = 1) -> LaunchEnvironment:
    return LaunchEnvironment(0, size, 0, size, 1, "test", "127.0.0.1", port)


def test_launches_of_one_parent_meet_in_folders_of_their_own(tmp_path: Path) -> None:
    first, second = (open_launch_directory(_address(port=port), tmp_path).path for port in (1, 2))
    alone = open_launch_directory(_address(size=1), tmp_path).path
    assert len({first, second, alone}) == 3
    assert first == open_launch_directory(_address(port=1), tmp_path).path
    assert first.parent.stat().st_mode & 0o777 == 0o700


# Cards that are there: (rank, size, whether its process lives); what a rank of 3 then finds, and whether it was told.
_STARTS = {
    "all start again": ([(0, 3, False), (1, 3, False), (2, 3, False)], 1, [], False),
    "fewer than before": ([(0, 4, False), (1, 4, False), (3, 4, False)], 2, [], False),
    "more than before": ([(0, 2, False), (1, 2, False)], 2, [], False),
    "one starts again beside those that live": ([(0, 3, True), (1, 3, False), (2, 3, False)], 1, [0, 2], False),
    "a sibling has failed while another lives": ([(0, 3, True), (1, 3, False)], 2, [0, 1], True),
    "the only sibling so far has failed": ([(0, 3, False)], 2, [0], True),
}


@pytest.mark.parametrize("name", _STARTS)
def test_a_rank_forgets_earlier_launches_and_nothing_of_its_own(tmp_path: Path, name: str) -> None:
    cards, rank, left, told = _STARTS[name]
    folder = open_launch_directory(_address(3), tmp_path)
    for each, size, lives in cards:
        _card(each, size=size, **({"process": _SHELL} if lives else {})).write(folder.card(each))
        folder.dial(each).touch()
    assert claim(folder.path, "how it ended")
    with folder.take_place(rank, size=3):
        assert [card.rank for card in folder.cards()] == left and folder.told() == told
        assert all(folder.dial(each).exists() == (each in left) for each, *_ in cards)


@pytest.mark.parametrize(("card", "rank"), [((0, 3), 0), ((0, 2), 2)])
def test_two_launches_do_not_share_a_folder(tmp_path: Path, card: tuple[int, int], rank: int) -> None:
    folder = open_launch_directory(_address(3), tmp_path)
    number, size = card
    _card(number, size=size, process=HostProcess.of_myself()).write(folder.card(number))
    with folder.take_place(rank, size=3):
        pass  # the same process once more
    _card(number, size=size, process=_SHELL).write(folder.card(number))
    with pytest.raises(ConfigError, match="another launch of the same parent"), folder.take_place(rank, size=3):
        pass
    assert folder.card(number).exists()


def test_a_sibling_that_is_stopped_while_it_starts_does_not_hold_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launch_directory, "_LONGEST_WAIT", 0.2)
    folder = open_launch_directory(_address(), tmp_path)
    with folder.take_place(0, size=2), folder.take_place(1, size=2):
        pass


def test_a_folder_that_cannot_be_written_any_more_is_told(tmp_path: Path) -> None:
    folder = open_launch_directory(_address(), tmp_path)
    (folder.path / "starting").mkdir()
    with pytest.raises(ConfigError, match=r"cannot be used; got .*; point TMPDIR"):
        start_heartbeat(_address(), tmp_path)


def test_a_word_on_a_full_disk_is_told_rather_than_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "write", full)
    assert claim(tmp_path, "one") and not claim(tmp_path, "two")
    monkeypatch.setattr(os, "open", full)
    assert claim(tmp_path / "elsewhere", "three")


def test_a_rank_that_leaves_ends_its_children_but_not_the_guard_that_may_be_speaking(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = OwnRank(_address(), open_launch_directory(_address(), tmp_path))
    own.guard = 11
    ended: list[int] = []
    monkeypatch.setattr(monitor, "children", lambda: [HostProcess(11, 1), HostProcess(12, 1)])
    monkeypatch.setattr(HostProcess, "kill", lambda process: ended.append(process.pid))
    monkeypatch.setattr(os, "_exit", lambda code: ended.append(code))
    Monitor(own)._leave(1)
    assert ended == [12, 1]


def test_a_guard_of_ranks_that_can_write_nothing_ends_with_who_started_it(tmp_path: Path) -> None:
    folder = open_launch_directory(_address(), tmp_path)
    watching = threading.Thread(target=guard, args=(folder,), kwargs={"starter": -1}, daemon=True)
    watching.start()
    watching.join(LAUNCH_SECONDS)
    assert not watching.is_alive()


def test_a_python_without_descriptors_of_processes_sees_the_dead(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(os, "pidfd_open")
    folder = open_launch_directory(_address(), tmp_path)
    process = subprocess.Popen(["sleep", "60"])
    _card(1, process=HostProcess.of(process.pid)).write(folder.card(1))
    peers = Peers(folder, but=0)
    peers.look_around(1.0)
    process.kill()
    process.wait()
    peers.look_around(1.0)
    assert [peer.missed for peer in peers.here()] == [True] and peers.gone == []


def test_a_rank_that_starts_keeps_what_its_sibling_has_just_written(tmp_path: Path) -> None:
    """Both find the card of an earlier rank 1, and one of them is that rank by now."""
    folder = open_launch_directory(_address(), tmp_path)
    _card(1).write(folder.card(1))
    asking, within = threading.Event(), threading.Event()

    def start() -> None:
        asking.set()
        with folder.take_place(1, size=2):
            within.set()
            OwnRank(replace(_address(), rank=1), folder)

    sibling = threading.Thread(target=start)
    with folder.take_place(0, size=2):
        sibling.start()
        assert asking.wait(LAUNCH_SECONDS) and not within.wait(0.3)
        assert folder.cards() == []
    sibling.join()
    assert [card.rank for card in folder.cards()] == [1] and folder.dial(1).exists() and folder.log(1).exists()


def test_folders_of_launches_that_are_over_are_swept_after_a_day(tmp_path: Path) -> None:
    here = open_launch_directory(_address(), tmp_path).path
    host, namespace, *_ = here.name.rsplit("-", 4)
    old, young, foreign = (
        here.with_name(name) for name in (f"{host}-{namespace}-1-77-9", f"{host}-{namespace}-1-78-9", "other-1-1-77-9")
    )
    for folder in (old, young, foreign):
        folder.mkdir()
    for folder in (old, foreign, here):
        os.utime(folder, (0, 0))
    open_launch_directory(_address(port=3), tmp_path)
    assert [folder.exists() for folder in (old, young, foreign, here)] == [False, True, True, True]


def test_a_folder_that_cannot_be_used_is_told(tmp_path: Path) -> None:
    (tmp_path / f"seqaware-{os.getuid()}").symlink_to(tmp_path)
    with pytest.raises(ConfigError, match="belongs to somebody else; point TMPDIR"):
        open_launch_directory(_address(), tmp_path)
    with pytest.raises(ConfigError, match="cannot be used"):
        open_launch_directory(_address(), tmp_path / "missing")


@pytest.mark.skipif(os.geteuid() != 0, reason="giving a folder to another user needs root")
def test_a_launch_folder_that_another_user_has_prepared_is_refused(tmp_path: Path) -> None:
    prepared = tmp_path / f"seqaware-{os.getuid()}"
    prepared.mkdir(mode=0o777)
    os.chown(prepared, 12345, 12345)
    with pytest.raises(ConfigError, match="belongs to somebody else; point TMPDIR"):
        open_launch_directory(_address(), tmp_path)
    assert not list(prepared.iterdir())
    prepared.rmdir()
    prepared.write_text("a file in its place")
    with pytest.raises(ConfigError, match=r"cannot be used.*File exists.*point TMPDIR"):
        open_launch_directory(_address(), tmp_path)


def test_a_process_is_told_from_a_later_one_with_its_number() -> None:
    child = subprocess.Popen(["sleep", "60"])
    process = HostProcess.of(child.pid)
    assert process.life() is Life.RUNNING and replace(process, started=process.started - 1).life() is Life.GONE
    os.kill(child.pid, signal.SIGSTOP)
    while process.life() is Life.RUNNING:
        pass
    assert process.life() is Life.STOPPED
    process.kill()
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    assert process.life() is Life.GONE and ending(process.exit_status()) == "was killed by SIGKILL"
    child.wait()
    assert process.life() is Life.GONE and ending(process.exit_status()) == "is gone"
    assert ending(3 << 8) == "ended with exit code 3"


@pytest.mark.parametrize(
    ("status", "kills", "says"),
    [
        (9, 1, "out-of-memory killer has struck once on this host"),
        (None, 2, "out-of-memory killer has struck 2 times on this host"),
        (9, 0, "sacct -j JOB"),
        (7, 0, "full /dev/shm"),
    ],
)
def test_the_cause_of_a_death_is_guessed_in_words(status: int | None, kills: int, says: str) -> None:
    dead = Peer(_card(1), FORWARD, exit_status=status)
    assert says in failure_messages.dead_ranks_message([dead], memory_kills=kills, shared=None)


def test_many_dead_ranks_are_told_in_few_words() -> None:
    dead = [Peer(_card(rank), FORWARD, exit_status=9) for rank in range(6)]
    text = failure_messages.dead_ranks_message(dead, memory_kills=0, shared=None)
    assert text.count("was killed by SIGKILL at step 17, in forward") == 3 and "gone as well: ranks 3, 4, 5" in text


def test_what_the_same_command_does_follows_from_the_newest_checkpoint(tmp_path: Path) -> None:
    shared = tmp_path / "logs" / "attempt-002"
    assert failure_messages.resume_hint(shared) == "Nothing is saved yet: the same command begins anew."
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "latest").write_text("step-00000120")
    assert failure_messages.resume_hint(shared) == "The same command goes on after step 120, the newest that is saved."


def test_a_word_reaches_the_screen_while_a_library_has_another_file_there(tmp_path: Path) -> None:
    program = (
        "import os, sys\n"
        "from seqaware.watchdog.first_error import keep_screen, show\n"
        "keep_screen()\n"
        "os.dup2(os.open(sys.argv[1], os.O_WRONLY | os.O_CREAT), 2)\n"  # as DeepSpeed does for a trial of a compiler
        "show('rank 0 was killed')\n"
    )
    taken = tmp_path / "stderr.txt"
    done = subprocess.run([sys.executable, "-c", program, str(taken)], capture_output=True, text=True, check=True)
    assert done.stderr == "\nrank 0 was killed\n" and not taken.read_text()


def test_a_heartbeat_that_nobody_hears_does_nothing(tmp_path: Path) -> None:
    heartbeat = Heartbeat()
    heartbeat.phase("forward", 1)
    heartbeat.pulse()
    heartbeat.settle(tmp_path, 1)
    heartbeat.close()
    assert not heartbeat.sibling_is_dead() and not any(tmp_path.iterdir())


def test_the_watch_starts_without_torch() -> None:
    code = "import sys, seqaware.watchdog.heartbeat; sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
