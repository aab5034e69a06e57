"""Reading YAML as people write it, overriding it, and saying what is wrong with it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from seqaware.config.loading import load_config, read_yaml
from seqaware.config.schema import Config
from seqaware.errors import ConfigError

FIRST_VERSION = """\
model: {base_name: "gpt2", output_name: "sequence-aware-model"}
dataset: {name: "gsm8k", max_examples: 100}
training:
  optimizer: {lr: 2e-5, weight_decay: 0.01}
  schedule: {num_epochs: 3, batch_size: 4, grad_accumulation_steps: 4}
  sft: {gamma: 0.98}
format: {prompt_template: "Question: {question}\\nAnswer:"}
"""
MINIMAL = "model: {base_name: gpt2}\ndataset: {name: gsm8k}\n"


def load(tmp_path: Path, text: str, *overrides: str) -> Config:
    path = tmp_path / "run.yaml"
    path.write_text(text, encoding="utf-8")
    return load_config(path, overrides)


def refusal(tmp_path: Path, text: str, *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, text, *overrides)
    return str(caught.value)


def test_the_first_versions_yaml_loads_unchanged(tmp_path: Path) -> None:
    config = load(tmp_path, FIRST_VERSION)
    assert config.model.base_name == "gpt2"
    assert config.model.output_name == "sequence-aware-model"
    assert config.dataset.max_examples == 100
    assert config.training.optimizer.lr == 2e-5
    assert config.training.schedule.num_epochs == 3
    assert config.training.schedule.batch_size == 4
    assert config.training.sft.discount == 0.98
    assert config.format.prompt_template == "Question: {question}\nAnswer:"


def test_without_a_path_the_default_file_is_read() -> None:
    assert load_config(None).dataset.name == "gsm8k"


def test_a_missing_file_names_its_neighbours(tmp_path: Path) -> None:
    (tmp_path / "demo.yaml").write_text(MINIMAL)
    with pytest.raises(ConfigError, match=r"does not exist.*dmeo\.yaml.*did you mean demo\.yaml\?"):
        load_config(tmp_path / "dmeo.yaml")


def test_a_missing_folder(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="does not exist"):
        load_config(tmp_path / "nowhere" / "run.yaml")


def test_a_folder_is_no_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        load_config(tmp_path)


def test_a_file_that_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_bytes(b"\xff\xfe\x00model")
    with pytest.raises(ConfigError, match="not UTF-8"):
        load_config(tmp_path / "run.yaml")


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("", "is empty"),
        ("# only a comment\n", "is empty"),
        ("- model\n- dataset\n", "must be a mapping"),
        ("just words\n", "must be a mapping"),
        ("model: {base_name: gpt2\n", "not valid YAML; got line 2"),
        ("model:\n\tbase_name: gpt2\n", "not valid YAML; got line 2"),
        ("a: !!python/object:os.system x\n", "not valid YAML"),
    ],
)
def test_what_is_no_config_at_all(tmp_path: Path, text: str, word: str) -> None:
    assert word in refusal(tmp_path, text)


@pytest.mark.parametrize(
    ("text", "word"),
    [
        (MINIMAL + "model: {base_name: gpt2}\n", "duplicate key model; got line 3; it was already written in line 1"),
        ("model: {base_name: a, base_name: a}\n", "duplicate key base_name; got line 1"),
        ("dataset:\n  name: a\n  split: b\n  name: c\n", "duplicate key name; got line 4"),
    ],
)
def test_duplicate_keys(tmp_path: Path, text: str, word: str) -> None:
    assert word in refusal(tmp_path, text)


def test_anchors_and_merges_are_no_duplicates(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("a: &a {x: 1, y: 2}\nb: {<<: *a, y: 3}\n")
    assert read_yaml(path)["b"] == {"x": 1, "y": 3}


def test_the_same_key_in_two_sections_is_fine(tmp_path: Path) -> None:
    text = MINIMAL + "evaluation: {dataset: {name: gsm8k}, batch_size: 3}\ntraining: {schedule: {batch_size: 2}}\n"
    assert load(tmp_path, text).evaluation.batch_size == 3


def test_overrides_are_read_as_yaml_and_the_last_one_wins(tmp_path: Path) -> None:
    config = load(
        tmp_path,
        FIRST_VERSION,
        "training.sft.gamma=0.9",
        "training.sft.gamma=0.99",
        "training.optimizer.lr=1e-4",
        "training.optimizer.betas=[0.8, 0.9]",
        "packing.enabled=false",
        "dataset.max_examples=null",
        "format.prompt_template='a = {question}'",
    )
    assert config.training.sft.discount == 0.99
    assert config.training.optimizer.lr == 1e-4
    assert config.training.optimizer.betas == (0.8, 0.9)
    assert config.packing.enabled is False
    assert config.dataset.max_examples is None
    assert config.format.prompt_template == "a = {question}"
    assert config.training.schedule.num_epochs == 3


@pytest.mark.parametrize(
    ("written", "text"),
    [
        ("Question: {question} Answer:", "Question: {question} Answer:"),
        ("Question: {question}", "Question: {question}"),
        ("{question}", "{question}"),
        (" {question}", " {question}"),
        ("[INST] {question} [/INST]", "[INST] {question} [/INST]"),
        ("Problem #1: {question}", "Problem #1: {question}"),
        ("Problem #1 {question}", "Problem #1 {question}"),
        ("a: b: c", "a: b: c"),
        ("@{question}", "@{question}"),
        ("plain {question}", "plain {question}"),
        ('"Q: {question}\\nA:"', "Q: {question}\nA:"),
        ("'it''s {question}'", "it's {question}"),
        ("null", None),
        ("", None),
    ],
)
def test_a_key_that_takes_text_takes_it_as_it_is(tmp_path: Path, written: str, text: str | None) -> None:
    assert load(tmp_path, MINIMAL, f"format.prompt_template={written}").format.prompt_template == text


def test_a_value_that_is_not_yaml_says_how_to_quote(tmp_path: Path) -> None:
    message = refusal(tmp_path, MINIMAL, "evaluation.stop=[a: b: c")
    assert "--set evaluation.stop is not valid YAML" in message
    assert """quote it for YAML inside the shell's quotes: --set 'evaluation.stop="…"'""" in message
    # A quotation mark at the beginning means YAML's quotes, also for text.
    assert "is not valid YAML" in refusal(tmp_path, MINIMAL, 'format.prompt_template="Q: {question}')
    # Numbers stay numbers: a name of digits is quoted, as in a file.
    assert 'write "123" in quotes' in refusal(tmp_path, MINIMAL, "model.output_name=123")


def test_an_override_reaches_into_a_section_that_the_file_leaves_empty(tmp_path: Path) -> None:
    assert load(tmp_path, MINIMAL + "training:\n", "training.control.seed=7").training.control.seed == 7


def test_an_override_may_size_the_model(tmp_path: Path) -> None:
    text = "model: {from_scratch: {model_type: gpt2, n_layer: 2}, tokenizer: t}\ndataset: {name: a}\n"
    config = load(tmp_path, text, "model.from_scratch.n_layer=3")
    assert config.model.from_scratch == {"model_type": "gpt2", "n_layer": 3}


@pytest.mark.parametrize("override", ["training.sft.gamma", "=1", "training..gamma=1", ".a=1", "a b=1", ""])
def test_overrides_that_cannot_be_read(tmp_path: Path, override: str) -> None:
    assert "--set needs key=value" in refusal(tmp_path, MINIMAL, override)


def test_an_override_below_a_value(tmp_path: Path) -> None:
    assert "model.base_name is not a section" in refusal(tmp_path, MINIMAL, "model.base_name.size=1")


def test_an_override_with_an_unknown_key(tmp_path: Path) -> None:
    assert "did you mean training.sft.gamma?" in refusal(tmp_path, MINIMAL, "training.sft.gama=0.9")


def test_an_override_replaces_no_other_spelling(tmp_path: Path) -> None:
    message = refusal(tmp_path, FIRST_VERSION, "training.sft.half_life=30")
    assert "written in 2 ways (gamma, half_life)" in message
    assert "--set training.sft.gamma=null removes it" in message
    config = load(tmp_path, FIRST_VERSION, "training.sft.half_life=30", "training.sft.gamma=null")
    assert config.training.sft.half_life == 30


def test_the_command_line_can_ask_for_a_plan_without_heavy_imports() -> None:
    program = (
        "import sys, time; start = time.process_time()\n"
        "from seqaware.config.loading import load_config\n"
        "from seqaware.plan.specs import World, model_facts\n"
        "from seqaware.plan.plan import make_plan\n"
        "from seqaware.estimate.render_plan import render_plan\n"
        "import seqaware.schedule\n"
        "config = load_config(None)\n"
        "world = World(size=2, local_size=2, nodes=1, device='cpu', bf16=True)\n"
        "assert render_plan(make_plan(config, world=world, model=model_facts(config.model)))\n"
        "heavy = {'torch', 'transformers', 'datasets', 'numba', 'deepspeed'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
        "print(time.process_time() - start)\n"
    )
    answer = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    # Of a core's time, as other tests may be at work: measured 0.3 s; torch alone would take more than this bound.
    assert float(answer.stdout) < 2.0
