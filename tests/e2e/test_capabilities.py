"""Any two choices that the table of capabilities lets through train together, and compute the objective they should.

Runs of three full-batch steps on two ranks, in which any two choices a CPU can make meet. The weights of the first step
are the model's own whatever the layout, the optimizer and the adapters (which begin as nothing), so its loss must be
the oracle's; and the loss must fall.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from seqaware.plan.capabilities import AXES, REFUSED
from tests import launch, oracles, tiny
from tests.covering import Combination, covering
from tests.e2e.many_runs import Outcome, launch_all

# Sums in another order, in float32 against float64 (see test_same_training), and in bfloat16, which keeps 8 bits: one
# rounding is 2^-9 = 2e-3 relative; a mean over ~300 tokens' losses averages most of it away.
TOLERANCE = {"float32": 1e-5, "bfloat16": 1e-2}
GPU_ONLY = {("device", "cuda")} | {
    next(iter(pair - {("device", "cpu")})) for pair in REFUSED if ("device", "cpu") in pair
}
# Compiled operators: cpu_adam has tests of its own (test_zero_range), lion's takes minutes to build.
ELSEWHERE = {("optimizer", "cpu_adam"), ("optimizer", "lion"), ("adapters", "quantized")}
HERE = {
    axis: tuple(choice for choice in choices if (axis, choice) not in GPU_ONLY | ELSEWHERE)
    for axis, choices in AXES.items()
}
GAMMA = 0.9

Weigh = Callable[[int], list[float]]
WEIGHTS: dict[str, Weigh] = {
    "log_suffix": lambda count: oracles.suffix_weights(count, GAMMA),
    "linear": lambda count: [k / count for k in range(1, count + 1)],
    "uniform": lambda count: [1.0] * count,
    "own": lambda count: [float(2 * k <= count + 1) for k in range(1, count + 1)],
}


def first_half(k: Any, length: Any) -> Any:
    """The scheme of our own: only the first half of a sequence counts."""
    return (2 * k <= length + 1).double()


def can_run(run: Combination) -> bool:
    """Not refused by the table."""
    made = set(run.items())
    return not any(pair <= made for pair in REFUSED)


# Compiling takes longer than all the rest of a run.
RUNS = covering(HERE, strength=2, valid=can_run, cheap={"compile": ("off",)})


def _config(workshop: tiny.Workshop, run: Combination, folder: Path) -> dict[str, Any]:
    own = "tests.e2e.test_capabilities:first_half"
    generates = run["evaluation"] == "answers"
    evaluation = {
        "dataset": {"name": str(workshop.rows)},
        "metric": "exact_match" if generates else "none",
        "every_minutes": None if generates else 1e-9,  # after every step, but generating takes long
        "answer_pattern": r"(?P<answer>\w+)",
        "max_new_tokens": 4,
    }
    changes: dict[str, Any] = {
        "model__dtype": run["precision"],
        "model__attention": run["attention"],
        "model__loss_kernel": run["loss_kernel"],
        "model__compile": run["compile"] == "on",
        "model__activation_checkpointing": run["activations"],
        "model__mlp_tile_tokens": 24 if run["mlp"] == "tiles" else None,
        "packing__enabled": run["rows"] == "packed",
        "parallel__sequence": 2 if run["sequence"] == "shared" else 1,
        "lora": None if run["adapters"] == "none" else {"rank": 4, "dora": run["adapters"] == "dora"},
        "training__optimizer": {"lr": 3e-3, "type": run["optimizer"]},
        "training__schedule__micro_batch_tokens": 160,
        "training__sft": {"gamma": GAMMA, "weighting": own if run["objective"] == "own" else run["objective"]},
        "output__dir": str(folder),
    }
    if run["evaluation"] != "off":
        changes["evaluation"] = evaluation
    return workshop.config(**changes)


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> tiny.Workshop:
    return tiny.build(tmp_path_factory.mktemp("capabilities"))


@pytest.fixture(scope="module")
def outcomes(workshop: tiny.Workshop) -> list[Outcome]:
    requests = []
    for number, run in enumerate(RUNS):
        path = workshop.write(f"run-{number}", _config(workshop, run, workshop.folder / f"run-{number}"))
        zero = launch.DS_CONFIGS / f"zero{run['zero']}.json"
        requests.append({"config": str(path), "deepspeed": str(zero), "set": []})
    return launch_all(requests, ranks=2, folder=workshop.folder / "launches")


@pytest.fixture(scope="module")
def token_losses(workshop: tiny.Workshop) -> list[torch.Tensor]:
    """The float64 losses of each row's answer tokens, at the initial weights."""
    model = AutoModelForCausalLM.from_pretrained(workshop.model, dtype=torch.float64, attn_implementation="eager")
    documents = oracles.question_rows(workshop.rows, AutoTokenizer.from_pretrained(workshop.model))
    losses = []
    for document in documents:
        ids = torch.tensor([list(document.tokens)])
        with torch.no_grad():
            logits = model(input_ids=ids, use_cache=False).logits[0, :-1]
        of_tokens = torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="none")
        losses.append(of_tokens[torch.tensor(list(document.supervised[1:]))])
    return losses


@pytest.mark.parametrize("number", range(len(RUNS)))
def test_choices_that_meet_compute_the_objective_and_learn(
    workshop: tiny.Workshop, outcomes: list[Outcome], token_losses: list[torch.Tensor], number: int
) -> None:
    run = RUNS[number]
    outcomes[number].check()
    lines = [
        json.loads(line) for line in (workshop.folder / f"run-{number}" / "metrics.jsonl").read_text().splitlines()
    ]
    steps = [line for line in lines if line["kind"] == "step"]
    weigh = WEIGHTS[run["objective"]]
    weighted = sum(float(losses @ losses.new_tensor(weigh(len(losses)))) for losses in token_losses)
    tokens = sum(map(len, token_losses))
    assert steps[0]["loss"] == pytest.approx(weighted / tokens, rel=TOLERANCE[run["precision"]]), run
    assert steps[-1]["loss"] < steps[0]["loss"], run
    evaluations = [line for line in lines if line["kind"] == "evaluation"]
    assert bool(evaluations) == (run["evaluation"] != "off"), run
    assert ("exact_match" in {key for line in evaluations for key in line}) == (run["evaluation"] == "answers"), run
    if evaluations:
        often = [0, 1, 2, 3] if run["evaluation"] != "answers" else [0, 3]
        assert [line["step"] for line in evaluations] == often, run
        _hold_positions(evaluations[0], token_losses, weigh, tolerance=TOLERANCE[run["precision"]])


def _hold_positions(
    evaluation: dict[str, Any], token_losses: list[torch.Tensor], weigh: Weigh, *, tolerance: float
) -> None:
    """The loss of every bucket of positions, before the first step, against the oracle's tokens."""
    tokens = [
        (k, weight, float(loss))
        for losses in token_losses
        for k, (weight, loss) in enumerate(zip(weigh(len(losses)), losses, strict=True), start=1)
        if weight
    ]
    found = evaluation["by_position"]
    assert sum(entry["tokens"] for entry in found) == len(tokens) == evaluation["scored_tokens"]
    for entry in found:
        mine = [(weight, loss) for k, weight, loss in tokens if entry["from"] <= k <= entry["to"]]
        assert entry["tokens"] == len(mine)
        assert entry["loss"] == pytest.approx(sum(loss for _, loss in mine) / len(mine), rel=tolerance)
        weighted = sum(weight * loss for weight, loss in mine) / len(mine)
        assert entry["weighted_loss"] == pytest.approx(weighted, rel=tolerance)


def test_every_pair_that_can_run_here_was_run() -> None:
    """Counted anew, without the generator: what is missing must be refused."""
    ran = {frozenset(pair) for run in RUNS for pair in _pairs(run)}
    names = list(HERE)
    for place, one in enumerate(names):
        for other in names[place + 1 :]:
            wanted = {frozenset(((one, a), (other, b))) for a in HERE[one] for b in HERE[other]}
            left = {pair for pair in wanted - ran if pair not in REFUSED}
            assert not left, left


def _pairs(run: Combination) -> list[tuple[tuple[str, Any], tuple[str, Any]]]:
    choices = list(run.items())
    return [(one, other) for place, one in enumerate(choices) for other in choices[place + 1 :]]
