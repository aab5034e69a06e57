"""Starting the real commands, as a person types them; and many ranks at once without paying for their imports."""

from __future__ import annotations

import itertools
import multiprocessing.connection
import multiprocessing.forkserver
import os
import runpy
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import chdir
from functools import cache
from multiprocessing.context import ForkServerContext
from multiprocessing.process import BaseProcess
from pathlib import Path
from unittest import mock

ROOT = Path(__file__).parent.parent
DS_CONFIGS = ROOT / "ds_configs"


def environment(**extra: str) -> dict[str, str]:
    """Ours, for ranks on a CPU with one thread each, and this Python's commands first."""
    hidden = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    env = {name: value for name, value in os.environ.items() if name not in hidden}
    here = str(Path(sys.executable).parent)
    return {
        **env,
        "PATH": f"{here}:{ROOT / 'tests' / 'compiler'}:{env['PATH']}",
        "OMP_NUM_THREADS": "1",
        "DS_ACCELERATOR": "cpu",
        "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": str(ROOT),
        **extra,
    }


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def deepspeed(
    script: str, *arguments: str, ranks: int, port: int | None = None, timeout: int = 600
) -> subprocess.CompletedProcess[str]:
    """`deepspeed --num_gpus RANKS script arguments…`, from the repository's root."""
    command = ["deepspeed", "--num_gpus", str(ranks), "--master_port", str(port or free_port()), script, *arguments]
    return _run(command, timeout)


def python(
    script: str, *arguments: str, timeout: int = 600, cwd: Path = ROOT, **extra: str
) -> subprocess.CompletedProcess[str]:
    """`python script arguments…`, the script named from the repository's root."""
    program = script if script.startswith("-") else str(ROOT / script)
    return _run([sys.executable, program, *arguments], timeout, cwd=cwd, **extra)


def torchrun(script: str, *arguments: str, ranks: int, timeout: int = 600) -> subprocess.CompletedProcess[str]:
    """`torchrun --nproc-per-node RANKS script arguments…`."""
    port = str(free_port())
    command = ["torchrun", "--nproc-per-node", str(ranks), "--master-port", port, script, *arguments]
    return _run(command, timeout)


def forked(script: str, *arguments: str, ranks: int, timeout: int = 600) -> subprocess.CompletedProcess[str]:
    """`script arguments…` on RANKS ranks, with torchrun's variables, but forked from a process with the imports done.

    For where the launcher and the start are not what is tested. If a rank fails the others are ended, as launchers do.
    """
    here = {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1"}
    here["MASTER_PORT"] = str(free_port())
    with tempfile.TemporaryDirectory() as folder:
        outputs = [(Path(folder, f"{rank}.out"), Path(folder, f"{rank}.err")) for rank in range(ranks)]
        for path in itertools.chain(*outputs):
            path.touch()
        processes = [
            _imported().Process(
                target=_be_rank,
                args=([script, *arguments], {**here, "RANK": str(rank), "LOCAL_RANK": str(rank)}, outputs[rank]),
            )
            for rank in range(ranks)
        ]
        for process in processes:
            process.start()
        failed = _first_failure(processes, time.monotonic() + timeout)
        stdout, stderr = ("".join(path.read_text() for path in paths) for paths in zip(*outputs, strict=True))
    return subprocess.CompletedProcess([script, *arguments], failed, stdout, stderr)


@cache
def _imported() -> ForkServerContext:
    """A server that imports tests/preloaded.py, once a session, and forks."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.preloaded"])
    with chdir(ROOT), mock.patch.dict(os.environ, environment(), clear=True):
        multiprocessing.forkserver.ensure_running()
    return context


def _be_rank(command: Sequence[str], variables: Mapping[str, str], outputs: tuple[Path, Path]) -> None:
    for number, path in enumerate(outputs, start=1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_APPEND), number)
    os.environ.update(variables)
    sys.argv = [*command]
    runpy.run_path(command[0], run_name="__main__")


def _first_failure(processes: Sequence[BaseProcess], deadline: float) -> int:
    """Wait for all, or for one that fails, which ends the others; returns its exit code, else 0."""
    while any(process.exitcode is None for process in processes) and time.monotonic() < deadline:
        multiprocessing.connection.wait([p.sentinel for p in processes if p.exitcode is None], timeout=1.0)
        if any(process.exitcode for process in processes):
            break
    codes = [process.exitcode for process in processes]
    for process in processes:
        process.terminate()
        process.join(10)
        if process.exitcode is None:
            process.kill()
            process.join()
    return next((code for code in codes if code), -1 if None in codes else 0)


def _run(command: list[str], timeout: int, cwd: Path = ROOT, **extra: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command, cwd=cwd, env=environment(**extra), capture_output=True, text=True, timeout=timeout, check=False
    )
