"""However the ranks are started, the run is the same: nothing at all, torchrun, mpirun, srun's variables.

The deepspeed launcher has its own test (test_same_training). One small run each; the losses must agree.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests import launch, tiny
from tests.cluster.mpi import MPICH
from tests.patience import communicate, run

# Between one rank and two the same sums are added in another order: float32, see test_same_training.
TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> tiny.Workshop:
    return tiny.build(tmp_path_factory.mktemp("launchers"))


def _config(workshop: tiny.Workshop, name: str) -> Path:
    schedule = {"num_epochs": 2, "global_batch_size": 13, "scheduler_type": "constant"}
    output = {"dir": str(workshop.folder / name), "save_model": False}
    config = workshop.config(training__schedule=schedule, output=output)
    return workshop.write(name, config)


def _losses(workshop: tiny.Workshop, name: str) -> list[float]:
    lines = [json.loads(line) for line in (workshop.folder / name / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if line["kind"] == "step"]


@pytest.fixture(scope="module")
def alone(workshop: tiny.Workshop) -> list[float]:
    """The losses of one rank that nothing started; what it chose is said, and what it does without is not imported."""
    zero = "--deepspeed", str(launch.DS_CONFIGS / "zero2.json")
    done = launch.python("launcher/train.py", str(_config(workshop, "alone")), *zero, PYTHONPROFILEIMPORTTIME="1")
    assert done.returncode == 0, done.stderr[-4000:]
    assert "\nattention   sdpa_per_document (" in done.stdout
    assert "\nloss        fused with its head, softmax by torch (the Triton kernel is for GPUs)\n" in done.stdout
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines() if line.startswith("import time")}
    assert "deepspeed.runtime.zero.muon.original_muon" in imported
    assert not {"mlflow.tracking", "torch._inductor.compile_fx", "datasets", "matplotlib", "peft"} & imported
    return _losses(workshop, "alone")


def _check(workshop: tiny.Workshop, name: str, started_by: str, alone: list[float]) -> None:
    assert _losses(workshop, name) == pytest.approx(alone, rel=TOLERANCE)
    topology = json.loads((workshop.folder / name / "manifest.json").read_text())["attempts"][0]["topology"]
    assert (topology["ranks"], topology["launcher"]) == (2, started_by)


def test_torchrun(workshop: tiny.Workshop, alone: list[float]) -> None:
    done = launch.torchrun("launcher/train.py", str(_config(workshop, "torchrun")), ranks=2)
    assert done.returncode == 0, done.stderr[-4000:]
    _check(workshop, "torchrun", "torchrun", alone)


def test_mpirun(workshop: tiny.Workshop, alone: list[float]) -> None:
    """mpi4py finds the ranks; the mpich of the development requirements starts them."""
    env = launch.environment(**MPICH.variables)
    mpirun = shutil.which(MPICH.programs["mpirun"], path=env["PATH"])
    assert mpirun is not None, "pip install mpich"
    command = [mpirun, "-n", "2", sys.executable, "launcher/train.py", str(_config(workshop, "mpirun"))]
    done = run(command, cwd=launch.ROOT, env=env)
    assert done.returncode == 0, done.stderr[-4000:]
    _check(workshop, "mpirun", "mpirun", alone)


def test_tasks_of_srun(workshop: tiny.Workshop, alone: list[float]) -> None:
    """Two processes with the variables that srun gives its tasks; no SLURM is needed to start them."""
    path = str(_config(workshop, "srun"))
    step = {"SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_NUM_NODES": "1"}
    job = {"SLURM_STEP_NODELIST": "localhost", "SLURM_JOB_ID": str(os.getpid())}
    tasks = []
    for rank in ("0", "1"):
        env = launch.environment(**step, **job, SLURM_PROCID=rank, SLURM_LOCALID=rank)
        command = [sys.executable, "launcher/train.py", path]
        tasks.append(subprocess.Popen(command, cwd=launch.ROOT, env=env, stderr=subprocess.PIPE, text=True))
    errors = [communicate(task)[1] for task in tasks]
    assert [task.returncode for task in tasks] == [0, 0], errors
    _check(workshop, "srun", "srun", alone)


def test_a_port_in_use_is_the_users_error_and_named(workshop: tiny.Workshop) -> None:
    """Not a connection that was lost to another rank."""
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = str(other.getsockname()[1])
        ranks = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
        place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        done = launch.python("launcher/train.py", str(_config(workshop, "port")), **ranks, **place)
    assert done.returncode == 2, done.stderr
    assert f"error: port {port} is in use; got Address already in use at 127.0.0.1:{port}" in done.stderr
    assert "--master_port" in done.stderr and "lost its connection" not in done.stderr
