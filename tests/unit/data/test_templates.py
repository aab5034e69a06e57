"""Rows to prompts and completions."""

from __future__ import annotations

from typing import Any

import pytest

from seqaware.data.templates import Example, Format, Renderer, Segment, Template, fields_of
from seqaware.errors import ConfigError, DataError

GSM8K = {"question": "1 + 2 + 3 = ?", "answer": "1 + 2 = <<1+2=3>>3\n3 + 3 = 6\n#### 6"}
OPENBOOKQA = {
    "id": "7",
    "question_stem": "There is most likely going to be fog around:",
    "choices": {"text": ["a marsh", "a desert"], "label": ["A", "B"]},
    "answerKey": "A",
}
SQUAD = {
    "context": "The game was played at Levi's Stadium.",
    "question": "Where?",
    "answers": {"text": ["Levi's Stadium", "at Levi's Stadium"], "answer_start": [23, 20]},
}


def form(**changes: Any) -> Format:
    return Format(
        **{"prompt_template": None, "answer_template": " {answer}", "train_on": None, "columns": {}, **changes}
    )


def example(row: dict[str, Any], **changes: Any) -> Example:
    made = form(**changes)
    return Renderer(made).example(fields_of(row, made.columns, "rows:1"), "rows:1")


def texts(row: dict[str, Any], **changes: Any) -> list[str]:
    return [segment.text for segment in example(row, **changes).segments]


def test_gsm8k_has_reasoning_and_final() -> None:
    fields = fields_of(GSM8K, {}, "rows:1")
    assert fields["reasoning"] == "1 + 2 = <<1+2=3>>3\n3 + 3 = 6"
    assert fields["final"] == "6"
    assert texts(GSM8K, prompt_template="Q: {question}\nA:", answer_template=" {final} because {reasoning}") == [
        "Q: 1 + 2 + 3 = ?\nA:",
        " 6 because 1 + 2 = <<1+2=3>>3\n3 + 3 = 6",
    ]


def test_default_prompts() -> None:
    assert texts(GSM8K) == ["Question: 1 + 2 + 3 = ?\nAnswer:", " " + GSM8K["answer"]]
    assert texts(SQUAD) == [
        "Context: The game was played at Levi's Stadium.\nQuestion: Where?\nAnswer:",
        " Levi's Stadium",
    ]
    assert texts(OPENBOOKQA) == [
        "Question: There is most likely going to be fog around:\nA) a marsh\nB) a desert\nAnswer:",
        " A",
    ]


def test_choices_may_be_a_plain_list() -> None:
    assert fields_of({"choices": ["x", "y"]}, {}, "r")["choices"] == "A) x\nB) y"
    assert fields_of({"choices": "already text"}, {}, "r")["choices"] == "already text"


def test_a_question_without_any_answer_in_the_text_has_an_empty_one() -> None:
    assert fields_of({"question": "?", "answers": {"text": [], "answer_start": []}}, {}, "r")["answer"] == ""


def test_prompt_and_completion_stay_as_they_are() -> None:
    row = {"prompt": "Once ", "completion": "upon a {time}"}
    made = example(row)
    assert made == Example((Segment("Once ", False), Segment("upon a {time}", True, True)), "tokenizer")


def test_plain_text_is_supervised_whole_behind_a_separator() -> None:
    assert example({"text": "It is a truth"}) == Example((Segment("It is a truth", True),), "separator")


def test_train_on_all_supervises_the_prompt_too() -> None:
    assert [segment.supervised for segment in example(GSM8K, train_on="all").segments] == [True, True]
    assert [segment.supervised for segment in example(GSM8K, train_on="completion").segments] == [False, True]
    with pytest.raises(DataError, match="plain text has no completion"):
        example({"text": "x"}, train_on="completion")


def test_columns_give_fields_other_names() -> None:
    row = {"problem": "2 * 3", "solution": "6", "level": 4}
    columns = {"question": "problem", "answer": "solution"}
    assert texts(row, columns=columns) == ["Question: 2 * 3\nAnswer:", " 6"]
    assert texts(row, columns=columns, prompt_template="[{level}] {problem}") == ["[4] 2 * 3", " 6"]
    with pytest.raises(DataError, match="no column 'task'; columns: problem, solution, level"):
        texts(row, columns={"question": "task"})


def test_braces_are_written_twice() -> None:
    assert texts({"question": "x", "answer": "y"}, prompt_template="{{{question}}}")[0] == "{x}"


def test_a_field_that_is_not_there_is_told_with_those_that_are() -> None:
    with pytest.raises(
        DataError, match=r"rows:1: format\.prompt_template.*\{qestion\}.*fields: question, answer, reas"
    ):
        example(GSM8K, prompt_template="{qestion}")
    with pytest.raises(DataError, match=r"format\.answer_template.*\{final\}"):
        example({"question": "x", "answer": "no mark"}, answer_template=" {final}")


@pytest.mark.parametrize("template", ["{question", "{question!r}", "{question:>9}", "{}", "}"])
def test_templates_are_fields_and_text_only(template: str) -> None:
    with pytest.raises(ConfigError, match=r"format\.prompt_template"):
        Template(template, key="format.prompt_template")


@pytest.mark.parametrize("template", ["{question.__class__}", "{question[0]}"])
def test_templates_reach_into_nothing(template: str) -> None:
    with pytest.raises(DataError, match="is not there"):
        example(GSM8K, prompt_template=template)


@pytest.mark.parametrize("value", [None, ["a"], {"a": 1}])
def test_a_field_must_be_text(value: object) -> None:
    with pytest.raises(DataError, match=r"rows:1: the field .question. .*must be text"):
        example({"question": value, "answer": "x"})


def test_columns_that_make_no_example_are_listed_with_what_would() -> None:
    with pytest.raises(DataError, match=r"columns: title, body.*prompt and completion.*format\.prompt_template"):
        example({"title": "x", "body": "y"})


@pytest.mark.parametrize(("weight", "taken"), [(0.5, 0.5), ("2", 2.0), (3, 3.0), (None, 1.0), ([1, 0.5], (1.0, 0.5))])
def test_weights(weight: object, taken: float | tuple[float, ...]) -> None:
    assert example({**GSM8K, "weight": weight}).segments[1].weights == taken


@pytest.mark.parametrize("weight", [-1, "much", float("nan"), float("inf"), True, [1, "x"], [1, None], {}.__class__])
def test_weights_that_are_none(weight: object) -> None:
    with pytest.raises(DataError, match="rows:1: a weight must be a number from 0"):
        example({**GSM8K, "weight": weight})
