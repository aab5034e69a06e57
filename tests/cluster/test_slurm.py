"""Training on a real SLURM of several nodes: to the end, through a signal, a requeue and a node's death, in a sweep.

ZeRO-3 over gloo, a tiny model. What is typed here stands in docs/slurm.md.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests import launch, tiny
from tests.cluster.clocks import AHEAD, BEHIND, wrong_clock
from tests.cluster.slurm import Slurm, documented, documented_commands, need_slurm, slurm

STEPS = 120
ZERO3 = launch.DS_CONFIGS / "zero3.json"
# A rank on each of two nodes.
_TWO_RANKS = ("--nodes=2", "--ntasks-per-node=1", "--gpus-per-node=1", "--cpus-per-task=1")
_ONE_RANK = ("--nodes=1", "--ntasks-per-node=1", "--gpus-per-node=1", "--cpus-per-task=1")


@dataclass
class Site:
    """A cluster, and a folder to submit from, with rows and a model in it."""

    cluster: Slurm
    workshop: tiny.Workshop

    @property
    def folder(self) -> Path:
        return self.workshop.folder

    def config(self, name: str, **changes: Any) -> str:
        schedule = {"num_epochs": STEPS, "global_batch_size": 13, "scheduler_type": "linear", "max_steps": STEPS}
        output = {"dir": name, "save_every": 10, "save_model": False}
        changes = {"model__output_name": name, "training__schedule": schedule, "output": output, **changes}
        return str(self.workshop.write(name, self.workshop.config(**changes)))

    def sbatch(self, *words: str, text: str | None = None, **variables: str) -> str:
        """`sbatch words…`; returns the job's number."""
        env = launch.environment(SEQAWARE_HOME=str(launch.ROOT), **variables)
        return self.cluster.command("sbatch", "--parsable", *words, text=text, cwd=self.folder, **env)

    def type(self, start: str, job: str) -> None:
        """Type the command of the documentation that starts so, for this job."""
        self.cluster.command("bash", "-c", documented(start), JOB=job)

    def log(self, job: str) -> str:
        return Path(self.cluster.job(job)["StdOut"]).read_text()

    def trained(self, job: str, *, restarts: int = 0) -> None:
        """Wait until a job has come to a good end."""
        facts = self.cluster.wait_for_end(job)
        assert (facts["JobState"], facts["Restarts"]) == ("COMPLETED", str(restarts)), self.log(job)

    def wait_for_step(self, name: str, step: int, *, attempts: int) -> None:
        """Wait until the run's so many-th attempt has reported a step."""

        def is_reported() -> bool:
            metrics = self.folder / name / "metrics.jsonl"
            return metrics.exists() and len(self.attempts(name)) == attempts and self.steps(name)[-1:] >= [(step,)]

        self.cluster.wait_for(f"step {step} of {name}", is_reported)

    def lines(self, name: str) -> list[dict[str, Any]]:
        """metrics.jsonl, as far as its lines are whole."""
        text = (self.folder / name / "metrics.jsonl").read_text()
        return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]

    def steps(self, name: str) -> list[tuple[int, float, float]]:
        """Number, loss and gradient norm of every step that is written so far."""
        return [(line["step"], line["loss"], line["grad_norm"]) for line in self.lines(name) if line["kind"] == "step"]

    def attempts(self, name: str) -> list[dict[str, Any]]:
        attempts: list[dict[str, Any]] = json.loads((self.folder / name / "manifest.json").read_text())["attempts"]
        return attempts


def _with_wrong_clocks(folder: Path) -> dict[str, str]:
    """Variables for sbatch: a job's times, as newer SLURMs set them, and a Python for which they cannot be true.

    On the first node it is later than the job's end, on the second earlier than its begin.
    """
    path = wrong_clock(folder / "clocks", off=0)["PYTHONPATH"]
    program = folder / "clocks" / "bin" / "python"
    program.parent.mkdir()
    program.write_text(
        f"""#!/bin/bash
        export PYTHONPATH={path}
        if [[ $SLURM_NODEID == 0 ]]; then export SECONDS_OFF={AHEAD}; else export SECONDS_OFF={BEHIND}; fi
        exec {sys.executable} "$@"
        """
    )
    program.chmod(0o755)
    now = int(time.time())
    times = {"SLURM_JOB_START_TIME": str(now), "SLURM_JOB_END_TIME": str(now + 1800)}
    return {"SEQAWARE_VENV": str(program.parent.parent), **times}


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    need_slurm()
    workshop = tiny.build(tmp_path_factory.mktemp("slurm"))
    with slurm(nodes=3) as cluster:
        yield Site(cluster, workshop)


@pytest.fixture(scope="module")
def whole(site: Site) -> list[tuple[int, float, float]]:
    """The steps of a run that nobody disturbs: `launcher/train.py CONFIG --print-sbatch | sbatch`."""
    path = site.config("whole")
    form = ["--nodes", "2", "--gpus-per-node", "1", "--time", "30"]
    printed = subprocess.run(
        [sys.executable, launch.ROOT / "launcher" / "train.py", path, "--deepspeed", ZERO3, "--print-sbatch", *form],
        cwd=site.folder,
        env=launch.environment(),
        capture_output=True,
        text=True,
        check=True,
    )
    job = site.sbatch("--cpus-per-task=1", text=printed.stdout)
    site.trained(job)
    assert site.cluster.job(job)["JobName"] == "whole"
    log = site.log(job)
    assert "ranks       2 on 2 node(s)" in log
    assert log.index("0 errors, ") < log.index("ranks       2 on 2 node(s)")
    (attempt,) = site.attempts("whole")
    assert (attempt["topology"]["launcher"], attempt["topology"]["nodes"]) == ("srun", 2)
    return site.steps("whole")


def test_whatever_ends_an_attempt_the_run_is_the_same(site: Site, whole: list[tuple[int, float, float]]) -> None:
    """A signal, as before the time limit; then a requeue by hand; then a node dies. Four attempts, one run.

    On hosts whose clocks differ by hours, and which save by the clock too.
    """
    output = {"dir": "tried", "save_every": 10, "save_every_minutes": 0.05, "save_model": False}
    command = [f"{launch.ROOT}/slurm/train.sbatch", site.config("tried", output=output), "--deepspeed", str(ZERO3)]
    job = site.sbatch(*_TWO_RANKS, *command, **_with_wrong_clocks(site.folder))
    site.wait_for_step("tried", 15, attempts=1)
    site.type("scancel --batch --signal=USR2", job)
    site.wait_for_step("tried", 45, attempts=2)
    site.type("scontrol requeue", job)
    site.wait_for_step("tried", 75, attempts=3)
    node = site.cluster.command("scontrol", "show", "hostnames", site.cluster.job(job)["NodeList"]).split()[-1]
    site.cluster.cut_power(node)
    try:
        site.trained(job, restarts=3)
    finally:
        site.cluster.switch_on(node)
    # Bitwise.
    assert site.steps("tried") == whole
    assert len(site.attempts("tried")) == 4
    left = [line for line in site.lines("tried") if line["kind"] == "left"]
    assert left[0]["reason"] == "SIGUSR2"
    log = site.log(job).splitlines()
    resumed = [int(line.split("after step ")[1].split(",")[0]) for line in log if line.startswith("0: resumed")]
    assert resumed[0] == left[0]["step"] >= 15
    # No later than the last that was saved in any case, every tenth step.
    assert [step >= least for step, least in zip(resumed, (15, 40, 70), strict=True)] == [True] * 3
    assert [sum(f"attempt {number}, on " in line for line in log) for number in (1, 2, 3, 4, 5)] == [1, 1, 1, 1, 0]
    _check_logs_of_attempts(site, "tried")
    # Rank 0's host believes that the job is over, and says so; it does not leave for it.
    off = [line.partition("clock is ")[2] for line in log if line.startswith("0: warning     this host's clock is ")]
    assert [words.split()[2] for words in off] == ["ahead"] * 4, off


def _check_logs_of_attempts(site: Site, name: str) -> None:
    """Each attempt has a folder, with a log of each rank."""
    logs = sorted(
        path.relative_to(site.folder / name / "logs").as_posix() for path in site.folder.glob(f"{name}/logs/*/*.log")
    )
    assert logs == [f"attempt-{number:03}/rank-{rank:04}.log" for number in (1, 2, 3, 4) for rank in (0, 1)]


def test_a_sweep_trains_every_combination(site: Site) -> None:
    path = site.config("swept", training__schedule={"num_epochs": 9, "max_steps": 2, "global_batch_size": 13})
    lists = {"GAMMAS": "0 0.9", "SEEDS": "2", "SWEEP_DIR": "swept"}
    array = site.sbatch(*_ONE_RANK, "--array=0-1", f"{launch.ROOT}/slurm/sweep.sbatch", path, **lists)
    losses = []
    for task, gamma in enumerate(("0", "0.9")):
        site.trained(f"{array}_{task}")
        name = f"swept/gamma-{gamma}-seed-2"
        manifest = json.loads((site.folder / name / "manifest.json").read_text())
        assert manifest["objective"]["gamma"] == float(gamma)
        assert manifest["mathematics"]["seed"] == 2
        assert [step for step, *_ in site.steps(name)] == [1, 2]
        losses.append(site.steps(name)[-1][1])
    assert losses[0] != pytest.approx(losses[1], rel=1e-1)


def test_parts_of_a_corpus_make_the_store_that_one_process_makes(
    site: Site, whole: list[tuple[int, float, float]]
) -> None:
    del whole  # has tokenised the same rows
    stores = site.folder / "parts"
    path = site.config("parts", dataset__store_dir=str(stores))
    array = site.sbatch("--array=1-2", "--cpus-per-task=1", f"{launch.ROOT}/slurm/prepare.sbatch", path)
    for part in (1, 2):
        site.trained(f"{array}_{part}")
    merge = site.log(f"{array}_1").partition("Submitted batch job ")[2].split()[0]
    site.trained(f"{merge}_0")
    assert _files(stores) == _files(site.folder / "stores") != {}


def _files(folder: Path) -> dict[str, bytes]:
    """What lies in a store. Whoever trains from it leaves a note that it is whole."""
    files = (file for file in folder.rglob("*.*") if file.is_file() and file.stem != "verified")
    return {file.relative_to(folder).as_posix(): file.read_bytes() for file in files}


def test_what_the_documentation_submits_is_accepted(site: Site, tmp_path: Path) -> None:
    """As it stands there; SLURM only says when such a job would start, or why it never could."""
    wrapper = tmp_path / "sbatch"
    wrapper.write_text(f'#!/bin/bash\nexec {shutil.which("sbatch")} --test-only "$@"\n')
    wrapper.chmod(0o755)
    config = str(launch.ROOT / "train_configs" / "demo.yaml")
    env = launch.environment(**site.cluster.variables)
    env["PATH"] = f"{tmp_path}:{env['PATH']}"
    commands = [command.replace("my.yaml", config) for command in documented_commands() if "sbatch" in command]
    assert len(commands) == 6
    for command in commands:
        line = ["bash", "-o", "pipefail", "-c", command]
        done = subprocess.run(line, cwd=launch.ROOT, env=env, capture_output=True, text=True, check=False)
        assert done.returncode == 0, (command, done.stderr)
        assert "to start at" in done.stderr, (command, done.stderr)
