"""The lock on a folder in which operators are built: it ends with its holder."""

from __future__ import annotations

import subprocess
import sys
import threading
from pathlib import Path

import pytest
from torch.utils import cpp_extension

from seqaware.engine import build_lock
from seqaware.engine.build_lock import KernelLock, free_locks_of_the_dead

_HOLD = """
import sys, time
from seqaware.engine.build_lock import KernelLock
assert KernelLock(sys.argv[1]).try_acquire()
print("held", flush=True)
time.sleep(60)
"""


def test_a_lock_whose_holder_was_killed_is_free(tmp_path: Path) -> None:
    file = str(tmp_path / "lock")
    with subprocess.Popen([sys.executable, "-c", _HOLD, file], stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None and holder.stdout.readline() == "held\n"
        lock = KernelLock(file, wait_seconds=0.01)
        assert not lock.try_acquire()
        waiting = threading.Thread(target=lock.wait)
        waiting.start()
        waiting.join(0.1)
        assert waiting.is_alive()
        holder.kill()
        waiting.join(10)
        assert not waiting.is_alive()
    assert not Path(file).exists()


def test_a_file_that_a_killed_process_left_is_no_lock(tmp_path: Path) -> None:
    """As torch's own lock leaves it."""
    (tmp_path / "lock").touch()
    first, second = (KernelLock(str(tmp_path / "lock")) for _ in range(2))
    assert first.try_acquire()
    assert not second.try_acquire()
    first.release()
    assert second.try_acquire()
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
    assert not lock.try_acquire()


def test_a_disk_without_locks_has_what_torch_has(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(number: int, how: int) -> None:
        raise OSError("no locks available")

    monkeypatch.setattr(build_lock.fcntl, "flock", refused)
    first, second = (KernelLock(str(tmp_path / "lock")) for _ in range(2))
    assert first.try_acquire()
    assert not second.try_acquire()
    first.release()
    assert second.try_acquire()


def test_torch_builds_under_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpp_extension, "FileBaton", cpp_extension.FileBaton)
    free_locks_of_the_dead()
    assert cpp_extension.FileBaton is KernelLock
