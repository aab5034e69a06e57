"""Rows as questions: what the model is given, and what is right."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from seqaware.config.schema import Config
from seqaware.data.questions import Question, check_lengths, read_questions
from seqaware.data.tokenization import prepare_store
from seqaware.errors import ConfigError, DataError
from tests.tiny import train_tokenizer

SQUAD = {
    "context": "one two three",
    "question": "two",
    "answers": {"text": ["three", "two three"], "answer_start": [8]},
}
BOOK = {"question_stem": "one is", "choices": {"text": ["two", "three"], "label": ["A", "B"]}, "answerKey": "B"}


def read(folder: Path, row: dict[str, Any], metric: str, form: dict[str, Any] | None = None) -> list[Question]:
    rows = folder / "rows.jsonl"
    rows.write_text(json.dumps(row) + "\n")
    config = {
        "model": {"base_name": "x"},
        "dataset": {"name": str(rows)},
        "format": form or {},
        "evaluation": {"dataset": {"name": str(rows)}, "metric": metric},
    }
    return read_questions(Config.model_validate(config), tokenizer=train_tokenizer(), max_seq_length=64)


def test_squad_keeps_every_right_answer_and_none_in_the_prompt(tmp_path: Path) -> None:
    (asked,) = read(tmp_path, SQUAD, "squad", {"prompt_template": "{question} {context} A:"})
    assert asked.references == ("three", "two three") and asked.prompt == "two one two three A:"
    assert train_tokenizer().decode(asked.prompt_ids) == asked.prompt


@pytest.mark.parametrize("template", ["{question} {choice}", "{question} {answerKey}", "{question} {answer} A:"])
def test_a_template_that_tells_the_answer_is_refused(tmp_path: Path, template: str) -> None:
    with pytest.raises(ConfigError, match="tells the model the answer"):
        read(tmp_path, BOOK, "choice", {"prompt_template": template})


def test_choices_are_weighed_as_the_answer_template_says_them(tmp_path: Path) -> None:
    tokenizer = train_tokenizer()
    form = {"prompt_template": "Q: {question}", "answer_template": " {choice}"}
    (asked,) = read(tmp_path, BOOK, "choice_likelihood", form)
    assert asked.references == ("B",) and asked.prompt == "Q: one is"
    assert [tokenizer.decode(choice.ids) for choice in asked.choices] == ["two", "three"]
    listed = {**BOOK, "choices": ["two", "three"], "answerKey": 1}
    (asked,) = read(tmp_path, listed, "choice_likelihood", form)
    assert asked.references == ("B",)


def test_a_row_that_nothing_can_judge_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"rows\.jsonl:1: none of the choices is said to be right; got 'C'"):
        read(tmp_path, {**BOOK, "answerKey": "C"}, "choice")
    with pytest.raises(DataError, match=r"rows\.jsonl:1: evaluation\.answer_pattern finds no answer"):
        read(tmp_path, {"question": "one", "answer": "two"}, "exact_match")
    with pytest.raises(DataError, match="no prompt to answer"):
        read(tmp_path, {"text": "one two"}, "exact_match")


def test_a_prepared_store_gives_the_same_questions(tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"question": "one two", "answer": "three #### 4"}\n')
    written: dict[str, Any] = {
        "model": {"base_name": "x"},
        "dataset": {"name": str(rows), "store_dir": str(tmp_path / "stores"), "workers": 1},
        "format": {"prompt_template": "Q: {question} A:"},
    }
    tokenizer = train_tokenizer()
    config = Config.model_validate(written)
    store = prepare_store(config.dataset, config=config, tokenizer=tokenizer, max_seq_length=64)
    found = []
    for name in (str(rows), str(store)):
        # The tiny tokenizer knows neither #### nor 4.
        evaluation = {"dataset": {"name": name}, "metric": "exact_match", "answer_pattern": "(?P<answer>three)"}
        asked = Config.model_validate({**written, "evaluation": evaluation})
        found += read_questions(asked, tokenizer=tokenizer, max_seq_length=64)
    assert found[0].prompt_ids == found[1].prompt_ids and found[0].references == found[1].references == ("three",)
    with pytest.raises(ConfigError, match=r"256 after a prompt of 4 tokens, of 100 in all; write at most 96"):
        check_lengths(found, asked, max_positions=100)
