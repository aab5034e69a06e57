"""What may be chosen beside the layout: precision, activation checkpointing, optimizers, attention, data shapes.

Each variant trains the workshop's rows on two ranks; all share one launch. A variant that is only another way to
compute the same is compared with the plain run; one that computes something else must learn.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from tests import launch, tiny
from tests.e2e.many_runs import Outcome, launch_all

# Sums in another order in float32 (see test_same_training).
SAME = 1e-5
# bfloat16 keeps 8 bits: one rounding is 2^-9 = 2e-3 relative; a mean over ~300 tokens' losses averages most of it away.
BFLOAT16 = 1e-2

VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "plain run": ("zero2", {}),
    "activation checkpointing, zero3": ("zero3", {"model__activation_checkpointing": True}),
    "activation checkpointing, zero1": ("zero1", {"model__activation_checkpointing": True}),
    "eager attention": ("zero2", {"model__attention": "eager"}),
    "fused adamw": ("zero2", {"training__optimizer": {"lr": 1e-3, "type": "adamw_fused"}}),
    "bfloat16, zero1": ("zero1", {"model__dtype": "bf16"}),
    "bfloat16, zero2": ("zero2", {"model__dtype": "bf16"}),
    "bfloat16, zero3": ("zero3", {"model__dtype": "bf16"}),
    "muon": ("zero2", {"training__optimizer": {"lr": 1e-3, "type": "muon"}}),
    "no clipping": ("zero3", {"training__optimizer": {"lr": 1e-3, "max_grad_norm": 0}}),
    "user's scheme": ("zero1", {"training__sft": {"weighting": "tests.e2e.test_variants:first_half"}}),
    "tokens a step": ("zero2", {"training__schedule": {"num_epochs": 3, "global_batch_tokens": 200}}),
}


def first_half(k: Any, length: Any) -> Any:
    """A user's own scheme: only the first half of a sequence counts."""
    return (2 * k <= length + 1).double()


@dataclass(frozen=True)
class Runs:
    """The folders of the variants, each of which was trained to its end."""

    rows: Path
    folders: dict[str, Path]
    outcomes: dict[str, Outcome]

    def __getitem__(self, name: str) -> Path:
        self.outcomes[name].check()
        return self.folders[name]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    workshop = tiny.build(tmp_path_factory.mktemp("variants"))
    folders = {name: workshop.folder / f"run-{number}" for number, name in enumerate(VARIANTS)}
    requests = []
    for name, (zero, changes) in VARIANTS.items():
        config = workshop.config(output__dir=str(folders[name]), **changes)
        path = workshop.write(folders[name].name, config)
        requests.append({"config": str(path), "deepspeed": str(launch.DS_CONFIGS / f"{zero}.json"), "set": []})
    outcomes = launch_all(requests, ranks=2, folder=workshop.folder / "launches")
    return Runs(workshop.rows, folders, dict(zip(VARIANTS, outcomes, strict=True)))


def _steps(folder: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["kind"] == "step"]


@pytest.mark.parametrize(
    "name", ["activation checkpointing, zero3", "activation checkpointing, zero1", "eager attention", "fused adamw"]
)
def test_another_way_to_compute_the_same(runs: Runs, name: str) -> None:
    for step, expected in zip(_steps(runs[name]), _steps(runs["plain run"]), strict=True):
        assert step["loss"] == pytest.approx(expected["loss"], rel=SAME)
        assert step["grad_norm"] == pytest.approx(expected["grad_norm"], rel=2 * SAME)


@pytest.mark.parametrize("name", ["bfloat16, zero1", "bfloat16, zero2", "bfloat16, zero3"])
def test_bfloat16_is_float32_but_for_rounding(runs: Runs, name: str) -> None:
    for step, expected in zip(_steps(runs[name]), _steps(runs["plain run"]), strict=True):
        assert step["loss"] == pytest.approx(expected["loss"], rel=BFLOAT16)
        assert step["grad_norm"] == pytest.approx(expected["grad_norm"], rel=5 * BFLOAT16)
    saved = load_file(runs[name] / "model" / "model.safetensors")
    assert {str(tensor.dtype) for tensor in saved.values()} == {"torch.bfloat16"}


def test_muon_learns_and_differs(runs: Runs) -> None:
    muon, plain = _steps(runs["muon"]), _steps(runs["plain run"])
    assert muon[0]["loss"] == pytest.approx(plain[0]["loss"], rel=SAME)
    assert muon[-1]["loss"] < muon[0]["loss"]
    assert abs(muon[-1]["loss"] / plain[-1]["loss"] - 1) > 100 * SAME


def test_without_clipping_the_norm_is_the_same_and_the_course_is_not(runs: Runs) -> None:
    free, plain = _steps(runs["no clipping"]), _steps(runs["plain run"])
    assert free[0]["grad_norm"] == pytest.approx(plain[0]["grad_norm"], rel=2 * SAME)
    assert plain[0]["grad_norm"] > 1.0


def test_a_users_scheme_decides_the_weights(runs: Runs) -> None:
    steps = _steps(runs["user's scheme"])
    lengths = [len(json.loads(line)["answer"].split()) + 1 for line in runs.rows.read_text().splitlines()]
    assert steps[0]["weight_sum"] == sum((length + 1) // 2 for length in lengths)


def test_token_budgets_close_a_step_before_they_overflow(runs: Runs) -> None:
    steps = _steps(runs["tokens a step"])
    assert all(step["tokens"] <= 200 for step in steps)
    per_epoch = [sum(s["sequences"] for s in steps if e < s["epoch"] <= e + 1) for e in range(3)]
    assert per_epoch == [13, 13, 13]
