"""The scripts of examples/, run as a person runs them, against the float64 oracle."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests import tiny
from tests.launch import forked
from tests.oracles import OracleRun, OracleSettings, question_rows, train

pytestmark = pytest.mark.distributed

GAMMA, STEPS, RATE = 0.97, 3, 1e-3
# The models are float64, but w is float32, and so are the norms and rotary factors of transformers whatever a model's
# dtype, and a Trainer's log. Losses and norms of gradients average those roundings of 2⁻²⁴; an entry of a gradient may
# be some tens of them off, and Adam divides it by its own size.
ROUNDING = 2.0**-24
MOVED = 1e-5


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> tiny.Workshop:
    return tiny.build(tmp_path_factory.mktemp("library"), answers=(1, 40, 3, 90, 7, 22, 2, 60))


def oracle(workshop: tiny.Workshop, *, weight_decay: float, gamma: float = GAMMA) -> OracleRun:
    documents = question_rows(workshop.rows, AutoTokenizer.from_pretrained(workshop.model))
    settings = OracleSettings(gamma, "tokens", [RATE] * STEPS, weight_decay=weight_decay)
    return train(workshop.model, [documents] * STEPS, settings)


def run(script: str, workshop: tiny.Workshop, *extra: str, ranks: int = 1) -> Path:
    out = workshop.folder / "-".join(["out", Path(script).stem, str(ranks), *(each.strip("-") for each in extra)])
    asked = {"model": workshop.model, "rows": workshop.rows, "out": out, "gamma": GAMMA, "steps": STEPS, "rate": RATE}
    arguments = [text for name, value in asked.items() for text in (f"--{name}", str(value))]
    done = forked(script, *arguments, "--dtype", "float64", *extra, ranks=ranks)
    assert done.returncode == 0, done.stderr
    return out


def assert_trained_as(expected: OracleRun, out: Path, start: Path) -> None:
    history = json.loads((out / "history.json").read_text())
    assert [step["loss"] for step in history] == pytest.approx(expected.losses, rel=4 * ROUNDING)
    assert [step["grad_norm"] for step in history] == pytest.approx(expected.grad_norms, rel=4 * ROUNDING)
    before = AutoModelForCausalLM.from_pretrained(start, dtype=torch.float64).state_dict()
    after = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float64).state_dict()
    for name, weight in expected.weights.items():
        update = (weight - before[name]).norm()
        assert (after[name] - weight).norm() <= MOVED * update, name


def test_a_plain_loop_in_several_micro_batches_is_the_oracle(workshop: tiny.Workshop) -> None:
    out = run("examples/plain_loop.py", workshop, "--micro-batch-tokens", "160")
    assert_trained_as(oracle(workshop, weight_decay=0.0), out, workshop.model)
    with pytest.raises(AssertionError):
        assert_trained_as(oracle(workshop, weight_decay=0.0, gamma=GAMMA + 1e-4), out, workshop.model)


@pytest.mark.parametrize(
    ("ranks", "extra"),
    [(1, ()), (1, ("--accumulation", "4", "--packed")), (2, ("--accumulation", "2", "--packed"))],
    ids=["padded", "packed, accumulated", "packed, accumulated, on two ranks"],
)
def test_a_trainer_is_the_oracle(workshop: tiny.Workshop, ranks: int, extra: tuple[str, ...]) -> None:
    out = run("examples/hf_trainer.py", workshop, "--batch", "8", *extra, ranks=ranks)
    assert_trained_as(oracle(workshop, weight_decay=0.01), out, workshop.model)


def test_trl_is_the_oracle(workshop: tiny.Workshop) -> None:
    # TRL packs the eight documents into two rows of at most 160 tokens: two micro-batches hold all of them.
    out = run("examples/trl_sft.py", workshop, "--packed", "--max-length", "160", "--accumulation", "2")
    assert_trained_as(oracle(workshop, weight_decay=0.01), out, workshop.model)
