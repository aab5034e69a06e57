"""`--dry-run` prints the Plan without torch; after `launcher/prepare.py` its figures are exact."""

from __future__ import annotations

import sys
from pathlib import Path

from seqaware.data.sampler import StepSampler
from seqaware.data.store.token_store import TokenStore
from tests import launch, tiny
from tests.patience import run

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
    done = run(command, cwd=launch.ROOT, env=launch.environment())
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_plan_before_and_after_preparing(tmp_path: Path) -> None:
    workshop = tiny.build(tmp_path)
    schedule = {"num_epochs": 3, "global_batch_size": 4}
    path = str(workshop.write("plan", workshop.config(training__schedule=schedule, output__dir=str(tmp_path / "run"))))
    guess = _dry_run(path, "--ranks", "2", "--deepspeed", str(launch.DS_CONFIGS / "zero3.json"))
    assert "ZeRO stage 3" in guess and "zero_optimization.stage = 3" in guess
    assert "not known before the data is tokenised" in guess

    prepared = launch.forked("launcher/prepare.py", path, ranks=None)
    assert prepared.returncode == 0, prepared.stderr
    assert (Path(prepared.stdout.split()[-1]) / "store.json").is_file()
    exact = _dry_run(path, "--ranks", "2")
    # 13 rows, 4 a step: 4 steps an epoch, the last of one row.
    assert "12 = 3 epoch(s) of 4 steps" in exact
    assert "13 sequences" in exact
    assert not (tmp_path / "run").exists()


def test_the_steps_of_a_proportioned_mixture_and_of_tokens(tmp_path: Path) -> None:
    workshop = tiny.build(tmp_path)
    more = tmp_path / "more.jsonl"
    tiny.write_rows(more, [100] * 20)
    mixture = [{"name": str(workshop.rows), "proportion": 0.5}, {"name": str(more), "proportion": 0.5}]
    dataset = {"mixture": mixture, "store_dir": str(tmp_path / "stores"), "workers": 1}
    by_size = workshop.config(dataset=dataset, training__schedule={"num_epochs": 2, "global_batch_size": 4})
    by_tokens = workshop.config(
        dataset=dataset, training__schedule={"num_epochs": 1e9, "max_steps": 20, "global_batch_tokens": 256}
    )
    prepared = launch.forked("launcher/prepare.py", str(workshop.write("by_size", by_size)), ranks=None)
    assert prepared.returncode == 0, prepared.stderr
    store = TokenStore.open(Path(prepared.stdout.split()[-1]))
    arguments = [str(workshop.write("by_size", by_size)), "--dry-run"]
    planned = launch.forked("launcher/train.py", *arguments, ranks=None)
    # 13 rows of each source, not all 33: 26 in steps of 4.
    assert "steps       14 = 2 epoch(s) of 7 steps" in planned.stdout, planned.stdout + planned.stderr
    lengths = store.lengths
    about = round(13 * lengths[:13].mean() + 13 * lengths[13:].mean())
    assert f"26 sequences an epoch, about {about:,} tokens" in planned.stdout

    order = StepSampler(
        lengths, fingerprint=store.fingerprint, seed=42, global_batch_tokens=256, parts=store.facts().parts
    )
    steps = order.steps_per_epoch(1e9, 20)
    assert len(steps) > 1
    planned = launch.forked("launcher/train.py", str(workshop.write("by_tokens", by_tokens)), "--dry-run", ranks=None)
    few, many = min(steps), max(steps)
    spread = f"{few}" if few == many else f"{few} to {many}"
    assert f"20 = 1e+09 epoch(s) of {spread} steps, max_steps 20 stops the run first" in planned.stdout, planned.stdout


def test_without_a_config_the_default_is_planned() -> None:
    assert "gpt2" in _dry_run()
