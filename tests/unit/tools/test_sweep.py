"""A sweep: every γ with every seed, what is done left alone, and what stops it said."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from unittest.mock import patch

import pytest
import yaml

from seqaware.config.loading import REPOSITORY, load_config
from seqaware.errors import ConfigError
from seqaware.tools.sweep import Sweep, gammas_of, run_sweep, seeds_of, submit

CONFIG = {"model": {"base_name": "some-model"}, "dataset": {"name": "rows.jsonl"}}

# Stands in for launcher/train.py: leaves what a run leaves, and ends as it is told.
TRAINER = """
import json, pathlib, shutil, sys
(folder,) = (each.partition("=")[2] for each in sys.argv if each.startswith("output.dir="))
folder = pathlib.Path(folder)
code = json.loads(pathlib.Path("codes.json").read_text()).get(folder.name, 0)
with open("trained.txt", "a") as file:
    file.write(folder.name + "\\n")
if code:
    print("error: something to mend")
    sys.exit(code)
folder.mkdir(parents=True, exist_ok=True)
shutil.copy(f"{folder.name}.yaml", folder / "config.yaml")
(folder / "manifest.json").write_text(json.dumps({"finished_steps": 3}))
"""


@pytest.fixture
def sweep(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Sweep:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "trainer.py").write_text(TRAINER)
    (tmp_path / "codes.json").write_text("{}")
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(CONFIG))
    wanted = Sweep(Path("c.yaml"), ("0", "0.9"), (1, 2), Path("runs/s"), launch=f"{sys.executable} -S trainer.py")
    for each in wanted.combinations():
        config = load_config(wanted.config, each.overrides())
        (tmp_path / f"{each.name}.yaml").write_text(yaml.safe_dump(config.model_dump(mode="json")))
    return wanted


def _trained() -> list[str]:
    return Path("trained.txt").read_text().split() if Path("trained.txt").exists() else []


def test_a_sweep_that_is_cut_goes_on_where_it_stood(sweep: Sweep) -> None:
    said: list[str] = []
    Path("codes.json").write_text(json.dumps({"gamma-0.9-seed-1": 85}))
    assert run_sweep(sweep, say=said.append) == 85
    assert _trained() == ["gamma-0-seed-1", "gamma-0-seed-2", "gamma-0.9-seed-1"]
    Path("codes.json").write_text("{}")
    assert run_sweep(sweep, say=said.append) == 0
    assert _trained()[3:] == ["gamma-0.9-seed-1", "gamma-0.9-seed-2"]
    config = load_config(Path("runs/s/gamma-0.9-seed-2/config.yaml"))
    assert (config.training.sft.discount, config.training.control.seed) == (0.9, 2)


def test_a_crash_is_passed_over_and_a_mistake_ends_it(sweep: Sweep) -> None:
    said: list[str] = []
    Path("codes.json").write_text(json.dumps({"gamma-0-seed-1": 1}))
    assert run_sweep(sweep, say=said.append) == 1
    assert len(_trained()) == 4 and "failed: gamma-0-seed-1" in said[-1]
    Path("codes.json").write_text(json.dumps({"gamma-0-seed-1": 2}))
    assert run_sweep(sweep, say=said.append) == 2
    assert "error: something to mend" in said[-1]


def test_runs_of_another_config_are_not_taken_for_done(sweep: Sweep) -> None:
    assert run_sweep(sweep, say=print) == 0
    changed = Sweep(**{**vars(sweep), "overrides": ("training.optimizer.lr=1e-3",)})
    run_sweep(changed, say=print)
    assert len(_trained()) == 8  # each was given to the trainer, who refuses what it finds


def test_mistakes_are_told_before_anything_starts(sweep: Sweep) -> None:
    with pytest.raises(ConfigError, match="unknown key"):
        run_sweep(Sweep(**{**vars(sweep), "overrides": ("no.such.key=1",)}), say=print)
    with pytest.raises(ConfigError, match="--launch is no command"):
        run_sweep(Sweep(**{**vars(sweep), "launch": "no-such-command"}), say=print)
    assert _trained() == []


@pytest.mark.parametrize(("text", "seeds"), [("3", (1, 2, 3)), ("7,11", (7, 11)), ("7,", (7,))])
def test_seeds(text: str, seeds: tuple[int, ...]) -> None:
    assert seeds_of(text) == seeds


@pytest.mark.parametrize("text", ["", "0", "x", "1,1", "-2", "1.5"])
def test_seeds_that_are_none(text: str) -> None:
    with pytest.raises(ConfigError, match="--seeds"):
        seeds_of(text)


@pytest.mark.parametrize("text", ["", "2", "x", "0.9,0.90", "-0.1", "nan"])
def test_gammas_that_are_none(text: str) -> None:
    with pytest.raises(ConfigError, match="--gamma"):
        gammas_of(text)


def test_the_same_sweep_as_an_array_and_its_report_behind_it(sweep: Sweep, tmp_path: Path) -> None:
    fake = tmp_path / "bin" / "sbatch"
    fake.parent.mkdir()
    fake.write_text('#!/bin/sh\nprintf "%s\\n" "$GAMMAS/$SEEDS/$SWEEP_DIR" "$@" end >> calls.txt\necho "7;cluster"\n')
    fake.chmod(0o755)
    said: list[str] = []
    changed = Sweep(**{**vars(sweep), "overrides": ("training.optimizer.lr=1e-3",)})
    submit(changed, {"PATH": f"{fake.parent}:/usr/bin:/bin"}, say=said.append)
    array, report, _ = (tmp_path / "calls.txt").read_text().split("end\n")
    assert array.splitlines()[:3] == ["0 0.9/1 2/runs/s", "--parsable", "--array=0-3"]
    assert array.splitlines()[-3:] == ["c.yaml", "--set", "training.optimizer.lr=1e-3"]
    assert "--dependency=afterany:7" in report and "runs/s/gamma-* --out runs/s/report" in report
    assert "job 7: 4 runs into runs/s" in said[0]


def test_the_array_trains_what_the_sweep_would_train_here(sweep: Sweep, tmp_path: Path) -> None:
    """slurm/sweep.sbatch, run by bash as SLURM runs each task, hands on what run_sweep does."""
    home = tmp_path / "home"
    (home / "slurm").mkdir(parents=True)
    script = (REPOSITORY / "slurm" / "sweep.sbatch").read_text()
    (home / "slurm" / "sweep.sbatch").write_text(script)
    (home / "slurm" / "env.sh").write_text("")
    hands_over = 'train() { printf "%s\\0" "$@" >"handed.$SLURM_ARRAY_TASK_ID"; }\n'
    nothing = "begin_attempt() { :; }\nconsult_doctor() { :; }\nrefuse() { exit 2; }\n"
    (home / "slurm" / "attempt.sh").write_text(nothing + hands_over)
    fake = tmp_path / "bin" / "sbatch"
    fake.parent.mkdir()
    # The first submission is the array: every task of it, one after the other, in the environment that was handed over.
    fake.write_text(
        "#!/bin/bash\nshift; [[ $1 == --array=0-* ]] || { echo 8; exit; }\nlast=${1#--array=0-}; shift; shift\n"
        "for ((t = 0; t <= last; t++)); do SLURM_ARRAY_TASK_ID=$t SLURM_ARRAY_TASK_MAX=$last "
        'bash home/slurm/sweep.sbatch "$@" >&2 || exit; done\necho 7\n'
    )
    fake.chmod(0o755)
    changed = Sweep(
        **{
            **vars(sweep),
            "gammas": ("0", "0.90", "1e-1"),
            "seeds": (7, 11),
            "folder": Path("runs/with blank"),
            "overrides": ("training.optimizer.lr=1e-3", "model.output_name=two words"),
            "deepspeed": Path("zero3.json"),
        }
    )
    with patch("seqaware.tools.sweep.REPOSITORY", home):
        submit(changed, {"PATH": f"{fake.parent}:/usr/bin:/bin"}, say=lambda text: None)
    for task, combination in enumerate(changed.combinations()):
        handed = (tmp_path / f"handed.{task}").read_text().split("\0")[:-1]
        assert handed == changed.arguments(combination), combination.name
    assert not (tmp_path / f"handed.{len(changed.combinations())}").exists()


def test_where_there_is_no_slurm_that_is_said(sweep: Sweep, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="sbatch cannot be started"):
        submit(sweep, {"PATH": str(tmp_path)}, say=print)
    (tmp_path / "sbatch").write_text("#!/bin/sh\necho 'no such partition' >&2\nexit 1\n")
    (tmp_path / "sbatch").chmod(0o755)
    with pytest.raises(ConfigError, match="refused the sweep; got no such partition"):
        submit(sweep, {"PATH": str(tmp_path)}, say=print)


@pytest.mark.parametrize("seeds", ["9" * 5000, "1000000", "1,٣", ""])
def test_seeds_that_cannot_be_are_refused(seeds: str) -> None:
    with pytest.raises(ConfigError, match="--seeds"):
        seeds_of(seeds)
