"""`seqaware init`: what it writes parses and plans; what it cannot write it says, and leaves nothing."""

from __future__ import annotations

import json
import os
import pty
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from launcher.cli import app
from seqaware.config.loading import REPOSITORY, load_config
from seqaware.estimate.hardware import DEVICES
from seqaware.estimate.search import fits
from seqaware.tools.plan_estimate import Gpus, ask

DEMO = str(REPOSITORY / "demo" / "train.jsonl")


def init(path: Path, *flags: str) -> Result:
    return CliRunner().invoke(app, ["init", str(path), *flags])


@pytest.mark.parametrize(
    ("model", "gpus", "device"),
    [
        ("Llama-3.1-8B", 8, "h100"),
        ("Llama-3.1-8B", 1, "h200"),
        ("Llama-3.1-70B", 8, "h100"),
        ("Llama-3.1-70B", 64, "h200"),
    ],
)
def test_what_it_writes_fits_the_gpus(tmp_path: Path, model: str, gpus: int, device: str) -> None:
    path = tmp_path / "my.yaml"
    result = init(path, "--model", f"meta-llama/{model}", "--data", DEMO, "--gpus", str(gpus), "--device", device)
    assert result.exit_code == 0, result.output
    question = ask(load_config(path), deepspeed_path=None, gpus=Gpus(gpus, 8), device=DEVICES[device])
    assert fits(question.layout, question.device)


def test_answers_are_what_is_written(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    flags = [
        "--model",
        "gpt2",
        "--half-life",
        "100",
        "--gpus",
        "0",
        "--max-seq-length",
        "512",
        "--batch",
        "48",
        "--lora",
        "--held-out",
    ]
    result = init(path, *flags, DEMO, "--data", DEMO)
    assert result.exit_code == 0, result.output
    config = load_config(path)
    assert (config.model.base_name, config.model.output_name, config.dataset.name) == ("gpt2", "mine", DEMO)
    assert config.training.sft.half_life == 100
    assert config.training.schedule.global_batch_size == 48
    assert config.training.parameters.max_seq_length == 512
    assert config.lora is not None and config.evaluation.dataset is not None
    assert config.format.prompt_template == "Question: {question}\nAnswer:"


def test_chats_need_no_template(tmp_path: Path) -> None:
    rows = tmp_path / "chat.jsonl"
    rows.write_text(json.dumps({"messages": [{"role": "user", "content": "Hi"}]}) + "\n")
    assert init(tmp_path / "my.yaml", "--model", "gpt2", "--data", str(rows)).exit_code == 0
    assert load_config(tmp_path / "my.yaml").format.prompt_template is None


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--data", DEMO], "--model is needed"),
        (["--model", "gpt2", "--data", "/no/such.jsonl"], "not found"),
        (["--model", "gpt2", "--data", DEMO, "--gamma", "0.9", "--half-life", "9"], "two spellings"),
        (["--model", "gpt2", "--data", DEMO, "--device", "h1000"], "--device"),
        (["--model", "gpt2", "--data", DEMO, "--gpus", "16", "--batch", "8"], "--batch"),
        (["--model", "gpt2", "--data", DEMO, "--half-life", "-3"], "half_life"),
        (["--model", "meta-llama/Llama-3.1-70B", "--data", DEMO, "--gpus", "1", "--device", "a100"], "does not fit"),
    ],
)
def test_mistakes_are_told_and_leave_no_file(tmp_path: Path, flags: list[str], said: str) -> None:
    result = init(tmp_path / "my.yaml", *flags)
    assert result.exit_code == 2
    assert said in result.output and "Traceback" not in result.output
    assert not list(tmp_path.iterdir())


def test_on_a_terminal_it_asks_for_what_was_not_written(tmp_path: Path) -> None:
    master, terminal = pty.openpty()
    os.write(master, f"gpt2\n{DEMO}\n0\n0.9\n".encode())
    command = [sys.executable, "launcher/init.py", str(tmp_path / "my.yaml")]
    done = subprocess.run(command, stdin=terminal, capture_output=True, text=True, cwd=REPOSITORY, check=False)
    os.close(master)
    os.close(terminal)
    assert done.returncode == 0, done.stderr
    config = load_config(tmp_path / "my.yaml")
    assert (config.model.base_name, config.dataset.name, config.training.sft.gamma) == ("gpt2", DEMO, 0.9)


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    path = tmp_path / "my.yaml"
    path.write_text("mine")
    assert init(path, "--model", "gpt2", "--data", DEMO).exit_code == 2
    assert path.read_text() == "mine"
