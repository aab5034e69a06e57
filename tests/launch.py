"""Starting the real commands, as a person types them; and many ranks at once without paying for their imports."""

from __future__ import annotations

import multiprocessing.connection
import multiprocessing.forkserver
import os
import random
import runpy
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import chdir, suppress
from functools import cache
from multiprocessing.context import ForkServerContext
from multiprocessing.process import BaseProcess
from pathlib import Path
from unittest import mock

from tests.patience import Patience, run

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
    """A port that nobody listens on, below those that the kernel gives to outgoing connections."""
    first = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    while True:
        port = random.SystemRandom().randrange(10_000, first) if first > 20_000 else 0
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return int(probe.getsockname()[1])


def deepspeed(script: str, *arguments: str, ranks: int, port: int | None = None) -> subprocess.CompletedProcess[str]:
    """`deepspeed --num_gpus RANKS script arguments…`, from the repository's root."""
    command = ["deepspeed", "--num_gpus", str(ranks), "--master_port", str(port or free_port()), script, *arguments]
    return run(command, cwd=ROOT, env=environment())


def python(script: str, *arguments: str, cwd: Path = ROOT, **extra: str) -> subprocess.CompletedProcess[str]:
    """`python script arguments…`, the script named from the repository's root."""
    program = script if script.startswith("-") else str(ROOT / script)
    return run([sys.executable, program, *arguments], cwd=cwd, env=environment(**extra))


def torchrun(script: str, *arguments: str, ranks: int) -> subprocess.CompletedProcess[str]:
    """`torchrun --nproc-per-node RANKS script arguments…`."""
    port = str(free_port())
    command = ["torchrun", "--nproc-per-node", str(ranks), "--master-port", port, script, *arguments]
    return run(command, cwd=ROOT, env=environment())


class Forked:
    """Ranks that run a script with its arguments, forked from a process with the imports done.

    For where neither the launcher nor the imports are what is tested. Each rank has torchrun's variables.

    Args:
        ranks: None for one process without variables of a launcher, as `python script` starts it.
        folder: gets what the ranks print. variables: further ones of the environment.

    Attributes:
        processes: by rank. stdout, stderr: files of what all of them print. port: the master port.
    """

    def __init__(self, command: Sequence[str], *, ranks: int | None, folder: Path, **variables: str) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.port = free_port()
        count = 1 if ranks is None else ranks
        self.stdout, self.stderr = outputs = folder / "stdout.txt", folder / "stderr.txt"
        for path in outputs:
            path.touch()
        self.processes: list[BaseProcess] = []
        for rank in range(count):
            here = {} if ranks is None else _of_rank(rank, count, self.port)
            arguments = ([*command], {**here, **variables}, outputs)
            self.processes.append(_imported().Process(target=_be_rank, args=arguments))
        for process in self.processes:
            process.start()

    def codes(self) -> list[int | None]:
        return [process.exitcode for process in self.processes]

    def poll(self) -> int | None:
        """None while a rank runs; then the exit code of the first that failed, else 0."""
        codes = self.codes()
        return None if None in codes else next((code for code in codes if code), 0)

    def said(self) -> tuple[str, str]:
        """Standard output and error of all ranks."""
        return self.stdout.read_text(), self.stderr.read_text()

    def finish(self, progress: Callable[[], object] = lambda: None) -> int:
        """Wait for all ranks, or for one that fails: then the others are ended, as launchers do.

        Args:
            progress: returns something else whenever the ranks have got further, so that they do not hang.

        Returns: the exit code of the first that failed, else 0. Ranks that hang fail with -1.
        """
        patience, seen = Patience(), progress()
        while None in self.codes() and not any(self.codes()) and not patience.is_over():
            running = [process.sentinel for process in self.processes if process.exitcode is None]
            multiprocessing.connection.wait(running, timeout=1.0)
            if (now := progress()) != seen:
                seen = now
                patience.renew()
        codes = self.codes()
        self.end()
        return next((code for code in codes if code), -1 if None in codes else 0)

    def end(self) -> None:
        """End what still runs."""
        for process in self.processes:
            process.terminate()
            process.join(10)
            if process.exitcode is None:
                process.kill()
                process.join()


def forked(script: str, *arguments: str, ranks: int | None, **variables: str) -> subprocess.CompletedProcess[str]:
    """`script arguments…` as `Forked` starts it, to its end."""
    command = [script, *arguments]
    with tempfile.TemporaryDirectory() as folder:
        started = Forked(command, ranks=ranks, folder=Path(folder), **variables)
        code = started.finish()
        return subprocess.CompletedProcess(command, code, *started.said())


def _of_rank(rank: int, ranks: int, port: int) -> dict[str, str]:
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks}
    return {**{name: str(value) for name, value in place.items()}, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}


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
