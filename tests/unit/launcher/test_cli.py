"""`seqaware`: the table of commands, and that listing them imports none."""

from __future__ import annotations

import importlib
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from typer.testing import CliRunner

from launcher.cli import COMMANDS, app

ROOT = Path(__file__).resolve().parents[3]
runner = CliRunner()


def test_the_script_that_is_installed_is_this_one() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    module, _, name = project["scripts"]["seqaware"].partition(":")
    assert getattr(importlib.import_module(module), name) is app


def test_the_help_lists_every_command_and_imports_none() -> None:
    program = (
        "import sys\nfrom launcher.cli import app\ntry:\n    app(['--help'], prog_name='seqaware')\n"
        "except SystemExit:\n    pass\n"
        "slow = ('torch', 'pydantic', 'numpy', 'seqaware', 'launcher.')\n"
        "print('imported', [name for name in sys.modules if name.startswith(slow)])"
    )
    shown = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=ROOT).stdout
    assert all(name in shown for name in COMMANDS)
    assert shown.strip().endswith("imported ['launcher.cli']")


@pytest.mark.parametrize("name", COMMANDS)
def test_each_command_explains_itself(name: str) -> None:
    result = runner.invoke(app, [name, "--help"], env={"COLUMNS": "60"})
    assert result.exit_code == 0, result.output
    assert f" {name} [OPTIONS]" in result.output and "Example" in result.output
    # On a narrow terminal too, every option's name is whole, and help has room beside it.
    assert not re.search(r"--[a-z-]*…", result.output), result.output
    assert "<list[str]>" not in result.output and "<int range>" not in result.output, result.output


def test_every_command_that_is_a_file_is_in_the_table() -> None:
    files = {f"launcher.{path.stem}" for path in (ROOT / "launcher").glob("*.py") if "\napp = " in path.read_text()}
    assert files - {"launcher.cli"} == {command.module for command in COMMANDS.values()}


def test_a_mistyped_command_is_corrected() -> None:
    result = runner.invoke(app, ["plna"])
    assert result.exit_code == 2
    assert "'plan'" in result.output


def test_a_command_does_what_its_file_does() -> None:
    through_seqaware = runner.invoke(app, ["plan", "train_configs/demo.yaml", "--gpus", "2"])
    alone = subprocess.run(
        [sys.executable, "launcher/plan.py", "train_configs/demo.yaml", "--gpus", "2"],
        capture_output=True,
        text=True,
        check=True,
        cwd=ROOT,
    )
    assert through_seqaware.output == alone.stdout


@pytest.mark.parametrize(
    "typed",
    [
        ["plan", "--gpus", "1000001"],
        ["train", "--dry-run", "--ranks", "9" * 5000],
        ["watch", "runs/demo", "--every", "1e300"],
        ["analyse", "gpt2", "--prompt", "x", "--seed", str(2**64)],
        ["analyse", "gpt2", "--prompt", "x", "--temperature", "nan"],
        ["preview", "--step", "10000000000000"],
        ["train", "--print-sbatch", "--time", "9" * 5000],
        ["evaluate", "x" * 300, "train_configs/demo.yaml"],
        ["report", "x" * 300],
        ["plan", "x" * 300 + ".yaml"],
        ["init", "x" * 300 + ".yaml", "--model", "gpt2", "--data", "gsm8k"],
        ["init", "a\nb.yaml", "--model", "gpt2", "--data", "gsm8k"],
        ["init", "a.yaml", "--model", "", "--data", "gsm8k"],
    ],
    ids=lambda typed: " ".join(typed)[:40],
)
def test_what_no_run_can_have_is_an_error_and_not_a_traceback(typed: list[str]) -> None:
    result = runner.invoke(app, typed)
    assert result.exit_code == 2, result.exception
    assert isinstance(result.exception, SystemExit)
