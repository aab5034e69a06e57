"""Training on a real SLURM of several nodes: to the end, through signals, requeues and the death of a node, in a sweep.

ZeRO-3 over gloo, a tiny model. What is typed here stands in docs/slurm.md.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests import launch, tiny
from tests.cluster.slurm import Slurm, need_slurm, slurm

STEPS = 150
ZERO3 = launch.DS_CONFIGS / "zero3.json"
# A rank on each of two nodes.
_TWO_RANKS = ("--nodes=2", "--ntasks-per-node=1", "--gpus-per-node=1", "--cpus-per-task=1")


@dataclass
class Site:
    """A cluster, and a folder to submit from, with rows and a model in it."""

    cluster: Slurm
    workshop: tiny.Workshop

    @property
    def folder(self) -> Path:
        return self.workshop.folder

    def config(self, name: str, **changes: object) -> Path:
        schedule = {"num_epochs": 10 * STEPS, "global_batch_size": 13, "scheduler_type": "linear", "max_steps": STEPS}
        output = {"dir": name, "save_every": 10, "save_model": False}
        changes = {"model__output_name": name, "training__schedule": schedule, "output": output, **changes}
        return self.workshop.write(name, self.workshop.config(**changes))

    def command(self, *words: str, text: str | None = None, **variables: str) -> str:
        env = launch.environment(SEQAWARE_HOME=str(launch.ROOT), **variables)
        return self.cluster.command(*words, text=text, cwd=self.folder, **env)

    def log(self, job: str) -> str:
        return Path(self.cluster.job(job)["StdOut"]).read_text()

    def end(self, job: str, *, seconds: float = 120) -> str:
        """Wait for a job's end; its state."""
        return self.cluster.wait_for_end(job, seconds=seconds)["JobState"]

    def wait_for_step(self, name: str, step: int) -> None:
        def is_reported() -> bool:
            return (self.folder / name / "metrics.jsonl").exists() and self.steps(name)[-1:] >= [(step,)]

        self.cluster.wait_for(f"step {step} of {name}", is_reported, seconds=90)

    def steps(self, name: str) -> list[tuple[int, float, float]]:
        """Number, loss and gradient norm of every step that is written so far."""
        text = (self.folder / name / "metrics.jsonl").read_text()
        lines = [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]
        return [(line["step"], line["loss"], line["grad_norm"]) for line in lines if line["kind"] == "step"]

    def attempts(self, name: str) -> list[dict[str, object]]:
        attempts: list[dict[str, object]] = json.loads((self.folder / name / "manifest.json").read_text())["attempts"]
        return attempts


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
    job = site.command("sbatch", "--parsable", "--cpus-per-task=1", text=printed.stdout)
    assert site.end(job) == "COMPLETED", site.log(job)
    assert site.cluster.job(job)["JobName"] == "whole"
    log = site.log(job)
    assert "ranks       2 on 2 node(s)" in log
    assert log.index("0 errors, ") < log.index("ranks       2 on 2 node(s)")
    assert [(a["topology"]["launcher"], a["topology"]["nodes"]) for a in site.attempts("whole")] == [("srun", 2)]
    return site.steps("whole")


def _submit(site: Site, name: str) -> str:
    """`sbatch slurm/train.sbatch CONFIG --deepspeed …` on two nodes; the job's number."""
    script = str(launch.ROOT / "slurm" / "train.sbatch")
    arguments = [str(site.config(name)), "--deepspeed", str(ZERO3)]
    return site.command("sbatch", "--parsable", *_TWO_RANKS, script, *arguments)


def _check_two_attempts(site: Site, name: str, job: str, whole: list[tuple[int, float, float]]) -> None:
    assert site.end(job, seconds=150) == "COMPLETED", site.log(job)
    assert site.cluster.job(job)["Restarts"] == "1"
    assert len(site.attempts(name)) == 2
    # Bitwise: the same steps, losses and norms as those of the run that nobody disturbed.
    assert site.steps(name) == whole


def test_a_signal_saves_requeues_and_resumes(site: Site, whole: list[tuple[int, float, float]]) -> None:
    """As `--signal=B:USR2@…` does before the time limit: SLURM signals the batch script."""
    job = _submit(site, "signalled")
    site.wait_for_step("signalled", 15)
    site.command("scancel", "--batch", "--signal=USR2", job)
    _check_two_attempts(site, "signalled", job, whole)
    lines = [json.loads(line) for line in (site.folder / "signalled" / "metrics.jsonl").read_text().splitlines()]
    assert [line["reason"] for line in lines if line["kind"] == "left"] == ["SIGUSR2"]


def test_a_job_that_a_person_requeues_goes_on(site: Site, whole: list[tuple[int, float, float]]) -> None:
    job = _submit(site, "requeued")
    site.wait_for_step("requeued", 15)
    site.command("scontrol", "requeue", job)
    _check_two_attempts(site, "requeued", job, whole)


def test_a_node_that_dies_is_replaced_and_the_run_goes_on(site: Site, whole: list[tuple[int, float, float]]) -> None:
    job = _submit(site, "bereft")
    site.wait_for_step("bereft", 15)
    node = site.command("scontrol", "show", "hostnames", site.cluster.job(job)["NodeList"]).split()[-1]
    site.cluster.cut_power(node)
    try:
        _check_two_attempts(site, "bereft", job, whole)
    finally:
        site.cluster.switch_on(node)


def test_a_sweep_trains_every_combination(site: Site) -> None:
    path = site.config("swept", training__schedule={"num_epochs": 9, "max_steps": 2, "global_batch_size": 13})
    script = str(launch.ROOT / "slurm" / "sweep.sbatch")
    form = ["--nodes=1", "--ntasks-per-node=1", "--gpus-per-node=1", "--cpus-per-task=1", "--array=0-1"]
    job = site.command("sbatch", "--parsable", *form, script, str(path), GAMMAS="0 0.9", SEEDS="1")
    for task in ("0", "1"):
        assert site.end(f"{job}_{task}") == "COMPLETED", site.log(f"{job}_{task}")
    runs = sorted(manifest.parent for manifest in site.folder.glob("**/swept*/**/manifest.json"))
    objectives = [json.loads((run / "manifest.json").read_text())["objective"]["gamma"] for run in runs]
    assert sorted(objectives) == [0.0, 0.9]
