"""Adapters on every layout: losses, gradient norms, adapters and the exported model are those of the float64 oracle."""

from __future__ import annotations

import importlib.util
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from launcher.train import app
from tests import tiny
from tests.adapter_oracle import SEVEN, Adapted
from tests.e2e.adapter_runs import (
    ROUNDING,
    UPDATE_TOLERANCE,
    check,
    distance,
    documents_of,
    oracle,
    request,
    steps_of,
)
from tests.e2e.many_runs import check_all, launch_all

# What is asked for, and what the oracle makes of it.
LORA: dict[str, dict[str, Any]] = {
    "all": {"rank": 4, "alpha": 8},
    "named": {"rank": 4, "alpha": 6, "rslora": True, "target_modules": ["q_proj", "up_proj"]},
    "pattern": {"rank": 2, "alpha": 6, "target_modules": r".*layers\.1\.mlp\..*_proj"},
    "dora": {"rank": 4, "alpha": 8, "dora": True},
    "saved_head": {"rank": 4, "alpha": 8, "modules_to_save": ["lm_head"]},
    "saved_embedding": {"rank": 4, "alpha": 8, "modules_to_save": ["embed_tokens"], "target_modules": ["o_proj"]},
    "head": {"rank": 4, "alpha": 8, "target_modules": ["lm_head", "v_proj"]},
    "tied": {"rank": 4, "alpha": 8},
}
ORACLES: dict[str, Adapted] = {
    "all": Adapted(4, 2.0),
    "named": Adapted(4, 3.0, ("q_proj", "up_proj")),
    "pattern": Adapted(2, 3.0, tuple(f"layers.1.mlp.{name}" for name in SEVEN[4:])),
    "dora": Adapted(4, 2.0, dora=True),
    "saved_head": Adapted(4, 2.0, whole=("lm_head",)),
    "saved_embedding": Adapted(4, 2.0, ("o_proj",), whole=("embed_tokens",)),
    "head": Adapted(4, 2.0, ("lm_head", "v_proj")),
    "tied": Adapted(4, 2.0),
}


@dataclass(frozen=True)
class Case:
    ranks: int
    stage: int | str
    lora: str
    export: str = "merged"
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return "-".join([f"r{self.ranks}-z{self.stage}-{self.lora}-{self.export}", *self.settings])


ROWS = {"packing__enabled": False}
PLAIN = {"model__loss_kernel": "plain"}
SEVERAL = {"training__schedule__micro_batch_tokens": 128}
RECOMPUTED = {"model__activation_checkpointing": "full"}
CASES = [
    Case(1, 0, "all"),
    Case(1, 0, "head", settings=PLAIN),
    Case(1, 0, "saved_embedding"),
    Case(1, 1, "saved_head", settings=ROWS | SEVERAL),
    Case(1, 1, "tied"),
    Case(1, 2, "dora", settings=SEVERAL),
    Case(1, 2, "saved_embedding", "adapter"),
    Case(1, 3, "all", "adapter", PLAIN | RECOMPUTED),
    Case(1, 3, "dora"),
    Case(2, 0, "dora", settings=SEVERAL),
    Case(2, 0, "named", "adapter"),
    Case(2, 1, "all", settings=ROWS | SEVERAL),
    Case(2, 1, "dora", settings=RECOMPUTED),
    Case(2, 1, "pattern"),
    Case(2, 2, "all", "adapter", SEVERAL | RECOMPUTED),
    Case(2, 2, "dora"),
    Case(2, 2, "saved_head", settings=SEVERAL),
    Case(2, 3, "all", settings=SEVERAL | RECOMPUTED),
    Case(2, 3, "dora", "adapter", SEVERAL | RECOMPUTED),
    Case(2, 3, "dora", settings=ROWS | PLAIN),
    Case(2, 3, "saved_head", "adapter", SEVERAL),
    Case(2, 3, "saved_embedding"),
    Case(2, 3, "head", settings=PLAIN),
    Case(2, 3, "named"),
    Case(2, 3, "tied", "adapter"),
    Case(2, 3, "dora", settings={"parallel__sequence": 2}),
    Case(2, "3_offload_cpu", "all", "adapter"),
]


@pytest.fixture(scope="module")
def workshops(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tiny.Workshop]:
    """The usual tiny model, and one whose head is its embedding."""
    folder = tmp_path_factory.mktemp("adapters")
    (folder / "tied").mkdir()
    usual, tied = tiny.build(folder), tiny.build(folder / "tied")
    model = AutoModelForCausalLM.from_pretrained(tied.model)
    model.config.tie_word_embeddings = True
    type(model)(model.config).float().save_pretrained(tied.model)
    return {"usual": usual, "tied": tied}


def _workshop(workshops: dict[str, tiny.Workshop], lora: str) -> tiny.Workshop:
    return workshops["tied" if lora == "tied" else "usual"]


def test_every_layout_trains_the_oracles_adapters(workshops: dict[str, tiny.Workshop]) -> None:
    for ranks in (1, 2):
        requests = []
        for case in (case for case in CASES if case.ranks == ranks):
            lora = {**LORA[case.lora], "export": case.export}
            workshop = _workshop(workshops, case.lora)
            requests.append(request(workshop, case.name, lora, case.stage, **case.settings))
        check_all(launch_all(requests, ranks=ranks, folder=workshops["usual"].folder / "launches"))
    expected = {}
    for lora, adapted in ORACLES.items():
        workshop = _workshop(workshops, lora)
        expected[lora] = oracle(workshop.model, adapted, documents_of(workshop))
    for case in CASES:
        workshop = _workshop(workshops, case.lora)
        check(case.name, workshop.folder / case.name, workshop.model, expected[case.lora])


def test_the_oracle_is_not_deaf(workshops: dict[str, tiny.Workshop]) -> None:
    """Scale, magnitude, A's start and what is trained whole each move what is compared by far more than its bound."""
    workshop = workshops["usual"]
    documents = documents_of(workshop)
    reference = oracle(workshop.model, ORACLES["all"], documents)
    others = {"dora": ORACLES["dora"], "head": ORACLES["saved_head"], "scale": Adapted(4, 2.02)}
    for what, adapted in (others | {"seed": Adapted(4, 2.0, seed=43)}).items():
        other = oracle(workshop.model, adapted, documents)
        for name in (f"model.layers.{layer}.{end}.weight" for layer in (0, 1) for end in ("mlp.up_proj",)):
            first, moved = reference.base[name], reference.merged[name]
            bound = UPDATE_TOLERANCE * distance(first, moved) + ROUNDING * float(moved.abs().max())
            assert distance(other.merged[name], moved) > 10 * bound, (what, name)
    for name, last in reference.run.weights.items():
        bound = ROUNDING * float(last.abs().max())
        assert distance(reference.first[name], last) > 10 * bound, f"{name} hardly moves"


def test_resume_is_bitwise_and_checkpoints_hold_what_is_trained(tmp_path: Path) -> None:
    workshop = tiny.build(tmp_path)
    # Five rows a step: the thirteen rows make a ragged epoch of three steps, and step 4 lies in the second epoch.
    schedule = {"num_epochs": 2, "global_batch_size": 5, "scheduler_type": "constant", "micro_batch_tokens": 128}
    cases = {"all": 0, "saved_head": 2, "dora": 3}
    requests = []
    for lora, stage in cases.items():
        for name, last in ((f"whole-{lora}", 5), (f"parts-{lora}", 2), (f"parts-{lora}", 5)):
            asked = {**LORA[lora], "export": "adapter"}
            one = request(workshop, name, asked, stage, training__schedule=schedule, output__save_every=2)
            requests.append({**one, "set": [f"training.schedule.max_steps={last}"]})
    check_all(launch_all(requests, ranks=2, folder=tmp_path / "launches"))
    for lora in cases:
        whole, parts = tmp_path / f"whole-{lora}", tmp_path / f"parts-{lora}"
        numbers = [[(s["step"], s["loss"], s["grad_norm"]) for s in steps_of(run)] for run in (whole, parts)]
        assert [step for step, *_ in numbers[0]] == [1, 2, 3, 4, 5] and numbers[0] == numbers[1], lora
        expected, resumed = (load_file(run / "model" / "adapter_model.safetensors") for run in (whole, parts))
        assert all(resumed[name].equal(tensor) for name, tensor in expected.items()), lora
        assert len(json.loads((parts / "manifest.json").read_text())["attempts"]) == 2, lora
        for file in (parts / "checkpoints" / "step-00000005").glob("*model_states.pt"):
            names = torch.load(file, weights_only=False)["module"].keys()
            assert names and all("lora_" in name or "modules_to_save" in name for name in names), file


@pytest.mark.parametrize(
    ("lora", "says"),
    [
        ({"target_modules": ["q_prj"]}, ("lora.target_modules matches nothing", "q_prj", "did you mean q_proj?")),
        ({"modules_to_save": ["head"]}, ("lora.modules_to_save matches nothing", "head", "lm_head")),
        ({"target_modules": ["lm_head"]}, ("the fused loss", "loss_kernel: plain")),
        ({"quantize_base": "int8", "dora": True}, ("lora.quantize_base int8", "dora: false")),
    ],
)
def test_refused_before_the_model_loads(
    lora: dict[str, Any], says: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    # As where bitsandbytes is installed: that it is missing would be one more error.
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: find("json" if name == "bitsandbytes" else name, *a)
    )
    workshop = tiny.build(tmp_path)
    (workshop.model / "model.safetensors").write_bytes(b"no weights: loading these would fail in another way")
    path = workshop.write("bad", workshop.config(lora=lora, output__dir=str(tmp_path / "run")))
    result = CliRunner().invoke(app, [str(path)])
    assert result.exit_code == 2 and result.output.startswith("error: "), result.output
    assert all(fragment in result.output for fragment in says), result.output
    assert not (tmp_path / "run").exists()


def test_answers_are_those_of_the_exported_model(tmp_path: Path) -> None:
    """Generation with adapters in place, sharded over two ranks, writes what the merged model writes."""
    workshop = tiny.build(tmp_path, answers=(1, 2, 3, 5, 8))
    held_out = {"name": str(workshop.rows), "store_dir": str(tmp_path / "stores"), "workers": 1}
    asked = {"metric": "exact_match", "max_new_tokens": 8, "batch_size": 2, "answer_pattern": r"(?P<answer>\w+)"}
    requests = [
        request(workshop, lora, LORA[lora], 3, evaluation={"dataset": held_out, **asked})
        for lora in ("all", "dora", "saved_embedding")
    ]
    check_all(launch_all(requests, ranks=2, folder=tmp_path / "launches"))
    tokenizer = AutoTokenizer.from_pretrained(workshop.model)
    questions = [json.loads(line)["question"] for line in workshop.rows.read_text().splitlines()]
    for lora in ("all", "dora", "saved_embedding"):
        model = AutoModelForCausalLM.from_pretrained(tmp_path / lora / "model")
        answers = [json.loads(line) for line in (tmp_path / lora / "answers.jsonl").read_text().splitlines()]
        for question, answer in zip(questions, answers, strict=True):
            prompt = tokenizer(f"Q: {question} A:", return_tensors="pt").input_ids
            written = model.generate(prompt, max_new_tokens=8, do_sample=False, pad_token_id=tokenizer.eos_token_id)
            text = tokenizer.decode(written[0, prompt.shape[1] :], skip_special_tokens=True)
            assert answer["generated"] == text, (lora, question)
