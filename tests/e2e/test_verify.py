"""launcher/verify.py: honest layouts hold, planted errors do not, and each is found where it is.

One launch of two ranks carries out all of it. Steps hold several micro-batches a rank, packed, and the last is ragged.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests import launch, tiny
from tests.e2e.many_runs import Outcome, launch_all

# 26 rows of some 800 tokens are two steps an epoch, the second of what is left: two micro-batches each on two ranks.
ANSWERS = (1, 40, 3, 90, 7, 22, 2, 60, 5, 11, 1, 33, 4) * 2
SCHEDULE = {"num_epochs": 3, "global_batch_tokens": 460, "micro_batch_tokens": 128}
CHAT_TEMPLATE = "{% for message in messages %}{{ message.role }} : {{ message.content }} {% endfor %}"

MUON = {"type": "muon", "lr": 2e-2}

OF_THE_OPTIMIZER = {"moments of the optimizer", "learning rate of the step", "replicas after the steps"}

HONEST: dict[str, tuple[str, dict[str, Any]]] = {
    "zero0": ("zero0", {}),
    "zero1-rows": ("zero1", {"packing__enabled": False, "training__sft": {"gamma": 0.9, "normalize_by": "sequences"}}),
    "zero2": ("zero2", {}),
    "zero3": ("zero3", {"training__sft": {"gamma": 0.98, "normalize_by": "weight", "scale": "mean_one"}}),
    "zero3-offload": ("zero3_offload_cpu", {}),
    "zero2-bfloat16": ("zero2", {"model__dtype": "bf16"}),
    "zero3-bfloat16": ("zero3", {"model__dtype": "bf16"}),
    "zero2-sequence": ("zero2", {"parallel__sequence": 2}),
    "zero3-sequence": ("zero3", {"parallel__sequence": 2, "model__activation_checkpointing": "full"}),
    "zero2-lora": ("zero2", {"lora": {"rank": 4}}),
    "zero1-plain-loss": ("zero1", {"model__loss_kernel": "plain", "training__sft": {"gamma": 1.0}}),
    "zero2-pieces": ("zero2", {"training__parameters": {"max_seq_length": 40}, "format__on_overlong": "split"}),
    "zero0-muon": ("zero0", {"training__optimizer": MUON}),
    "zero1-muon": ("zero1", {"training__optimizer": MUON}),
    "zero2-muon": ("zero2", {"training__optimizer": MUON}),
    "zero3-muon": ("zero3", {"training__optimizer": MUON}),
    "zero2-muon-offload": ("zero2_offload_optimizer", {"training__optimizer": MUON}),
    "zero3-muon-offload": ("zero3_offload_cpu", {"training__optimizer": MUON}),
    "zero1-muon-bfloat16": ("zero1", {"training__optimizer": MUON, "model__dtype": "bf16"}),
}
# Where each is found (and nowhere that would call something else wrong).
PLANTED: dict[str, tuple[set[str], set[str]]] = {
    "leak beyond 64 tokens": (
        {"isolation of documents", "loss", "gradient of every parameter"},
        {"tokens and labels", "weight of every token", "denominator"},
    ),
    "leak after a long document": (
        {"isolation of documents"},
        {"tokens and labels", "weight of every token", "denominator"},
    ),
    "gradient of one rank": (
        {"replicas after the steps"},
        {"tokens and labels", "weight of every token", "isolation of documents", "learning rate of the step"},
    ),
    "decay twice": (
        {"weights after the step", "weights after the step, rate 0.0078"},
        {"loss", "gradient of every parameter", "gradient norm", *OF_THE_OPTIMIZER},
    ),
    "clip of a rank": (
        {"moments of the optimizer"},
        {"loss", "gradient of every parameter", "gradient norm", "learning rate of the step"},
    ),
    "clipped update": (
        {"gradient norm", "gradient of every parameter", "weights after the step"},
        {"loss", "denominator", "learning rate of the step"},
    ),
    "rate one step late": (
        {"learning rates of the run", "learning rate of the step", "weights after the step"},
        {"loss", "gradient of every parameter", "moments of the optimizer"},
    ),
    "mean of held-out parts": (
        {"evaluation: loss", "evaluation: unweighted loss"},
        {"evaluation: tokens", "evaluation: supervised tokens", "loss", *OF_THE_OPTIMIZER},
    ),
    "unshifted weights": (
        {"weight of every token", "loss", "gradient of every parameter", "γ = 0: F.cross_entropy"},
        {"tokens and labels", "isolation of documents", "denominator"},
    ),
    "integer weights": (
        {"weight of every token", "sum of the weights", "loss", "gradient of every parameter"},
        {"tokens and labels", "unweighted loss", "γ = 0: gradients"},
    ),
    "documents see each other": (
        {"isolation of documents", "loss", "gradient of every parameter", "γ = 0: gradients"},
        {"tokens and labels", "weight of every token", "denominator"},
    ),
    "mean of every rank": (
        {"denominator", "gradient norm", "gradient of every parameter"},
        {"tokens and labels", "weight of every token", "loss", "supervised tokens"},
    ),
    "dropped tail": (
        {"tokens and labels", "supervised tokens", "sequences", "loss", "gradient of every parameter"},
        {"batches of worlds 1, 2, 4, 8", "isolation of documents"},
    ),
    "factor of the accumulation": (
        {"gradient norm", "gradient of every parameter", "γ = 0: gradients"},
        {"loss", "unweighted loss", "denominator", "weight of every token"},
    ),
    "kernel without weights": (
        {"fused loss", "fused loss, gradient", "loss", "gradient of every parameter"},
        {"weight of every token", "γ = 0: F.cross_entropy", "γ = 0: gradients"},
    ),
}

LEAKS = ("leak beyond 64 tokens", "leak after a long document")
# The others are planted under ZeRO-3.
PLANTED_UNDER = {"gradient of one rank": ("zero0", {}), "clipped update": ("zero2", {"training__optimizer": MUON})}


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> tiny.Workshop:
    return tiny.build(tmp_path_factory.mktemp("verify"), answers=ANSWERS)


def _config(workshop: tiny.Workshop, name: str, changes: dict[str, Any]) -> Path:
    folder = str(workshop.folder / name)
    return workshop.write(name, workshop.config(**{"training__schedule": SCHEDULE, "output__dir": folder, **changes}))


def _held_out(workshop: tiny.Workshop) -> dict[str, Any]:
    """Documents of unequal length, in parts whose means would not average to the mean."""
    rows = workshop.folder / "held.jsonl"
    tiny.write_rows(rows, (3, 50, 8, 20, 1, 70, 9))
    return {"dataset": {"name": str(rows), "store_dir": str(workshop.folder / "stores"), "workers": 1}}


def _chat(workshop: tiny.Workshop) -> dict[str, Any]:
    """Conversations of several turns; some messages weigh more, and one nothing."""
    rows = workshop.folder / "chat.jsonl"
    lines = []
    for number in range(9):
        turns = [("one two", "three four five six", 2.0), ("seven plus", "eight nine " * (number + 1), 0.5)]
        messages: list[dict[str, Any]] = []
        for question, answer, weight in turns[: 1 + number % 2]:
            messages += [{"role": "user", "content": question}]
            messages += [{"role": "assistant", "content": answer, "weight": weight * (number != 4)}]
        lines.append(json.dumps({"messages": [*messages, messages[0], {"role": "assistant", "content": "ten"}]}))
    rows.write_text("\n".join(lines) + "\n")
    return {
        "dataset": {"name": str(rows), "store_dir": str(workshop.folder / "stores"), "workers": 1},
        "format": {"chat_template": CHAT_TEMPLATE},
        "training__sft": {"gamma": 0.9, "positions": "turn"},
    }


@pytest.fixture(scope="module")
def outcomes(workshop: tiny.Workshop) -> dict[str, Outcome]:
    """Everything that runs on two ranks, by the name of its config: each rank tells the verdict, or how a run ended."""
    requests = []

    def add(name: str, zero: str, changes: dict[str, Any], *, plant: str | None = None, train: bool = False) -> None:
        held = {} if train or name == "zero3-chat" else {"evaluation": _held_out(workshop)}
        config = str(_config(workshop, name, {**held, **changes}))
        deepspeed = str(launch.DS_CONFIGS / f"{zero}.json")
        requests.append({"config": config, "deepspeed": deepspeed, "plant": plant, "train": train})

    for name, (zero, changes) in HONEST.items():
        add(name, zero, changes)
    add("zero3-chat", "zero3", _chat(workshop))
    for plant in PLANTED:
        add(plant.replace(" ", "-"), *PLANTED_UNDER.get(plant, ("zero3", {})), plant=plant)
    for leak in LEAKS:
        add(f"stopped-{leak.replace(' ', '-')}", "zero3", {}, plant=leak, train=True)
    add("stopped", "zero3", {}, plant="kernel without weights", train=True)
    add("not-stopped", "zero3", {"model__loss_kernel": "plain"}, plant="kernel without weights", train=True)
    done = launch_all(requests, ranks=2, folder=workshop.folder / "launches", script="tests/e2e/planted_errors.py")
    return {Path(request["config"]).stem: outcome for request, outcome in zip(requests, done, strict=True)}


def _certificate(folder: Path) -> dict[str, Any]:
    certificate: dict[str, Any] = json.loads((folder / "certificate.json").read_text())
    return certificate


@pytest.mark.parametrize("name", [*HONEST, "zero3-chat"])
def test_honest_layouts_hold(workshop: tiny.Workshop, outcomes: dict[str, Outcome], name: str) -> None:
    # Every rank hears the verdict.
    assert outcomes[name].check().results == ("holds", "holds")
    certificate = _certificate(workshop.folder / name)
    short = [item for item in certificate["items"] if item["verdict"] != "holds"]
    assert not short and certificate["verdict"] == "holds"
    assert certificate["first_parameter_that_differs"] is None
    assert certificate["steps"] == [1, 2]
    named = {item["item"] for item in certificate["items"]}
    assert {"loss", "gradient of every parameter", "batches of worlds 1, 2, 4, 8", "γ = 0: gradients"} <= named
    assert {"weights after the step", "weights after the step, rate 0.0078", *OF_THE_OPTIMIZER} <= named
    assert ("evaluation: loss by position" in named) == (name != "zero3-chat")


def test_steps_hold_several_micro_batches_a_rank_and_the_rest_of_the_epoch(
    workshop: tiny.Workshop, outcomes: dict[str, Outcome]
) -> None:
    outcomes["zero2"].check()
    plan = _certificate(workshop.folder / "zero2")["plan"]
    assert plan["data"]["steps_per_epoch"] == [2, 2, 2]
    rest = plan["data"]["tokens"] - plan["batches"]["global_batch_tokens"]
    assert rest > 2 * plan["batches"]["micro_batch_tokens"]


@pytest.mark.parametrize("plant", PLANTED)
def test_a_planted_error_is_found_where_it_is(
    workshop: tiny.Workshop, outcomes: dict[str, Outcome], plant: str
) -> None:
    name = plant.replace(" ", "-")
    assert outcomes[name].check().results == ("falls short", "falls short")
    certificate = _certificate(workshop.folder / name)
    assert certificate["verdict"] == "falls short"
    short = {item["item"] for item in certificate["items"] if item["verdict"] != "holds"}
    guilty, innocent = PLANTED[plant]
    assert guilty <= short, f"not found in {guilty - short}"
    assert not innocent & short, f"blamed although it is right: {innocent & short}"
    if "gradient of every parameter" in guilty:
        # Each of these reaches every parameter, and this is the first of the model; Muon leaves it to AdamW.
        first = "model.layers.0" if plant == "clipped update" else "model.embed_tokens.weight"
        assert certificate["first_parameter_that_differs"].startswith(first)


@pytest.mark.parametrize("leak", LEAKS)
def test_a_run_stops_before_its_first_step_where_long_documents_leak(outcomes: dict[str, Outcome], leak: str) -> None:
    for result in outcomes[f"stopped-{leak.replace(' ', '-')}"].check().results:
        assert result.startswith("stopped: packed documents attend to each other")


def test_a_run_stops_before_its_first_step_where_the_fused_loss_is_wrong(
    workshop: tiny.Workshop, outcomes: dict[str, Outcome]
) -> None:
    for result in outcomes["stopped"].check().results:
        assert result.startswith("stopped: the fused loss differs from the plain one")
    assert outcomes["not-stopped"].check().results == ("trained", "trained")
    assert not (workshop.folder / "stopped" / "metrics.jsonl").read_text()
    assert (workshop.folder / "not-stopped" / "metrics.jsonl").read_text()


def of_the_batch(k: Any, length: Any) -> Any:
    """A user's scheme that is none of a token's own place: it looks at what else is in the micro-batch."""
    del length
    return k / k.max()


def test_the_command_names_what_depends_on_the_batch(workshop: tiny.Workshop) -> None:
    scheme = {"weighting": "tests.e2e.test_verify:of_the_batch"}
    path = _config(workshop, "of-the-batch", {"training__sft": scheme})
    done = launch.forked("launcher/verify.py", str(path), "--steps", "1", ranks=1)
    assert done.returncode == 1, done.stderr[-4000:]
    assert "falls short" in done.stdout and "differs     first in the gradient of model.embed_tokens" in done.stdout
    short = {i["item"] for i in _certificate(workshop.folder / "of-the-batch")["items"] if i["verdict"] != "holds"}
    assert {"batches of worlds 1, 2, 4, 8", "weight of every token"} <= short


def test_the_command_leaves_the_folder_to_the_run_and_comes_back_to_it(workshop: tiny.Workshop) -> None:
    path = str(_config(workshop, "both", {"training__schedule": {"num_epochs": 1, "global_batch_size": 26}}))
    zero = str(launch.DS_CONFIGS / "zero3.json")
    verify = ("launcher/verify.py", path, "--deepspeed", zero, "--steps", "2", "--dtype", "float32")
    first = launch.deepspeed(*verify, ranks=2)
    assert first.returncode == 0, first.stderr[-4000:]
    assert "verdict     holds" in first.stdout
    folder = workshop.folder / "both"
    assert [child.name for child in folder.iterdir()] == ["certificate.json"]
    certificate = _certificate(folder)
    assert certificate["steps"] == [1]  # the run has no second one
    assert certificate["oracle"] == "float32 on cpu, rounding seen in float32"
    assert certificate["versions"]["torch"] and certificate["host"]["name"] and certificate["plan"]["zero_stage"] == 3

    trained = launch.forked("launcher/train.py", path, ranks=1)
    assert trained.returncode == 0, trained.stderr[-4000:]
    assert _certificate(folder) == certificate
    assert certificate["mathematics_hash"] == json.loads((folder / "plan.json").read_text())["mathematics_hash"]
    before = {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()}
    again = launch.forked(*verify, ranks=2)
    assert again.returncode == 0, again.stderr[-4000:]
    after = {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()}
    assert {file.name for file in after if after[file] != before.get(file)} == {"certificate.json"}
