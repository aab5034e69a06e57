"""The config of the first version of the idea trains unchanged: GPT-2 and GSM8K come from the hub."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow
import pyarrow.parquet
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from tests import launch
from tests.hub import hub
from tests.small_tokenizers import byte_level
from tests.unit.config.test_loading import FIRST_VERSION

ROWS = [{"question": f"What is {i} + 2?", "answer": f"{i} + 2 = {i + 2}\n#### {i + 2}"} for i in range(130)]


def _small_gpt2(folder: Path) -> None:
    """GPT-2 in all but size and training; with its tokenizer's vocabulary rounded up, as its own is."""
    tokenizer = byte_level()
    tokenizer.save_pretrained(folder)
    eos = tokenizer.eos_token_id
    config = AutoConfig.for_model(
        "gpt2", vocab_size=len(tokenizer) + 7, n_embd=32, n_layer=2, n_head=2, n_positions=96, eos_token_id=eos
    )
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)


def _gsm8k(folder: Path) -> None:
    (folder / "main").mkdir(parents=True)
    files = "  - split: train\n    path: main/train-*\n"
    (folder / "README.md").write_text(f"---\nconfigs:\n- config_name: main\n  data_files:\n{files}---\n")
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), folder / "main" / "train-00000-of-00001.parquet")


def test_the_first_versions_config_trains_unchanged(tmp_path: Path) -> None:
    _small_gpt2(tmp_path / "gpt2")
    _gsm8k(tmp_path / "gsm8k")
    yaml = tmp_path / "first.yaml"
    yaml.write_text(FIRST_VERSION)
    run = tmp_path / "run"
    # Only where the results go is said on the command line; 2e-5 is a string to PyYAML.
    places = ["--set", f"output.dir={run}", "--set", f"dataset.store_dir={tmp_path / 'stores'}"]
    with hub({"openai/gsm8k": tmp_path / "gsm8k"}, models={"gpt2": tmp_path / "gpt2"}) as server:
        done = launch.python(
            "launcher/train.py", str(yaml), *places, **{**server.environment(tmp_path / "cache"), "HF_HUB_OFFLINE": "0"}
        )
    assert done.returncode == 0, done.stderr[-4000:]
    told = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    lines = [line for line in told if line["kind"] == "step"]
    # 100 rows, 16 a step: six full steps and one of four rows, three times over.
    assert [line["sequences"] for line in lines] == ([16] * 6 + [4]) * 3
    assert [line["step"] for line in lines] == list(range(1, 22))
    assert lines[0]["lr"] == 2e-5
    assert lines[-1]["unweighted_loss"] < lines[0]["unweighted_loss"]
    model = AutoModelForCausalLM.from_pretrained(run / "model")
    tokenizer = AutoTokenizer.from_pretrained(run / "model")
    written = model.generate(**tokenizer("Question: What is 3 + 2?\nAnswer:", return_tensors="pt"), max_new_tokens=5)
    assert written.shape[0] == 1
    assert "log-suffix" in (run / "model" / "README.md").read_text()
