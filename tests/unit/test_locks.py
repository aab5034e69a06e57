"""Locks with the kernel's flock and without it: taken one at a time, and freed by the death of their holder."""

from __future__ import annotations

import errno
import fcntl
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from filelock import Timeout

from seqaware import locks
from seqaware.locks import LEASE_SECONDS, acquire, held, lease_of

_MISSING = """
import errno, fcntl, sys, time
from pathlib import Path
def missing(file, operation):
    raise OSError(errno.{}, "")
fcntl.flock = missing
from seqaware.locks import held
with held(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(600)
"""


@pytest.fixture(params=["ENOSYS", "ENOLCK", "EOPNOTSUPP", "EINVAL"])
def missing(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The error of a file system without flock."""

    def refuse(file: int, operation: int) -> None:
        raise OSError(getattr(errno, request.param), "")

    monkeypatch.setattr(fcntl, "flock", refuse)
    return str(request.param)


def test_with_flock_there_is_no_lease(tmp_path: Path) -> None:
    with held(tmp_path / "store.lock"):
        assert [file.name for file in tmp_path.iterdir()] == ["store.lock"]


def test_without_flock_a_lease_names_its_owner_and_goes(tmp_path: Path, missing: str) -> None:
    (tmp_path / "store.lock").touch()  # what flock left before the disk was mounted without it
    with held(tmp_path / "store.lock"):
        owner = lease_of(tmp_path / "store.lock").owner
        assert owner is not None and owner.lease_duration == LEASE_SECONDS
        with pytest.raises(Timeout):
            lease_of(tmp_path / "store.lock").acquire(blocking=False)
    assert [file.name for file in tmp_path.iterdir()] == ["store.lock"]


def test_without_flock_one_after_the_other(tmp_path: Path, missing: str) -> None:
    inside = threading.Semaphore(1)

    def work() -> None:
        with held(tmp_path / "store.lock"):
            assert inside.acquire(blocking=False)
            inside.release()

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not (tmp_path / "store.lease").exists()


@pytest.mark.parametrize("reason", ["ENOSYS"])
def test_the_lease_of_a_killed_process_of_this_host_is_free(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reason: str
) -> None:
    file = tmp_path / "store.lock"
    command = [sys.executable, "-c", _MISSING.format(reason), str(file)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None and holder.stdout.readline() == "held\n"
        with pytest.raises(Timeout):
            lease_of(file).acquire(blocking=False)
        holder.kill()
        holder.wait()
        lease = lease_of(file)
        lease.acquire()
        lease.release()


def test_the_lease_of_a_dead_host_expires(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, missing: str) -> None:
    monkeypatch.setattr(locks, "LEASE_SECONDS", 0.3)
    monkeypatch.setattr(locks, "_RENEWED_EVERY", 0.1)
    (tmp_path / "store.lease").write_text("filelock/2\npid=7\nhost=other\nmode=lease\ntoken=0123\nduration=0.3\n")
    lock = acquire(tmp_path / "store.lock")
    assert lock.is_locked
    lock.release()


def test_an_error_that_is_not_about_locks_is_raised(tmp_path: Path) -> None:
    with pytest.raises(FileExistsError), held(Path("/dev/null/store.lock")):
        pass
