"""The demo's files are what its scripts make, and its task is fair."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from demo.make_demo_data import HELDOUT_ROWS, TRAIN_ROWS, write_demo
from demo.make_demo_tokenizer import VOCABULARY, train_tokenizer

DEMO = Path(__file__).resolve().parents[2] / "demo"
LARGEST_FILE = 1_500_000


def rows(name: str) -> list[dict[str, str]]:
    return [json.loads(line) for line in (DEMO / name).read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(str(DEMO / "tokenizer"))


def test_the_rows_are_what_the_script_makes(tmp_path: Path) -> None:
    write_demo(tmp_path)
    for name in ("train.jsonl", "heldout.jsonl"):
        assert (tmp_path / name).read_bytes() == (DEMO / name).read_bytes(), name


def test_another_seed_makes_other_rows(tmp_path: Path) -> None:
    write_demo(tmp_path, train_rows=20, heldout_rows=5, seed=1)
    assert (tmp_path / "train.jsonl").read_text().splitlines() != (DEMO / "train.jsonl").read_text().splitlines()[:20]


def test_the_tokenizer_is_what_the_script_makes(tmp_path: Path) -> None:
    train_tokenizer(DEMO / "train.jsonl").save_pretrained(str(tmp_path))
    made = json.loads((tmp_path / "tokenizer.json").read_text(encoding="utf-8"))
    committed = json.loads((DEMO / "tokenizer" / "tokenizer.json").read_text(encoding="utf-8"))
    assert made == committed


def test_no_question_occurs_twice() -> None:
    questions = [row["question"] for name in ("train.jsonl", "heldout.jsonl") for row in rows(name)]
    assert len(questions) == TRAIN_ROWS + HELDOUT_ROWS
    assert len(set(questions)) == len(questions)


def test_every_worked_answer_is_right() -> None:
    for row in rows("train.jsonl") + rows("heldout.jsonl"):
        amount = int(re.findall(r"\d+", row["question"])[0])
        for left, operation, right, result in re.findall(r"<<(\d+)([+-])(\d+)=(\d+)>>", row["answer"]):
            assert int(left) == amount, row
            amount = amount + int(right) if operation == "+" else amount - int(right)
            assert int(result) == amount, row
        assert row["answer"].endswith(f"\n#### {amount}"), row


def test_no_answer_can_be_guessed() -> None:
    """The demo is to answer four fifths; whoever always says the commonest number must be right less than a fifth."""
    finals = [row["answer"].rsplit("#### ", 1)[1] for row in rows("heldout.jsonl")]
    assert max(finals.count(number) for number in set(finals)) / len(finals) < 1 / 5


def test_the_tokenizer_loads_with_its_special_tokens(tokenizer: Any) -> None:
    assert len(tokenizer) == VOCABULARY
    assert tokenizer.eos_token_id == 1
    assert tokenizer.pad_token_id == 0


@pytest.mark.parametrize("text", ["Ada owns 2 pears.", "  żółć 漢字 🙂\n\ttabs", "<<12+9=21>>21"])
def test_any_text_survives_the_tokenizer(tokenizer: Any, text: str) -> None:
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_the_files_stay_small() -> None:
    assert all(path.stat().st_size < LARGEST_FILE for path in DEMO.rglob("*") if path.is_file())
