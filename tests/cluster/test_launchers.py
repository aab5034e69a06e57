"""Every launcher of a cluster, on two hosts with one rank each: the losses are those of one rank that nothing started.

And when a rank is killed, the job ends on both hosts and leaves no process behind, or, under torchrun with restarts,
goes on from its newest checkpoint as if nothing had been. srun has tests of its own (test_slurm), and
tests/e2e/test_launchers.py starts several ranks on one host, which needs no root.
"""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests import launch
from tests.cluster.clocks import BEHIND, wrong_clock
from tests.cluster.hosts import Cluster
from tests.cluster.mpi import MPICH, OPEN_MPI, Mpi
from tests.patience import communicate, wait_for

pytestmark = pytest.mark.distributed

SCRIPT = "launcher/train.py"
STEPS = 2
# Enough for a rank to be killed between the second and the last.
LONGER = 12
ENDLESS = 100_000
# Between one rank and two the same sums are added in another order. A loss is a mean over 2,200 tokens of sums over
# 128 to 384 products in three layers: each value carries ~√(depth · width) ≈ 35 roundings of 6e-8, that is 2e-6
# relative, with a factor of five to spare.
TOLERANCE = 1e-5
# Whoever keeps compiled operators elsewhere means it for all ranks.
_ELSEWHERE = ("TORCH_EXTENSIONS_DIR",) if "TORCH_EXTENSIONS_DIR" in os.environ else ()
VARIABLES = ("PYTHONPATH", "OMP_NUM_THREADS", "DS_ACCELERATOR", "HF_HUB_OFFLINE", "PATH", *_ELSEWHERE)


@dataclass
class Site:
    """The hosts, and a folder that both see."""

    cluster: Cluster
    folder: Path

    def training(self, name: str, *more: str, steps: int = STEPS, stage: int = 3) -> list[str]:
        """`launcher/train.py train_configs/demo.yaml …`, into a folder of this name."""
        settings = {
            "training.schedule.max_steps": steps,
            # The same rate in every step, however many there are.
            "training.schedule.scheduler_type": "constant",
            "training.schedule.warmup_steps": 0,
            "evaluation": "{}",
            "logging.progress": "lines",
            "dataset.store_dir": self.folder / "stores",
            "output.save_model": "false",
            "output.dir": self.folder / name,
        }
        pairs = [word for key, value in settings.items() for word in ("--set", f"{key}={value}")]
        return [SCRIPT, "train_configs/demo.yaml", *pairs, "--deepspeed", f"ds_configs/zero{stage}.json", *more]

    def environment(self, **extra: str) -> dict[str, str]:
        """Of whoever starts a launcher; with a .deepspeed_env of what DeepSpeed is to hand on to the other hosts."""
        exports = self.folder / f"deepspeed_env-{len(extra)}"
        env = launch.environment(DS_ENV_FILE=str(exports), **extra)
        # It hands on variables that begin with PYTHON by itself.
        handed_on = ("OMP_NUM_THREADS", "DS_ACCELERATOR", "HF_HUB_OFFLINE", *_ELSEWHERE, *extra)
        exports.write_text("".join(f"{name}={env[name]}\n" for name in handed_on))
        return env

    def start(self, host: str, command: Sequence[str], env: Mapping[str, str] | None = None) -> subprocess.Popen[str]:
        return self.cluster.start(host, command, cwd=launch.ROOT, env=env or self.environment())

    def steps(self, name: str) -> list[float]:
        """The losses that are on file so far, in order; a line that is being written is none yet."""
        path = self.folder / name / "metrics.jsonl"
        lines = path.read_text().splitlines(keepends=True) if path.exists() else []
        records = [json.loads(line) for line in lines if line.endswith("\n")]
        return [record["loss"] for record in records if record["kind"] == "step"]

    def attempts(self, name: str) -> list[tuple[int, int, str]]:
        manifest = json.loads((self.folder / name / "manifest.json").read_text())
        topologies = [attempt["topology"] for attempt in manifest["attempts"]]
        return [(topology["ranks"], topology["nodes"], topology["launcher"]) for topology in topologies]

    def rank_on(self, host: str) -> int:
        """The pid of the rank on a host; what it has forked came later and looks like it."""
        ranks = [pid for pid, words in self.cluster.processes(host).items() if SCRIPT in words[1:3]]
        assert ranks, f"no rank on {host}: {self.cluster.processes(host)}"
        return min(ranks)


@pytest.fixture(scope="module")
def site(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Site:
    folder = tmp_path_factory.mktemp("launchers")
    (folder / "hosts").write_text("h1 slots=1\nh2 slots=1\n")
    return Site(cluster, folder)


@pytest.fixture(scope="module")
def alone(site: Site) -> list[float]:
    """The losses of one plain python rank; it tokenises for all others."""
    done = launch.python(*site.training("alone", steps=LONGER))
    assert done.returncode == 0, done.stderr[-4000:]
    assert site.attempts("alone") == [(1, 1, "none")]
    return site.steps("alone")


def _finish(*launchers: subprocess.Popen[str]) -> str:
    """Wait until all have ended well; what they said."""
    said = [communicate(launcher)[0] for launcher in launchers]
    assert [launcher.returncode for launcher in launchers] == [0] * len(launchers), "\n".join(said)[-6000:]
    return "\n".join(said)


def _kill_rank(site: Site, name: str, host: str, *, launchers: Sequence[subprocess.Popen[str]]) -> None:
    """SIGKILL the rank on a host once two steps are done."""

    def ended() -> str | None:
        over = [launcher for launcher in launchers if launcher.poll() is not None]
        return "\n".join(communicate(launcher)[0][-4000:] for launcher in over) if over else None

    wait_for("the second step", lambda: len(site.steps(name)) >= STEPS, problem=ended)
    os.kill(site.rank_on(host), signal.SIGKILL)


def _all_is_over(site: Site, *launchers: subprocess.Popen[str]) -> str:
    """Every launcher ends by itself, and no host has a process left then; what the launchers said."""
    said = "\n".join(communicate(launcher)[0] for launcher in launchers)
    hosts = site.cluster.names
    # A process that has ended may be there until its parent has noticed.
    wait_for("the end of all processes", lambda: not any(map(site.cluster.processes, hosts)), seconds=30.0)
    return said


def _pdsh(site: Site) -> list[str]:
    return ["deepspeed", "--hostfile", str(site.folder / "hosts")]


@pytest.fixture(scope="module")
def uninterrupted(site: Site, alone: list[float]) -> list[float]:
    """The losses of two ranks that nothing disturbs, started by DeepSpeed over pdsh and ssh."""
    del alone  # has tokenised
    _finish(site.start("h1", [*_pdsh(site), *site.training("pdsh", steps=LONGER)]))
    return site.steps("pdsh")


def test_deepspeed_over_pdsh(site: Site, alone: list[float], uninterrupted: list[float]) -> None:
    assert uninterrupted == pytest.approx(alone, rel=TOLERANCE)
    assert site.attempts("pdsh") == [(2, 2, "deepspeed")]


def test_deepspeed_by_plain_ssh(site: Site, alone: list[float]) -> None:
    """--no_ssh: a person starts it on every host, here in a loop over ssh."""
    env = site.environment()
    launchers = []
    for rank, host in enumerate(site.cluster.names):
        options = ["--no_ssh", "--node_rank", str(rank), "--master_addr", site.cluster["h1"].address]
        command = [*_pdsh(site), *options, *site.training("no_ssh", stage=2)]
        variables = [f"{name}={env[name]}" for name in VARIABLES]
        remote = f"cd {launch.ROOT} && exec {shlex.join(['env', *variables, *command])}"
        launchers.append(site.start("h1", ["ssh", host, remote]))
    _finish(*launchers)
    assert site.steps("no_ssh") == pytest.approx(alone[:STEPS], rel=TOLERANCE)
    assert site.attempts("no_ssh") == [(2, 2, "deepspeed")]


def _mpirun(site: Site, mpi: Mpi) -> tuple[list[str], dict[str, str]]:
    """The beginning of a command over both hosts, and the environment it wants."""
    env = site.environment(**mpi.variables)
    mpirun = str(mpi.folder(site.folder) / "mpirun")
    if mpi is MPICH:  # hands its whole environment on
        return [mpirun, "-hosts", "h1,h2", "-ppn", "1", "-n", "2"], env
    exports = [word for name in (*VARIABLES, "MPI4PY_LIBMPI") for word in ("-x", name)]
    return [mpirun, "--prefix", sys.prefix, "--host", "h1:1,h2:1", "-n", "2", *exports], env


@pytest.mark.parametrize("mpi", [MPICH, OPEN_MPI], ids=lambda mpi: mpi.name)
def test_mpirun(site: Site, alone: list[float], mpi: Mpi) -> None:
    command, env = _mpirun(site, mpi)
    name = f"mpirun-{mpi.name}"
    _finish(site.start("h1", [*command, sys.executable, *site.training(name)], env))
    assert site.steps(name) == pytest.approx(alone[:STEPS], rel=TOLERANCE)
    assert site.attempts(name) == [(2, 2, "mpirun")]


@pytest.mark.parametrize(("mpi", "started_by"), [(MPICH, "variables"), (OPEN_MPI, "mpirun")], ids=["mpich", "openmpi"])
def test_deepspeed_over_mpirun_and_a_rank_that_is_killed(
    site: Site, alone: list[float], mpi: Mpi, started_by: str
) -> None:
    env = site.environment(**mpi.variables)
    env["PATH"] = f"{mpi.folder(site.folder)}:{env['PATH']}"
    more = [f"--launcher_args=--prefix {sys.prefix}"] if mpi is OPEN_MPI else []
    options = ["--launcher", mpi.name, *more]
    name = f"deepspeed-{mpi.name}"
    launcher = site.start("h1", [*_pdsh(site), *options, *site.training(name, steps=ENDLESS)], env)
    _kill_rank(site, name, "h2", launchers=[launcher])
    said = _all_is_over(site, launcher)
    # DeepSpeed's helper for MPICH forgets how its rank has ended, so that this launcher says 0 whatever happens.
    assert mpi is MPICH or launcher.returncode > 0, said[-4000:]
    assert site.steps(name)[:STEPS] == pytest.approx(alone[:STEPS], rel=TOLERANCE)
    assert site.attempts(name) == [(2, 2, started_by)]


def test_a_rank_that_is_killed_under_pdsh(site: Site, alone: list[float]) -> None:
    del alone
    launcher = site.start("h1", [*_pdsh(site), *site.training("pdsh-killed", steps=ENDLESS)])
    _kill_rank(site, "pdsh-killed", "h2", launchers=[launcher])
    said = _all_is_over(site, launcher)
    assert launcher.returncode > 0, said[-4000:]


def _torchrun(site: Site, training: Sequence[str], *meeting: str, **on_h2: str) -> list[subprocess.Popen[str]]:
    """torchrun on both hosts, which learn from `meeting` where; {rank} in it stands for the host's number.

    Args:
        on_h2: variables for the second.
    """
    common = ["torchrun", "--nnodes", "2", "--nproc-per-node", "1"]
    return [
        site.start(
            host, [*common, *(word.format(rank=rank) for word in meeting), *training], site.environment() | extra
        )
        for (rank, host), extra in zip(enumerate(site.cluster.names), ({}, on_h2), strict=True)
    ]


def test_a_rank_that_is_killed_under_torchrun(site: Site, alone: list[float]) -> None:
    """Static rendezvous, no restarts, and the hosts disagree about the time of day by hours."""
    meeting = ("--node-rank", "{rank}", "--master-addr", "h1", "--master-port", "29500")
    on_h2 = wrong_clock(site.folder / "clocks", off=BEHIND)
    launchers = _torchrun(site, site.training("static", steps=ENDLESS), *meeting, **on_h2)
    _kill_rank(site, "static", "h2", launchers=launchers)
    said = _all_is_over(site, *launchers)
    assert all(launcher.returncode > 0 for launcher in launchers), said[-4000:]
    assert site.steps("static")[:STEPS] == pytest.approx(alone[:STEPS], rel=TOLERANCE)
    assert site.attempts("static") == [(2, 2, "torchrun")]


def test_torchrun_restarts_and_the_run_goes_on(site: Site, uninterrupted: list[float]) -> None:
    """Rank 0, which has the folder and the port, is killed; the second attempt must not stumble over the first."""
    meeting = ("--rdzv-backend", "c10d", "--rdzv-endpoint", "h1:29400", "--rdzv-id", "demo", "--max-restarts", "1")
    training = site.training("elastic", "--set", "output.save_every=1", steps=LONGER)
    launchers = _torchrun(site, training, *meeting)
    _kill_rank(site, "elastic", "h1", launchers=launchers)
    said = _finish(*launchers)
    assert "resumed     after step" in said
    assert site.attempts("elastic") == [(2, 2, "torchrun")] * 2
    # Another launcher, the same layout: the same numbers to the last bit.
    assert site.steps("elastic") == uninterrupted
