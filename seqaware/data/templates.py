"""From a row's fields to the text of an example, and which of it carries loss.

Fields for templates: every column, and what is derived from them:

    question    `question_stem`, where the data calls it so (OpenBookQA)
    answer      the first of `answers` (SQuAD), or `answerKey` (OpenBookQA)
    reasoning   the answer before `####`                 final   what follows it (GSM8K)
    choices     one a line, as `A) …`                    choice  the text of the right one
"""

from __future__ import annotations

import math
import string
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from seqaware.errors import ConfigError, DataError

FINAL_MARK = "####"
_CHOICES = "wanted: choices as a list of texts, or as {text: […], label: […]}; dataset.columns renames"
SHAPES = "messages; prompt and completion; question and answer; text; or any columns with format.prompt_template"

# Of float32, in which weights are kept.
_LARGEST_WEIGHT = 3.4e38


@dataclass(frozen=True, slots=True)
class Segment:
    """A text that is tokenised by itself.

    Attributes:
        supervised: its tokens carry loss.
        turn: it is what the model would say, so its first token starts a turn.
        weights: factor of the loss of all its tokens, or one for each token.
    """

    text: str
    supervised: bool
    turn: bool = False
    weights: float | tuple[float, ...] = 1.0


@dataclass(frozen=True, slots=True)
class Example:
    """What is tokenised for one row.

    Attributes:
        opening: the special tokens at the front: `tokenizer` (what the tokenizer itself puts there), `separator`
            (BOS if there is one, so that the first token of plain text is predicted too) or `none` (a chat template
            has written them).
        ends: the example is complete, so that EOS may follow.
    """

    segments: tuple[Segment, ...]
    opening: Literal["tokenizer", "separator", "none"]
    ends: bool = True


class Template:
    """Text with {fields}; `{{` and `}}` stand for braces.

    Raises:
        ConfigError: it is malformed, or asks for more than fields ({answer:>3}, {answer!r}).
    """

    def __init__(self, text: str, *, key: str) -> None:
        self.key = key
        try:
            parsed = list(string.Formatter().parse(text))
        except ValueError as error:
            raise ConfigError(f"{key} is not a template: {error}", got=repr(text), do="write {{ for a brace") from error
        for _, field, spec, conversion in parsed:
            if field == "" or spec or conversion:
                raise ConfigError(f"{key} may hold plain {{fields}} only", got=repr(text), do="write {{ for a brace")
        self._parts = [(literal, field) for literal, field, _, _ in parsed]

    @property
    def fields(self) -> list[str]:
        """The names of the fields, in their order."""
        return [field for _, field in self._parts if field is not None]

    def render(self, fields: Mapping[str, Any], name: str) -> str:
        """The text with the fields of the record `name`.

        Raises:
            DataError: a field is not there, or has no value.
        """
        pieces = []
        for literal, field in self._parts:
            pieces.append(literal)
            if field is not None:
                pieces.append(_text(fields, field, name=name, of=self.key))
        return "".join(pieces)


@dataclass(frozen=True)
class Format:
    """How examples are made; the fields of `FormatConfig` that decide text, and the data's own names of fields."""

    prompt_template: str | None
    answer_template: str
    train_on: Literal["completion", "all"] | None
    columns: Mapping[str, str]


class Renderer:
    """Rows without messages to examples. (`chat.py` renders messages.)"""

    def __init__(self, form: Format) -> None:
        self._form = form
        self._answer = Template(form.answer_template, key="format.answer_template")
        self._prompt = None
        if form.prompt_template is not None:
            self._prompt = Template(form.prompt_template, key="format.prompt_template")

    def wants_messages(self, fields: Mapping[str, Any]) -> bool:
        """Whether this row is a conversation."""
        return self._prompt is None and fields.get("messages") is not None

    def _prompt_text(self, fields: Mapping[str, Any], name: str) -> str | None:
        """The text before the completion; None for plain text."""
        if self._prompt is not None:
            return self._prompt.render(fields, name)
        if "prompt" in fields and "completion" in fields:
            return _text(fields, "prompt", name=name, of="the prompt")
        if "question" in fields and "answer" in fields:
            return _default_prompt(fields).render(fields, name)
        return None

    def example(self, fields: Mapping[str, Any], name: str) -> Example:
        """The example of the record `name`.

        Raises:
            DataError: the row has none of the shapes we know, or a field or weight cannot be used.
        """
        weights = example_weights(fields, name)
        prompt = self._prompt_text(fields, name)
        if prompt is None:
            return self._plain_text(fields, weights, name)
        if self._prompt is None and "completion" in fields and "prompt" in fields:
            completion = _text(fields, "completion", name=name, of="the completion")
        else:
            completion = self._answer.render(fields, name)
        whole = self._form.train_on == "all"
        prompt_weights = weights if isinstance(weights, float) else 1.0
        return Example(
            (Segment(prompt, whole, False, prompt_weights), Segment(completion, True, True, weights)), "tokenizer"
        )

    def choices(self, row: Mapping[str, Any], name: str) -> list[tuple[str, str, str]]:
        """Of a question with choices: (label, text, the completion that says it), in their order.

        Raises:
            DataError: the row has no choices.
        """
        fields = fields_of(row, self._form.columns, name)
        labelled = labelled_choices(row.get(self._form.columns.get("choices", "choices")))
        if not labelled:
            raise DataError(f"{name}: there are no choices", got=f"columns: {', '.join(row)}", do=_CHOICES)
        return [
            (label, text, self._answer.render({**fields, "answer": label, "choice": text}, name))
            for label, text in labelled
        ]

    def _plain_text(self, fields: Mapping[str, Any], weights: float | tuple[float, ...], name: str) -> Example:
        if "text" not in fields:
            there = ", ".join(fields)
            raise DataError(
                f"{name}: no columns that make an example",
                got=f"columns: {there}",
                do=f"wanted: {SHAPES}; dataset.columns renames, as in {{question: problem}}",
            )
        if self._form.train_on == "completion":
            do = "write format.train_on: all, or a format.prompt_template"
            raise DataError(f"{name}: plain text has no completion to train on", do=do)
        text = _text(fields, "text", name=name, of="the text")
        return Example((Segment(text, True, False, weights),), "separator")


def fields_of(row: Mapping[str, Any], columns: Mapping[str, str], name: str) -> dict[str, Any]:
    """A row's columns, renamed and completed by the derived fields.

    Raises:
        DataError: a column that `columns` names is not there.
    """
    fields = dict(row)
    for field, column in columns.items():
        if column not in row:
            raise DataError(f"{name}: there is no column {column!r}", do=f"columns: {', '.join(row)}")
        fields[field] = row[column]
    if "question" not in fields and "question_stem" in fields:
        fields["question"] = fields["question_stem"]
    if "answer" not in fields and isinstance(fields.get("answers"), Mapping):
        texts = fields["answers"].get("text")
        if isinstance(texts, Sequence) and not isinstance(texts, str):
            fields["answer"] = texts[0] if texts else ""
    if "answer" not in fields and "answerKey" in fields:
        fields["answer"] = fields["answerKey"]
    if "choices" in fields:
        labelled = labelled_choices(fields["choices"])
        if labelled:
            fields["choices"] = "\n".join(f"{label}) {text}" for label, text in labelled)
            right = [text for place, (label, text) in enumerate(labelled) if fields.get("answer") in (label, place)]
            fields.update({"choice": right[0]} if right and "choice" not in row else {})
    answer = fields.get("answer")
    if isinstance(answer, str) and FINAL_MARK in answer:
        reasoning, _, final = answer.rpartition(FINAL_MARK)
        fields.setdefault("reasoning", reasoning.strip())
        fields.setdefault("final", final.strip())
    return fields


def example_weights(fields: Mapping[str, Any], name: str) -> float | tuple[float, ...]:
    """The `weight` column: a number for all tokens, or a list with one for each token of the completion.

    Raises:
        DataError: it is neither, or negative, or not finite.
    """
    value = fields.get("weight")
    if value is None:
        return 1.0
    if isinstance(value, Iterable) and not isinstance(value, str):
        return tuple(checked_weight(each, name) for each in value)
    return checked_weight(value, name)


def checked_weight(value: object, name: str) -> float:
    """A weight as a number; text that spells one counts, since CSV files have nothing else."""
    if isinstance(value, int | float | str) and not isinstance(value, bool):
        try:
            weight = float(value)
        except (ValueError, OverflowError):
            weight = math.nan
        if 0 <= weight <= _LARGEST_WEIGHT:  # nor NaN
            return weight
    raise DataError(f"{name}: a weight must be a number from 0 to {_LARGEST_WEIGHT:.1e}", got=repr(value)[:80])


def _default_prompt(fields: Mapping[str, Any]) -> Template:
    context = "Context: {context}\n" if fields.get("context") is not None else ""
    choices = "{choices}\n" if fields.get("choices") is not None else ""
    return Template(f"{context}Question: {{question}}\n{choices}Answer:", key="the default prompt")


def labelled_choices(value: Any) -> list[tuple[str, str]]:
    """(label, text) of OpenBookQA's {text: […], label: […]}, or of a list of texts; empty for anything else."""
    match value:
        case {"text": [*texts], "label": [*labels]} if len(texts) == len(labels):
            return [(str(label), str(text)) for label, text in zip(labels, texts, strict=True)]
        case [*texts] if 0 < len(texts) <= len(string.ascii_uppercase):
            return [(label, str(text)) for label, text in zip(string.ascii_uppercase, texts, strict=False)]
        case _:
            return []


def _text(fields: Mapping[str, Any], field: str, *, name: str, of: str) -> str:
    if field not in fields:
        raise DataError(f"{name}: {of} names a field {{{field}}} that is not there", do=f"fields: {', '.join(fields)}")
    value = fields[field]
    if isinstance(value, str):
        return value
    if isinstance(value, int | float):
        return str(value)
    raise DataError(f"{name}: the field {field!r} of {of} must be text", got=repr(value)[:80])
