"""The files of slurm/ on a real SLURM, with a stand-in for Python: which exit code sends a job back to the queue, who
hears signals, how a combination and a part are told apart, what a container changes. test_slurm.py trains.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests import launch
from tests.cluster.slurm import Slurm, documented, need_slurm, slurm
from tests.patience import run

# Says which command it was told to run, as which rank, then does what the test has put into the environment.
_STAND_IN = """#!/bin/bash
name=$(basename "$1" .py)
shift
attempt=${SLURM_RESTART_COUNT:-0}
echo "step $SLURM_STEP_ID, rank $SLURM_PROCID of $SLURM_STEP_NUM_TASKS: $name $*"
case $name in
    train | doctor)
        # Begin together: a rank that fails before another has begun is another story.
        touch "here-$SLURM_JOB_ID-$SLURM_STEP_ID-$SLURM_PROCID"
        until [[ $(ls "here-$SLURM_JOB_ID-$SLURM_STEP_ID-"* | wc -l) == "$SLURM_STEP_NUM_TASKS" ]]; do sleep 0.1; done
        if [[ $name == doctor ]]; then eval "${DOCTOR:-}"; else eval "${COMMAND:-}"; fi
        ;;
    *) eval "${COMMAND:-}" ;;
esac
"""
# Under which a program that runs in an image says how it was called, and runs all the same.
_APPTAINER = """#!/bin/bash
echo "apptainer $*"
while [[ $1 != python ]]; do shift; done
exec "$@"
"""
_TWO_RANKS = ("--nodes=2", "--ntasks-per-node=1", "--gpus-per-node=1", "--cpus-per-task=1")
_ONE_CPU = ("--gpus-per-node=0", "--cpus-per-task=1")
# SLURM signals every process of a step: the sleep may have died of it before the shell hears it, and must not end it.
_LISTEN = (
    "((attempt == 0)) || exit 0; trap ': > heard-$SLURM_JOB_ID-$SLURM_PROCID; exit 85' USR2 TERM; "
    "touch listening-$SLURM_JOB_ID-$SLURM_PROCID; while true; do sleep 60 & wait; done"
)


@dataclass
class Site:
    """A cluster, a folder to submit from, and folders of programs in the place of the real ones."""

    cluster: Slurm
    folder: Path
    venv: Path
    programs: Path

    def environment(self, **variables: str) -> dict[str, str]:
        env = launch.environment(SEQAWARE_HOME=str(launch.ROOT), SEQAWARE_VENV=str(self.venv), A_SECRET="hunter2")
        return {**env, "PATH": f"{self.programs}:{env['PATH']}", **variables}

    def submit(self, *words: str, **variables: str) -> str:
        """`sbatch words…`; returns the job's number."""
        return self.cluster.command("sbatch", "--parsable", *words, cwd=self.folder, **self.environment(**variables))

    def train(self, *options: str, **variables: str) -> str:
        """Submit train.sbatch for two nodes with a rank each."""
        script = str(launch.ROOT / "slurm" / "train.sbatch")
        arguments = ("--set", "a.b=c d", "--resume", "never", "--deepspeed=x.json")
        return self.submit(*_TWO_RANKS, *options, script, "a.yaml", *arguments, **variables)

    def type(self, start: str, job: str) -> None:
        """Type the command of the documentation that starts so, for this job."""
        self.cluster.command("bash", "-c", documented(start), JOB=job)

    def end(self, job: str) -> tuple[str, str, str]:
        """State, exit code and restarts of a job at its end."""
        facts = self.cluster.wait_for_end(job)
        return facts["JobState"], facts["ExitCode"], facts["Restarts"]

    def log(self, job: str) -> str:
        return Path(self.cluster.job(job)["StdOut"]).read_text()

    def has_heard(self, job: str) -> bool:
        """Whether both ranks were told to leave. Their last words may be lost with the step; files are not."""
        return all((self.folder / f"heard-{job}-{rank}").exists() for rank in range(2))

    def wait_until_listening(self, job: str) -> None:
        files = [self.folder / f"listening-{job}-{rank}" for rank in range(2)]
        self.cluster.wait_for("ranks that listen", lambda: all(file.exists() for file in files))


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    need_slurm()
    folder = tmp_path_factory.mktemp("site")
    venv, programs = folder / "venv", folder / "programs"
    for file, text in ((venv / "bin" / "python", _STAND_IN), (programs / "apptainer", _APPTAINER)):
        _write_program(file, text)
    (programs / "python").symlink_to(venv / "bin" / "python")
    with slurm(nodes=3) as cluster:
        yield Site(cluster, folder, venv, programs)


def _write_program(file: Path, text: str) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)
    file.chmod(0o755)


@pytest.fixture(scope="module")
def limited(site: Site) -> str:
    """A job that SLURM itself signals some time before its limit of one minute; it needs no attention till then."""
    return site.train("--time=1", "--signal=B:USR2@20", COMMAND=_LISTEN)


@pytest.mark.usefixtures("limited")
def test_only_a_run_that_left_goes_back_to_the_queue(site: Site) -> None:
    """Who fails first decides; what the others say after srun's SIGTERM does not."""
    obey = "trap 'exit 85' TERM; sleep 30 & wait"
    first_time = "((attempt == 0)) || exit 0"
    ends = {
        "true": ("COMPLETED", "0:0", "0"),
        "exit 1": ("FAILED", "1:0", "0"),
        f"[[ $SLURM_PROCID == 1 ]] && exit 1; {obey}": ("FAILED", "1:0", "0"),
        f"[[ $SLURM_PROCID == 0 ]] && exit 2; {obey}": ("FAILED", "2:0", "0"),
        "[[ $SLURM_PROCID == 0 ]] && exit 2; sleep 30": ("FAILED", "2:0", "0"),
        f"[[ $SLURM_PROCID == 1 ]] && kill -9 $$; {obey}": ("FAILED", "137:0", "0"),
        f"{first_time}; exit 85": ("COMPLETED", "0:0", "1"),
        # One is quick, the other is still on its way out when it is sent SIGTERM, and does not listen any more.
        f"{first_time}; [[ $SLURM_PROCID == 0 ]] && exit 85; sleep 30": ("COMPLETED", "0:0", "1"),
        # Asked before they could listen: the signal killed them.
        f"{first_time}; kill -USR2 $$": ("COMPLETED", "0:0", "1"),
    }
    jobs = {command: site.train(COMMAND=command) for command in ends}
    assert {command: site.end(job) for command, job in jobs.items()} == ends

    log = site.log(jobs["true"])
    for rank in (0, 1):
        assert (
            f"{rank}: step 1, rank {rank} of 2: train a.yaml --set a.b=c d --resume never --deepspeed=x.json\n" in log
        )
    # Steps 0 and 1 are those of the first attempt, whose numbers are not used again.
    twice = site.log(jobs[f"{first_time}; exit 85"])
    assert [f"attempt {number}, on" in twice for number in (1, 2, 3)] == [True, True, False]
    assert [word in twice for word in ("step 0, ", "step 1, ", "step 2, ", "step 3, ", "step 4, ")] == [True] * 4 + [
        False
    ]
    assert "hunter2" not in log + twice


def test_the_doctor_comes_first_and_its_error_ends_the_job(site: Site) -> None:
    """One rank has the table, and may be the last to end."""
    sick = site.train(DOCTOR="[[ $SLURM_PROCID == 0 ]] && sleep 1 && echo THE TABLE; exit 2")
    assert site.end(sick) == ("FAILED", "2:0", "0")
    log = site.log(sick)
    assert log.count("0: THE TABLE\n") == 1
    for rank in (0, 1):
        assert f"{rank}: step 0, rank {rank} of 2: doctor a.yaml --set a.b=c d --deepspeed=x.json\n" in log
    assert "train" not in log


def test_people_are_heard(site: Site) -> None:
    to_script, to_ranks, refused, cancelled = (site.train(COMMAND=_LISTEN) for _ in range(4))
    for job in (to_script, to_ranks, refused, cancelled):
        site.wait_until_listening(job)
    site.type("scancel --batch", to_script)
    site.cluster.command("scancel", "--signal=USR2", to_ranks)
    site.type("scontrol update", refused)
    site.type("scancel --batch", refused)
    site.type("scancel $JOB", cancelled)
    assert site.end(to_script) == ("COMPLETED", "0:0", "1")
    assert site.end(to_ranks) == ("COMPLETED", "0:0", "1")
    assert site.end(refused) == ("FAILED", "85:0", "0")
    assert site.end(cancelled)[::2] == ("CANCELLED", "0")
    for job in (to_script, to_ranks):
        assert site.has_heard(job)
    assert "it could not be requeued" in site.log(refused)


def test_a_task_of_a_sweep_is_requeued_alone(site: Site) -> None:
    """The one that leaves bears the number of the whole array, and the others are done by then."""
    script = str(launch.ROOT / "slurm" / "sweep.sbatch")
    leave = "((attempt > 0 || SLURM_JOB_ID != SLURM_ARRAY_JOB_ID)) && exit 0; sleep 3; exit 85"
    lists = {"GAMMAS": "0 0.9", "SEEDS": "7 8", "COMMAND": leave}
    array = site.submit("--array=0-3", *_ONE_CPU, script, "some/b.yaml", "--resume", "never", **lists)
    beyond = site.submit("--array=4", *_ONE_CPU, script, "some/b.yaml", **lists)
    tasks = [f"{array}_{index}" for index in range(4)]
    ends = {task: site.end(task) for task in tasks}
    leaves = {task: site.cluster.job(task)["JobId"] == array for task in tasks}
    assert list(leaves.values()).count(True) == 1
    assert ends == {task: ("COMPLETED", "0:0", str(int(left))) for task, left in leaves.items()}
    for task, gamma, seed in zip(tasks, ("0", "0", "0.9", "0.9"), ("7", "8", "7", "8"), strict=True):
        sets = f"--set training.sft.gamma={gamma} --set training.control.seed={seed}"
        folder = f"--set output.dir=runs/b-sweep/gamma-{gamma}-seed-{seed}"
        log = site.log(task)
        assert log.count(f": train some/b.yaml --resume never {sets} {folder}\n") == 1 + leaves[task]
        assert log.count(f"doctor some/b.yaml {sets} {folder}\n") == 1 + leaves[task]
    assert site.end(f"{beyond}_4") == ("FAILED", "2:0", "0")
    assert "4 combinations, counted from 0; got task 4; sbatch --array=0-3" in site.log(f"{beyond}_4")


def test_the_merge_waits_for_every_part(site: Site) -> None:
    script = str(launch.ROOT / "slurm" / "prepare.sbatch")
    order = "echo $* >> order; sleep 1"
    array = site.submit("--array=1-3", "--cpus-per-task=1", "--job-name=corpus", script, "c.yaml", COMMAND=order)
    assert [site.end(f"{array}_{part}") for part in (1, 2, 3)] == [("COMPLETED", "0:0", "0")] * 3
    first = site.log(f"{array}_1")
    merge = first.partition("Submitted batch job ")[2].split()[0]
    assert site.end(f"{merge}_0") == ("COMPLETED", "0:0", "0")
    assert site.cluster.job(f"{merge}_0")["JobName"] == "corpus"
    lines = (site.folder / "order").read_text().splitlines()
    assert sorted(lines[:3]) == [f"c.yaml --part {part}/3" for part in (1, 2, 3)]
    assert lines[3:] == ["c.yaml --merge 3"]
    again = site.submit("--array=2", "--cpus-per-task=1", script, "c.yaml")
    assert site.end(f"{again}_2") == ("FAILED", "2:0", "0")
    assert "got task 2; write how many: PARTS=…" in site.log(f"{again}_2")


def test_an_image_of_apptainer_runs_doctor_and_ranks(site: Site) -> None:
    job = site.train(SEQAWARE_CONTAINER="my.sif", SEQAWARE_MOUNTS="/data:/data", SEQAWARE_VENV="/nowhere")
    assert site.end(job) == ("COMPLETED", "0:0", "0")
    seen = f"{launch.ROOT}:{launch.ROOT},{site.folder}:{site.folder},/data:/data"
    call = f"apptainer exec --nv --bind {seen} --pwd {site.folder} my.sif python {launch.ROOT}/launcher"
    log = site.log(job)
    for command in ("doctor", "train"):
        assert log.count(f"{call}/{command}.py a.yaml --set") == 2
        assert log.count(f"rank 1 of 2: {command}") == 1


def test_the_limit_of_time_is_heard(site: Site, limited: str) -> None:
    assert site.end(limited) == ("COMPLETED", "0:0", "1")
    log = site.log(limited)
    assert site.has_heard(limited)
    assert "attempt 2, on" in log


def _without_slurm(folder: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    """train.sbatch as SLURM starts it, but its srun only says how it was called and which variables it sees."""
    programs = folder / "programs"
    _write_program(
        programs / "srun", '#!/bin/bash\necho "srun $*"\necho "threads $OMP_NUM_THREADS, path $PYTHONPATH"\n'
    )
    _write_program(programs / "module", '#!/bin/bash\necho "module $*"\n')
    env = launch.environment(SLURM_JOB_ID="7", SLURM_JOB_NODELIST="n1", SLURM_SUBMIT_DIR=str(launch.ROOT))
    del env["OMP_NUM_THREADS"]
    env |= {"PATH": f"{programs}:{env['PATH']}", "SLURM_CPUS_PER_TASK": "6", "PYTHONPATH": "/mine", **variables}
    command = ["bash", str(launch.ROOT / "slurm" / "train.sbatch"), "a.yaml"]
    return run(command, cwd=folder, env=env)


def test_any_other_image_is_handed_to_pyxis(tmp_path: Path) -> None:
    """Pyxis adds options to srun; there is none here, so this looks at the options."""
    done = _without_slurm(tmp_path, SEQAWARE_CONTAINER="/images/my.sqsh", SEQAWARE_MODULES="gcc/13 cuda/12.8")
    assert (done.returncode, done.stderr) == (0, "")
    seen = f"{launch.ROOT}:{launch.ROOT},{tmp_path}:{tmp_path}"
    image = f"--container-image=/images/my.sqsh --container-mounts={seen} --container-workdir={tmp_path}"
    lines = done.stdout.splitlines()
    assert "module load gcc/13 cuda/12.8" in lines
    start = f"--label {image} bash {launch.ROOT}/slurm/rank.sh python {launch.ROOT}/launcher"
    assert [line for line in lines if line.startswith("srun")] == [
        f"srun --kill-on-bad-exit=0 --wait=120 {start}/doctor.py a.yaml",
        f"srun --kill-on-bad-exit=1 {start}/train.py a.yaml",
    ]
    assert f"threads 6, path {launch.ROOT}:/mine" in lines


@pytest.mark.parametrize(
    ("variables", "reason"),
    [
        ({"SEQAWARE_VENV": "/nowhere"}, "there is no /nowhere/bin/python; run install.sh, or set SEQAWARE_VENV or"),
        ({"SLURM_SUBMIT_DIR": "/nowhere"}, "/nowhere is not the repository; submit from there, or set SEQAWARE_HOME"),
    ],
)
def test_what_is_missing_is_said_before_anything_starts(tmp_path: Path, variables: dict[str, str], reason: str) -> None:
    done = _without_slurm(tmp_path, **variables)
    assert done.returncode == 2
    assert f"error: {reason}" in done.stderr
    assert "srun" not in done.stdout


def test_tests_are_told_why_there_is_no_slurm(monkeypatch: pytest.MonkeyPatch) -> None:
    """Skipped on a person's machine, a failure where CI has promised the packages."""
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    monkeypatch.delenv("CI", raising=False)
    with pytest.raises(pytest.skip.Exception, match="needs root"):
        need_slurm()
    monkeypatch.setenv("CI", "true")
    with pytest.raises(pytest.fail.Exception, match="needs root"):
        need_slurm()
