"""Several runs in one launch, each disturbed at a moment of its own; the outcome of each says how it ended.

A request: {"config", "deepspeed", "set": [overrides], "disturb": {…} or null}.
disturb: {"step": n, "phase": name, …} is done once, as step n turns to that (default: "batches"), on rank 0 but for a
signal; what it did to a file system is undone at "undo" (a step; default: when the run is over).

    "signal": name, "rank": r     "touch": file     "remove": [files and folders]
    "fill": folder                nothing can be written any more on its file system
    "lock": folder                it may only be read from now on; what is open may still be written
    "remount": folder             its content moves to a file system of its own, which is remounted read-only
    "clock": seconds              the wall clock jumps, on every rank
"""

from __future__ import annotations

import errno
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

from seqaware.config.loading import load_config
from seqaware.distributed.launch_environment import LaunchEnvironment
from seqaware.errors import SeqawareError
from seqaware.training.preemption import PreemptedExit, Signals
from seqaware.watchdog.heartbeat import Heartbeat
from tests.e2e.many_runs import do_each


class Disturbance(Heartbeat):
    """Hears a step begin, and disturbs the run once."""

    def __init__(self, rank: int, what: dict[str, Any] | None) -> None:
        self.rank = rank
        self.what = what or {"step": None}
        self.begun = self.undone = False

    def phase(self, name: str, step: int | None = None) -> None:
        what = self.what
        if not self.begun and step == what["step"] and name == what.get("phase", "batches"):
            self.begun = True
            if "clock" in what:
                self._shift_clock(what["clock"])
            if self.rank == what.get("rank", 0):
                self._disturb()
        if step is not None and step == what.get("undo") and name == "batches":
            self.undo()

    def _disturb(self) -> None:
        what = self.what
        if "touch" in what:
            Path(what["touch"]).touch()
        if "signal" in what:
            os.kill(os.getpid(), signal.Signals[what["signal"]])
        for path in map(Path, what.get("remove", [])):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        if "fill" in what:
            fill(Path(what["fill"], "filler"))
        if "lock" in what:
            subprocess.run(["mount", "--bind", "-o", "ro", what["lock"], what["lock"]], check=True)
        if "remount" in what:
            _give_own_mount(Path(what["remount"]))
            subprocess.run(["mount", "-o", "remount,ro", what["remount"]], check=True)

    def _shift_clock(self, seconds: float) -> None:
        self._clock = clock = time.time
        time.time = lambda: clock() + seconds

    def undo(self) -> None:
        """Give back the room, and the right to write."""
        if self.undone or not self.begun:
            return
        self.undone = True
        if "clock" in self.what:
            time.time = self._clock
        if self.rank != 0:
            return
        if "fill" in self.what:
            Path(self.what["fill"], "filler").unlink()
        if "lock" in self.what:
            subprocess.run(["umount", self.what["lock"]], check=True)
        if "remount" in self.what:
            subprocess.run(["mount", "-o", "remount,rw", self.what["remount"]], check=True)


def _give_own_mount(folder: Path) -> None:
    before = folder.with_name(folder.name + "-before")
    folder.rename(before)
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=24m", "tmpfs", str(folder)], check=True)
    shutil.copytree(before, folder, dirs_exist_ok=True)


def fill(path: Path) -> None:
    with path.open("wb", buffering=0) as file:
        for size in (1 << 20, 1 << 12, 1):
            try:
                while file.write(bytes(size)) == size:
                    pass
            except OSError as error:
                assert error.errno == errno.ENOSPC, error


def _run(request: dict[str, Any], address: LaunchEnvironment) -> dict[str, Any]:
    from seqaware.training.launch import RunRequest, run

    config = load_config(Path(request["config"]), request["set"])
    said: list[str] = []
    disturbance = Disturbance(address.rank, request["disturb"])
    ending = {"how": "trained", "text": ""}
    with Signals() as signals:
        try:
            run(
                RunRequest(config, Path(request["deepspeed"])),
                address=address,
                say=said.append,
                signals=signals,
                heartbeat=disturbance,
            )
        except PreemptedExit as left:
            ending = {"how": "left", "text": left.reason}
        except SeqawareError as error:
            ending = {"how": type(error).__name__, "text": str(error)}
        finally:
            disturbance.undo()
    return {**ending, "said": said}


if __name__ == "__main__":
    do_each(_run)
