"""A head that is meant to be new starts the same on every layout; what is saved of it and of the chat template."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from seqaware.errors import ConfigError
from seqaware.tools.export_model import merge_adapter
from tests import launch, tiny
from tests.e2e.many_runs import check_all, launch_all

SEED = 7
TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'assistant' %}A: {% generation %}{{ m.content }} <end>{% endgeneration %} "
    "{% else %}Q: {{ m.content }} {% endif %}{% endfor %}{% if add_generation_prompt %}A: {% endif %}"
)
HEAD = "lm_head.weight"
LORA = {"rank": 2, "modules_to_save": ["lm_head"], "export": "adapter"}
RUNS: dict[str, tuple[str, dict[str, Any]]] = {
    "zero1": ("zero1", {}),
    "zero3": ("zero3", {}),
    "lora": ("zero3", {"lora": LORA}),
}


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> tiny.Workshop:
    """Three runs of one step, over conversations, from a checkpoint without a head."""
    made = tiny.build(tmp_path_factory.mktemp("new"), answers=(2, 3))
    tokenizer = AutoTokenizer.from_pretrained(made.model)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<end>"]})
    model = AutoModelForCausalLM.from_pretrained(made.model)
    model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    model.save_pretrained(made.model)
    tokenizer.save_pretrained(made.model)
    weights = load_file(made.model / "model.safetensors")
    del weights[HEAD]
    save_file(weights, made.model / "model.safetensors", {"format": "pt"})
    talks = [
        [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        for question, answer in (("one plus two", "three"), ("two books", "is two is"), ("ten", "nine plus one apples"))
    ]
    made.rows.write_text("".join(json.dumps({"messages": talk}) + "\n" for talk in talks))
    requests = []
    for name, (zero, changes) in RUNS.items():
        config = made.config(
            format={"chat_template": TEMPLATE},
            model__allow_missing=["lm_head"],
            training__control={"seed": SEED},
            training__schedule__max_steps=1,
            output__dir=str(made.folder / name),
            **changes,
        )
        path = made.write(name, config)
        requests.append({"config": str(path), "deepspeed": str(launch.DS_CONFIGS / f"{zero}.json"), "set": []})
    check_all(launch_all(requests, ranks=2, folder=made.folder / "launches"))
    return made


def test_a_new_head_is_the_same_on_every_layout(workshop: tiny.Workshop) -> None:
    losses = []
    for name in RUNS:
        lines = (workshop.folder / name / "metrics.jsonl").read_text().splitlines()
        losses += [line["loss"] for line in map(json.loads, lines) if line["kind"] == "step"]
    # Adapters begin as nothing. Sums in another order, in float32: see test_same_training.
    assert len(losses) == len(RUNS) and losses == pytest.approx([losses[0]] * len(RUNS), rel=1e-5)
    zero1, zero3 = (load_file(workshop.folder / name / "model" / "model.safetensors") for name in ("zero1", "zero3"))
    # One AdamW step at 1e-3 may turn where a gradient is next to nothing: by twice the step.
    assert float((zero1[HEAD] - zero3[HEAD]).abs().max()) < 2.1e-3 < float(zero1[HEAD].abs().max())


def test_verify_draws_the_same_head(workshop: tiny.Workshop) -> None:
    command = ["launcher/verify.py", str(workshop.folder / "zero3.yaml"), "--steps", "1"]
    zero3 = ["--deepspeed", str(launch.DS_CONFIGS / "zero3.json"), "--set", f"output.dir={workshop.folder / 'verify'}"]
    done = launch.forked(*command, *zero3, ranks=2)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert f"new weights {HEAD} (model.allow_missing)" in done.stdout


def test_the_saved_model_talks_as_it_was_trained(workshop: tiny.Workshop) -> None:
    for name in RUNS:
        tokenizer = AutoTokenizer.from_pretrained(workshop.folder / name / "model")
        assert tokenizer.chat_template == TEMPLATE
        talk = [{"role": "user", "content": "two books"}]
        assert tokenizer.apply_chat_template(talk, tokenize=False, add_generation_prompt=True) == "Q: two books A: "
    settings = json.loads((workshop.folder / "zero3" / "model" / "generation_config.json").read_text())
    ends = tokenizer.convert_tokens_to_ids(["<eos>", "<end>"])
    assert settings["eos_token_id"] == ends


def test_an_adapter_is_merged_with_the_head_that_it_brings(workshop: tiny.Workshop, tmp_path: Path) -> None:
    adapter, merged = workshop.folder / "lora" / "model", tmp_path / "merged"
    done = launch.forked("launcher/export.py", str(adapter), str(merged), ranks=1)
    assert done.returncode == 0, done.stderr[-4000:]
    assert f"merged      {adapter}" in done.stdout
    stored = load_file(adapter / "adapter_model.safetensors")
    model = AutoModelForCausalLM.from_pretrained(merged)
    assert model.get_parameter(HEAD).equal(stored[f"base_model.model.{HEAD}"]) and model.config.use_cache
    assert AutoTokenizer.from_pretrained(merged).chat_template == TEMPLATE
    assert isinstance(model.generation_config.eos_token_id, list)
    lost = next(name for name in stored if "q_proj.lora_B" in name)
    rest = {name: weight for name, weight in stored.items() if name != lost}
    save_file(rest, adapter / "adapter_model.safetensors")
    with pytest.raises(ConfigError, match=f"1 missing: {lost}"):
        merge_adapter(adapter, tmp_path / "other")
    with pytest.raises(ConfigError, match="is there already"):
        merge_adapter(adapter, merged)
