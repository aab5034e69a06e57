"""`--dry-run` prints the Plan without torch; after `launcher/prepare.py` its figures are exact."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from tests import launch, tiny

WITHOUT_TORCH = """
import sys
from typer.testing import CliRunner
from launcher.train import app
result = CliRunner().invoke(app, sys.argv[1:])
print(result.output)
heavy = {"torch", "deepspeed", "transformers", "datasets", "numba"} & set(sys.modules)
sys.exit(f"imported {heavy}" if heavy else result.exit_code)
"""


def _dry_run(*arguments: str) -> str:
    command = [sys.executable, "-c", WITHOUT_TORCH, *arguments, "--dry-run"]
    done = subprocess.run(
        command, cwd=launch.ROOT, env=launch.environment(), capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_plan_before_and_after_preparing(tmp_path: Path) -> None:
    workshop = tiny.build(tmp_path)
    schedule = {"num_epochs": 3, "global_batch_size": 4}
    path = str(workshop.write("plan", workshop.config(training__schedule=schedule, output__dir=str(tmp_path / "run"))))
    guess = _dry_run(path, "--ranks", "2", "--deepspeed", str(launch.DS_CONFIGS / "zero3.json"))
    assert "ZeRO stage 3" in guess and "zero_optimization.stage = 3" in guess
    assert "not known before the data is tokenised" in guess

    prepared = launch.python("launcher/prepare.py", path)
    assert prepared.returncode == 0, prepared.stderr
    assert (Path(prepared.stdout.split()[-1]) / "store.json").is_file()
    exact = _dry_run(path, "--ranks", "2")
    # 13 rows, 4 a step: 4 steps an epoch, the last of one row.
    assert "12 = 3 epoch(s) of 4 steps" in exact
    assert "13 sequences" in exact
    assert not (tmp_path / "run").exists()


def test_without_a_config_the_default_is_planned() -> None:
    assert "gpt2" in _dry_run()
