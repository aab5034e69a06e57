"""The lock on a folder in which operators are built: it ends with its holder."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from seqaware.compat import build_lock
from seqaware.compat.build_lock import BuildListener, Holder, KernelLock, listen

_HOLD = """
import sys, time
from seqaware.compat.build_lock import KernelLock
lock = KernelLock(sys.argv[1])
assert lock.try_acquire()
print("held", flush=True)
time.sleep(600)
"""


def test_a_lock_whose_holder_was_killed_is_free(tmp_path: Path) -> None:
    file = str(tmp_path / "lock")
    with subprocess.Popen([sys.executable, "-c", _HOLD, file], stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None and holder.stdout.readline() == "held\n"
        lock = KernelLock(file, wait_seconds=0.01)
        assert not lock.take()
        waiting = threading.Thread(target=lock.try_acquire)
        waiting.start()
        waiting.join(0.1)
        assert waiting.is_alive()
        holder.kill()
        waiting.join()
    lock.release()
    assert not Path(file).exists()


def test_a_file_that_a_killed_process_left_is_no_lock(tmp_path: Path) -> None:
    """As torch's own lock leaves it."""
    (tmp_path / "lock").touch()
    first, second = (KernelLock(str(tmp_path / "lock")) for _ in range(2))
    assert first.take()
    assert not second.take()
    first.release()
    assert second.take()
    second.release()
    assert not (tmp_path / "lock").exists()


def test_a_file_that_its_holder_has_removed_meanwhile_is_not_held(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "lock"
    file.touch()
    lock = KernelLock(str(file))
    real = build_lock.fcntl.flock

    def removed_first(number: int, how: int) -> None:
        file.unlink()
        real(number, how)

    monkeypatch.setattr(build_lock.fcntl, "flock", removed_first)
    assert not lock.take()


def test_a_file_that_is_removed_while_it_is_compared_is_not_held(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The lock of another process, on the file that has taken the place of the one that was opened here."""
    file = tmp_path / "lock"
    real = Path.stat

    def removed_between(path: Path, **how: bool) -> os.stat_result:
        found = real(path, **how)
        file.unlink(missing_ok=True)
        return found

    def removed_first(number: int, how: int) -> None:
        file.unlink()
        file.touch()

    monkeypatch.setattr(Path, "stat", removed_between)
    monkeypatch.setattr(build_lock.fcntl, "flock", removed_first)
    assert not KernelLock(str(file)).take()


def test_a_longer_text_of_a_killed_holder_does_not_hide_the_new_holder(tmp_path: Path) -> None:
    file = tmp_path / "lock"
    killed = Holder(pid=4_000_000, parent=3_999_999, host="host." * 20, moves=1_000)
    file.write_text(json.dumps(asdict(killed)))
    lock = KernelLock(str(file))
    lock.try_acquire()
    assert Holder(**json.loads(file.read_text())).pid == os.getpid()
    lock.release()


def test_on_a_disk_without_locks_a_lease_stands_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(number: int, how: int) -> None:
        raise OSError("no locks available")

    monkeypatch.setattr(build_lock.fcntl, "flock", refused)
    first, second = (KernelLock(str(tmp_path / "lock")) for _ in range(2))
    assert first.take()
    assert not second.take()
    first.release()
    assert second.take()
    second.release()
    assert not list(tmp_path.iterdir())


class _Listener(BuildListener):
    def __init__(self) -> None:
        super().__init__()
        self.moves = 0
        self.said: list[str] = []
        self.heard = threading.Event()

    def moved(self) -> None:
        self.moves += 1
        self.heard.set()

    def waits(self, text: str) -> None:
        self.said.append(text)
        self.heard.set()


@pytest.fixture
def heard() -> Iterator[_Listener]:
    before, listening = build_lock.listener(), _Listener()
    listen(listening)
    yield listening
    listen(before)


def test_who_waits_names_the_process_that_builds(
    tmp_path: Path, heard: _Listener, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(build_lock, "_SAID_AFTER_SECONDS", 0.0)
    (tmp_path / "cpu_adam").mkdir()
    file = tmp_path / "cpu_adam" / "lock"
    with subprocess.Popen([sys.executable, "-c", _HOLD, str(file)], stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None and holder.stdout.readline() == "held\n"
        lock = KernelLock(str(file), wait_seconds=0.01)
        waiting = threading.Thread(target=lock.try_acquire)
        waiting.start()
        while not heard.said:
            heard.heard.wait()
        # What the holder does not write is no progress: it was seen once.
        assert heard.moves == 1
        holder.kill()
        waiting.join()
    lock.release()
    assert heard.said == [f"the operator cpu_adam is not built yet: waiting for pid {holder.pid}, which is building it"]


def test_a_sibling_says_itself_that_it_builds(
    tmp_path: Path, heard: _Listener, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And every count that it writes is progress of those who wait."""
    monkeypatch.setattr(build_lock, "_SAID_AFTER_SECONDS", 0.0)
    file = tmp_path / "lock"
    holder, lock = (KernelLock(str(file), wait_seconds=0.01) for _ in range(2))
    assert holder.take()
    ours = Holder(1, os.getppid(), socket.gethostname())
    file.write_text(json.dumps(asdict(ours)))
    waiting = threading.Thread(target=lock.try_acquire)
    waiting.start()
    heard.heard.wait()  # the first content is read; a file that is just being written reads as the one before
    for moves in range(1, 4):
        heard.heard.clear()
        file.write_text(json.dumps(asdict(replace(ours, moves=moves))))
        heard.heard.wait()
    holder.release()
    waiting.join()
    lock.release()
    assert heard.moves >= 3 and heard.said == []


def test_a_build_proceeds_while_its_compiler_uses_the_cpu(
    tmp_path: Path, heard: _Listener, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(build_lock, "_BETWEEN_LOOKS", 0.02)
    file = tmp_path / "lock"
    lock = KernelLock(str(file))
    with subprocess.Popen([sys.executable, "-c", "while True: pass"]) as earlier:
        lock.try_acquire()
        # A child from before has nothing to do with the build.
        assert not heard.heard.wait(0.5)
        with subprocess.Popen([sys.executable, "-c", "while True: pass"]) as compiler:
            while heard.moves < 3:
                heard.heard.wait()
            assert json.loads(file.read_text())["moves"] >= 2
            compiler.kill()
        earlier.kill()
    lock.release()
