"""Bad input gets one clear error, exit code 2, before any work, and leaves nothing behind.

Through the command's own entry point, in this process: the imports are paid once.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from launcher.train import app
from tests import launch, tiny


@dataclass(frozen=True)
class Bad:
    """What is wrong, and what the message must tell.

    make: changes a good config, or the files around it; returns further arguments of the command.
    says: fragments of the message.
    """

    make: Callable[[tiny.Workshop, dict[str, Any]], list[str]]
    says: tuple[str, ...]


def _set(section: str, **values: Any) -> Callable[[tiny.Workshop, dict[str, Any]], list[str]]:
    def make(workshop: tiny.Workshop, config: dict[str, Any]) -> list[str]:
        target = config
        for name in section.split("."):
            target = target.setdefault(name, {})
        target.update(values)
        return []

    return make


def _rows(text: str) -> Callable[[tiny.Workshop, dict[str, Any]], list[str]]:
    def make(workshop: tiny.Workshop, config: dict[str, Any]) -> list[str]:
        rows = workshop.folder / "bad.jsonl"
        rows.write_text(text)
        config["dataset"]["name"] = str(rows)
        return []

    return make


def _model_copy(workshop: tiny.Workshop, config: dict[str, Any]) -> Path:
    copy = workshop.folder / "bad_model"
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(workshop.model, copy)
    config["model"]["base_name"] = str(copy)
    return copy


def _no_weights(workshop: tiny.Workshop, config: dict[str, Any]) -> list[str]:
    (_model_copy(workshop, config) / "model.safetensors").unlink()
    return []


def _rewritten(workshop: tiny.Workshop, config: dict[str, Any], names: Callable[[str], str | None]) -> list[str]:
    """The weights under other names; None leaves one out."""
    file = _model_copy(workshop, config) / "model.safetensors"
    weights = {names(name): weight for name, weight in load_file(file).items()}
    save_file({name: weight for name, weight in weights.items() if name}, file, {"format": "pt"})
    return []


def _adapter(workshop: tiny.Workshop, config: dict[str, Any]) -> list[str]:
    folder = workshop.folder / "adapter"
    folder.mkdir(exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(workshop.model)}))
    config["model"]["base_name"] = str(folder)
    return []


def _no_eos(workshop: tiny.Workshop, config: dict[str, Any]) -> list[str]:
    settings = _model_copy(workshop, config) / "tokenizer_config.json"
    content = json.loads(settings.read_text())
    content.pop("eos_token")
    settings.write_text(json.dumps(content))
    return []


def _large_vocabulary(workshop: tiny.Workshop, config: dict[str, Any]) -> list[str]:
    copy = _model_copy(workshop, config)
    tokenizer = tiny.train_tokenizer()
    tokenizer.add_tokens(["surplus"])
    tokenizer.save_pretrained(copy)
    return []


def _owned_key(workshop: tiny.Workshop, config: dict[str, Any]) -> list[str]:
    path = workshop.folder / "owned.json"
    path.write_text(json.dumps({"zero_optimization": {"stage": 1}, "gradient_accumulation_steps": 4}))
    return ["--deepspeed", str(path)]


def _foreign_folder(workshop: tiny.Workshop, config: dict[str, Any]) -> list[str]:
    folder = Path(config["output"]["dir"])
    folder.mkdir()
    (folder / "thesis.tex").write_text("mine")
    return []


def _nothing_supervised(workshop: tiny.Workshop, config: dict[str, Any]) -> list[str]:
    config["format"] = {"append_eos": False}
    return _rows('{"prompt": "one two", "completion": ""}\n')(workshop, config)


def _huge(workshop: tiny.Workshop, config: dict[str, Any]) -> list[str]:
    config["model"] = {
        "from_scratch": {
            "model_type": "llama",
            "hidden_size": 65536,
            "intermediate_size": 262144,
            "num_hidden_layers": 100,
        },
        "tokenizer": str(workshop.model),
    }
    return []


def _questions_too_long(workshop: tiny.Workshop, config: dict[str, Any]) -> list[str]:
    rows = workshop.folder / "held_out.jsonl"
    rows.write_text('{"question": "one two", "answer": "three"}\n')
    asked = {"metric": "exact_match", "max_new_tokens": 512, "answer_pattern": "(?P<answer>three)"}
    config["evaluation"] = {"dataset": {"name": str(rows)}, **asked}
    return []


def _from_scratch(**fields: Any) -> Callable[[tiny.Workshop, dict[str, Any]], list[str]]:
    def make(workshop: tiny.Workshop, config: dict[str, Any]) -> list[str]:
        config["model"] = {"from_scratch": fields, "tokenizer": str(workshop.model)}
        return []

    return make


CASES = {
    "mistyped size": Bad(_from_scratch(model_type="llama", hiden_size=32), ("hiden_size", "hidden_size")),
    "no causal model": Bad(_from_scratch(model_type="t5", d_model=32), ("t5", "causal")),
    "heads that do not divide": Bad(_from_scratch(model_type="gpt2", n_embd=30, n_head=4), ("gpt2",)),
    "no attention to register with": Bad(_from_scratch(model_type="gpt_neo", hidden_size=32), ("gpt_neo",)),
    "answers too long": Bad(_questions_too_long, ("max_new_tokens", "512", "160")),
    "wrong type": Bad(_set("training.optimizer", lr="fast"), ("training.optimizer.lr", "fast")),
    "gamma outside": Bad(_set("training.sft", gamma=1.5), ("training.sft.gamma", "1.5")),
    "unknown key": Bad(_set("training.sft", gama=0.5), ("gama", "gamma")),
    "two spellings": Bad(_set("training.sft", gamma=0.5, horizon=10), ("gamma", "horizon")),
    "unknown dataset": Bad(_set("dataset", name="gsm9k"), ("gsm9k", "gsm8k")),
    "missing file": Bad(_set("dataset", name="./nowhere/rows.jsonl"), ("nowhere/rows.jsonl",)),
    "broken line": Bad(_rows('{"question": "one", "answer": "two"}\n{"question": "on\n'), ("bad.jsonl, line 2",)),
    "empty dataset": Bad(_rows(""), ("empty", "bad.jsonl")),
    "missing column": Bad(_set("dataset", columns={"question": "problem"}), ("problem", "question")),
    "unknown field": Bad(_set("format", prompt_template="Q: {query}"), ("query", "question")),
    "nothing supervised": Bad(_nothing_supervised, ("supervised",)),
    "too long": Bad(
        _set("training.parameters", max_seq_length=4096), ("max_seq_length", "4096", str(tiny.MAX_POSITIONS))
    ),
    "no eos": Bad(_no_eos, ("end-of-sequence",)),
    "large vocabulary": Bad(_large_vocabulary, ("vocabulary", "embedding")),
    "no weights": Bad(_no_weights, ("no weights", "bad_model")),
    "a weight is missing": Bad(
        lambda workshop, config: _rewritten(workshop, config, lambda name: None if "lm_head" in name else name),
        ("1 missing: lm_head.weight", "model.allow_missing", "bad_model"),
    ),
    "weights under a prefix": Bad(
        lambda workshop, config: _rewritten(workshop, config, lambda name: f"module.{name}"),
        ("the prefix 'module.'",),
    ),
    "an adapter": Bad(_adapter, ("is a LoRA adapter", "seqaware export")),
    "adapted and saved": Bad(
        _set("lora", target_modules=["lm_head"], modules_to_save=["lm_head"]), ("both in", "got lm_head;")
    ),
    "foreign folder": Bad(_foreign_folder, ("output.dir", "no run")),
    "owned key": Bad(_owned_key, ("gradient_accumulation_steps", "training.schedule")),
    "no disk space": Bad(_huge, ("disk space", "GB free")),
    "no write permission": Bad(_set("output", dir="/proc/seqaware-run"), ("output.dir cannot be written",)),
    "half precision on a CPU": Bad(_set("model", dtype="fp16"), ("float16", "CPU")),
    "scale without meaning": Bad(_set("training.sft", gamma=1.0, scale="horizon"), ("horizon", "gamma 1")),
    "scheme that is not there": Bad(_set("training.sft", weighting="nowhere:scheme"), ("nowhere",)),
    "unknown tracker": Bad(_set("logging", trackers=["tensorbord"]), ("tensorbord", "did you mean tensorboard")),
    "tracker without a key": Bad(_set("logging", trackers=["wandb"]), ("wandb", "WANDB_API_KEY", "wandb_mode")),
    "mistyped resume": Bad(lambda workshop, config: ["--resume", "./no-such-checkpoint"], ("checkpoint",)),
}


def _run(workshop: tiny.Workshop, config: dict[str, Any], arguments: list[str]) -> tuple[int, str]:
    path = workshop.write("bad", config)
    result = CliRunner().invoke(app, [str(path), *arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.output


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> tiny.Workshop:
    return tiny.build(tmp_path_factory.mktemp("bad"))


@pytest.fixture(autouse=True)
def on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for name in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", "/nonexistent")


@pytest.mark.parametrize("name", CASES)
def test_one_clear_error(name: str, workshop: tiny.Workshop, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    config = workshop.config(output__dir=str(folder))
    arguments = CASES[name].make(workshop, config)
    code, output = _run(workshop, config, arguments)
    assert code == 2, output
    assert output.startswith("error: ") and output.count("error") <= 2, output
    for fragment in CASES[name].says:
        assert fragment in output, output
    left = sorted(child.name for child in folder.iterdir()) if folder.exists() else []
    assert left in ([], ["thesis.tex"]), left


def test_missing_and_unreadable_yaml(tmp_path: Path) -> None:
    runner = CliRunner()
    missing = runner.invoke(app, [str(tmp_path / "no.yaml")])
    assert missing.exit_code == 2 and "no.yaml" in missing.output
    torn = tmp_path / "torn.yaml"
    torn.write_text("training: {sft: {gamma: 0.9}\n")
    broken = runner.invoke(app, [str(torn)])
    assert broken.exit_code == 2 and "torn.yaml" in broken.output


def test_a_folder_with_another_run(workshop: tiny.Workshop, tmp_path: Path) -> None:
    config = workshop.config(
        output__dir=str(tmp_path / "run"), training__schedule={"num_epochs": 1, "global_batch_size": 13}
    )
    first = launch.forked("launcher/train.py", str(workshop.write("first", config)), ranks=1)
    assert first.returncode == 0, first.stderr
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*")}
    config["training"]["sft"] = {"gamma": 0.5}
    code, output = _run(workshop, config, [])
    assert code == 2 and "another run" in output and "gamma" in output
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*")} == before


def test_a_batch_that_the_ranks_cannot_share(workshop: tiny.Workshop, tmp_path: Path) -> None:
    """Through the deepspeed launcher: the code is 2 there as well, and rank 0 alone has the word."""
    config = workshop.config(output__dir=str(tmp_path / "run"), training__schedule={"global_batch_size": 1})
    done = launch.deepspeed("launcher/train.py", str(workshop.write("small", config)), ranks=2)
    assert done.returncode == 2, done.stderr
    assert done.stderr.count("error: ") == 1 and "global_batch_size" in done.stderr
    assert not (tmp_path / "run").exists()
