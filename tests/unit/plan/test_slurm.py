"""The printed batch script is slurm/train.sbatch with another head: one source, and what it must say."""

from __future__ import annotations

import shlex
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from seqaware.config.loading import REPOSITORY, load_config
from seqaware.config.output_config import FaultsConfig
from seqaware.errors import ConfigError
from seqaware.plan.slurm import FORM, SlurmJob, limit_seconds, sbatch_script
from tests import launch
from tests.patience import run

DEMO = REPOSITORY / "train_configs" / "demo.yaml"
PRINT_WITHOUT_TORCH = """
import sys
from launcher.train import app
try:
    app(sys.argv[1:])
finally:
    heavy = {"torch", "deepspeed", "transformers", "datasets", "numba"} & set(sys.modules)
    assert not heavy, heavy
"""


def _script(*overrides: str, **changes: object) -> str:
    job = replace(SlurmJob(), **changes)
    config = load_config(DEMO, overrides)
    return sbatch_script(config, job=job, arguments=["demo.yaml"], deepspeed_path=None, folder=Path("/a folder"))


def _head(script: str) -> dict[str, str]:
    lines = [line.removeprefix("#SBATCH --") for line in script.splitlines() if line.startswith("#SBATCH")]
    return {name: value for name, _, value in (line.partition("=") for line in lines)}


def test_the_form_is_a_script_of_its_own_and_printing_changes_only_what_is_this_runs() -> None:
    form = FORM.read_text().splitlines()
    comments = {line for line in form if line == "#" or line.startswith("#   ")}
    printed = _script().splitlines()
    assert [line for line in form if line not in printed and line not in comments] == [
        "#SBATCH --job-name=seqaware",
        "SEQAWARE_HOME=${SEQAWARE_HOME:-$SLURM_SUBMIT_DIR}",
        'arguments=("$@")',
    ]
    assert [line for line in printed if line not in form] == [
        "#SBATCH --job-name=seqaware-demo",
        "#SBATCH --chdir='/a folder'",
        f"SEQAWARE_HOME=${{SEQAWARE_HOME:-{REPOSITORY}}}",
        'arguments=(demo.yaml "$@")',
    ]


def test_the_form_leaves_as_long_before_the_limit_as_a_run_does() -> None:
    assert _head(FORM.read_text())["signal"] == f"B:USR2@{FaultsConfig().leave_minutes * 60:.0f}"


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        (
            {"nodes": 4, "gpus_per_node": 2, "time": "2-00"},
            {"nodes": "4", "gpus-per-node": "2", "ntasks-per-node": "2", "time": "2-00", "signal": "B:USR2@300"},
        ),
        # At most a quarter of the limit is for leaving.
        ({"time": "8"}, {"time": "8", "signal": "B:USR2@120"}),
    ],
)
def test_the_head_says_what_was_asked_for(changes: dict[str, object], expected: dict[str, str]) -> None:
    head = _head(_script(**changes))
    assert {name: head[name] for name in expected} == expected
    assert {"requeue", "open-mode", "output"} < set(head)


def test_the_head_follows_the_config() -> None:
    head = _head(_script("faults.leave_minutes=20", "model.output_name=my run/1", nodes=1))
    assert (head["signal"], head["job-name"]) == ("B:USR2@1200", "my-run-1")


def test_a_cluster_without_gpus_has_one_rank_a_node() -> None:
    head = _head(_script(nodes=3, gpus_per_node=0))
    assert "gpus-per-node" not in head
    assert (head["nodes"], head["ntasks-per-node"]) == ("3", "1")


@pytest.mark.parametrize(
    ("time", "seconds"),
    [("90", 5400), ("12:30", 750), ("1:00:00", 3600), ("2-00", 172800), ("1-2:3", 93780), ("1-2:3:4", 93784)],
)
def test_limits_are_read_as_slurm_reads_them(time: str, seconds: int) -> None:
    assert limit_seconds(time) == seconds


@pytest.mark.parametrize("time", ["", "1h", "0", "1:2:3:4", "-1", "UNLIMITED"])
def test_a_limit_that_is_none_is_refused(time: str) -> None:
    with pytest.raises(ConfigError, match="--time must be"):
        limit_seconds(time)


def test_ranks_that_the_config_cannot_have_are_refused_before_anything_waits_in_a_queue() -> None:
    with pytest.raises(ConfigError, match=r"parallel\.sequence"):
        _script("parallel.sequence=3", nodes=2)


def test_the_command_prints_itself_without_torch(tmp_path: Path) -> None:
    """Whatever was typed goes into the script, in whatever order; what only says how to print does not."""
    typed = ["--set", "model.output_name=it's mine", "--print-sbatch", str(DEMO), "--nodes=2", "--resume", "never"]
    command = [sys.executable, "-c", PRINT_WITHOUT_TORCH, *typed, "--gpus-per-node", "1", "--time", "10"]
    done = run(command, cwd=tmp_path, env=launch.environment())
    assert done.returncode == 0, done.stderr
    assert _head(done.stdout)["chdir"] == str(tmp_path)
    line = next(line for line in done.stdout.splitlines() if line.startswith("arguments=("))
    arguments = shlex.split(line.removeprefix("arguments=(").removesuffix(' "$@")'))
    assert arguments[0] == str(DEMO)
    options = {(arguments[at], arguments[at + 1]) for at in range(1, len(arguments), 2)}
    assert options == {("--set", "model.output_name=it's mine"), ("--resume", "never")}


@pytest.mark.parametrize("path", sorted((REPOSITORY / "slurm").iterdir()), ids=lambda path: path.name)
def test_bash_can_read_every_file(path: Path) -> None:
    done = subprocess.run(["bash", "-n", str(path)], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
