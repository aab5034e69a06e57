"""`launcher/evaluate.py`, as a person types it: one rank, and three that share a model under ZeRO-3."""

from __future__ import annotations

import json
import random
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests import launch, tiny

ROWS = 5


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> tiny.Workshop:
    made = tiny.build(tmp_path_factory.mktemp("evaluate"), answers=(2, 3))
    choose = random.Random(1)
    rows = []
    for number in range(ROWS):
        words = [" ".join(choose.choices(tiny.WORDS, k=choose.randint(1, 9))) for _ in range(3)]
        row = {"question": words[0], "choices": words[1:], "answer": "AB"[number % 2]}
        rows.append(json.dumps(row))
    made.rows.write_text("\n".join(rows) + "\n")
    return made


def config_of(workshop: tiny.Workshop, **evaluation: Any) -> str:
    config = workshop.config(
        format={"prompt_template": "Q: {question} A:", "answer_template": " {choice}"},
        evaluation={"dataset": {"name": str(workshop.rows)}, "max_new_tokens": 6, **evaluation},
    )
    return str(workshop.write("evaluate", config))


def answers(done: subprocess.CompletedProcess[str], out: Path) -> list[dict[str, Any]]:
    assert done.returncode == 0, done.stderr[-6000:]
    lines = [json.loads(line) for line in (out / "answers.jsonl").read_text().splitlines()]
    assert [line["name"] for line in lines] == [f"rows.jsonl:{number}" for number in range(1, ROWS + 1)]
    return lines


DRAWN = {"metric": "squad", "temperature": 1.0, "seed": 3}


@pytest.mark.parametrize("evaluation", [DRAWN, {"metric": "choice_likelihood"}])
def test_three_ranks_under_zero3_answer_as_one_does(workshop: tiny.Workshop, evaluation: dict[str, Any]) -> None:
    config = config_of(workshop, batch_size=1, **evaluation)
    zero3 = ["--deepspeed", str(launch.DS_CONFIGS / "zero3.json")]
    one, three = workshop.folder / "one", workshop.folder / "three"
    command = ["launcher/evaluate.py", str(workshop.model), config, "--out"]
    # Two rounds for five rows: in the second, one rank has none.
    # What a config asks of training, that three ranks share each sequence, moves no answer.
    zero3 += ["--set", "parallel.sequence=3"]
    shared = answers(launch.forked(*command, str(three), *zero3, ranks=3), three)
    done = launch.forked(*command, str(one), "--set", "evaluation.batch_size=null", ranks=1)
    alone = answers(done, one)
    weighed = [line.pop("log_likelihoods", None) for line in alone]
    for mine, theirs in zip(weighed, [line.pop("log_likelihoods", None) for line in shared], strict=True):
        # Float32 logits of size 1: a few roundings of 6e-8 for each of at most nine tokens.
        assert mine == (None if theirs is None else pytest.approx(theirs, abs=1e-5))
    assert shared == alone
    assert all(line["prompt"].startswith("Q: ") and line["prompt"].endswith(" A:") for line in alone)
    results = json.loads((three / "results.json").read_text())
    assert results["questions"] == ROWS and results["topology"]["zero_stage"] == 3
    name = "exact_match" if evaluation["metric"] == "squad" else "choice_accuracy"
    assert results[name] == sum(line["correct"] for line in alone) / ROWS
    assert results[f"{name}_low"] <= results[name] <= results[f"{name}_high"]
    assert name in done.stdout and str(one / "answers.jsonl") in done.stdout


def test_what_cannot_be_evaluated_is_told(workshop: tiny.Workshop) -> None:
    empty = workshop.folder / "empty"
    empty.mkdir()
    refused = {
        "holds no model; got": (empty, {"metric": "choice"}),
        "no metric to judge answers by": (workshop.model, {}),
    }
    for message, (model, evaluation) in refused.items():
        done = launch.forked("launcher/evaluate.py", str(model), config_of(workshop, **evaluation), ranks=1)
        assert done.returncode == 2 and message in done.stderr, done.stderr
