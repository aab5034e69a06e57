"""Held-out rows as questions: the prompt's tokens, as for training, and the answers that count."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerFast

from seqaware.config.dataset_config import DatasetConfig
from seqaware.config.schema import Config
from seqaware.data.answers import extract_answer
from seqaware.data.encode import ExampleEncoder, Prompt
from seqaware.data.sources import Record, open_source
from seqaware.data.store.store_index import prepared_store, sources_of
from seqaware.data.store.token_store import TokenStore
from seqaware.data.templates import Template
from seqaware.data.tokenization import empty_source, recipe_of
from seqaware.errors import ConfigError, DataError

# What gives the answer away, by the names that templates know.
_ANSWERS = ("answer", "answers", "answerKey", "final", "reasoning", "choice", "completion")


@dataclass(frozen=True)
class Choice:
    """One of the answers to choose from: its letter, its text, and the ids of the completion that says it."""

    label: str
    text: str
    ids: tuple[int, ...]


@dataclass(frozen=True)
class Question:
    """A held-out row: what the model is given, and the answers that are right, of which it must give one."""

    name: str
    prompt: str
    prompt_ids: tuple[int, ...]
    references: tuple[str, ...]
    choices: tuple[Choice, ...] = ()


def read_questions(config: Config, *, tokenizer: PreTrainedTokenizerFast, max_seq_length: int) -> list[Question]:
    """Every row of `evaluation.dataset`, in their order.

    Raises:
        ConfigError: the prompt's template names the answer.
        DataError: there are no rows, or one has no prompt or no answer that the metric can judge by.
    """
    dataset = config.evaluation.dataset
    assert dataset is not None, "the schema asks for rows where a metric does"
    prepared = prepared_store(dataset)
    if prepared is not None:
        store = TokenStore.open(prepared)
        store.verify_once()
        return list(_of_store(store, tokenizer, config))
    _check_no_leak(config, dataset)
    recipe = recipe_of(dataset, config=config, tokenizer=tokenizer, max_seq_length=max_seq_length)
    questions: list[Question] = []
    for each in sources_of(dataset):
        source = open_source(each, streaming=dataset.streaming)
        encoder = ExampleEncoder(replace(recipe, form=replace(recipe.form, columns=dict(each.columns))))
        before = len(questions)
        questions += [_of_record(record, encoder, each.columns, config=config) for record in source.records()]
        if len(questions) == before:
            raise empty_source(source.name)
    return questions


def check_lengths(questions: list[Question], config: Config, *, max_positions: int | None) -> None:
    """Refuse prompts that leave no room for their answers.

    Raises:
        ConfigError: prompt and answer together are longer than the model's positions.
    """
    if max_positions is None:
        return
    longest = max(len(question.prompt_ids) for question in questions)
    choices = [len(choice.ids) for question in questions for choice in question.choices]
    answer = max(choices) if config.evaluation.metric == "choice_likelihood" else config.evaluation.max_new_tokens
    room = max_positions - longest
    if room < answer:
        raise ConfigError(
            "evaluation.max_new_tokens: prompt and answer together are longer than the model can take",
            got=f"{answer} after a prompt of {longest} tokens, of {max_positions} in all",
            do=f"write at most {room}" if room > 0 and not choices else "shorten the held-out prompts",
        )


def _check_no_leak(config: Config, dataset: DatasetConfig) -> None:
    written = config.format.prompt_template
    if written is None:
        return
    columns = {part.columns.get(name, name) for part in sources_of(dataset) for name in _ANSWERS}
    named = [
        field for field in Template(written, key="format.prompt_template").fields if field in {*_ANSWERS, *columns}
    ]
    if named:
        raise ConfigError(
            f"format.prompt_template tells the model the answer, so evaluation.metric: {config.evaluation.metric} "
            "would measure nothing",
            got=f"the field {{{named[0]}}}",
            do="keep answers to format.answer_template",
        )


def _of_record(record: Record, encoder: ExampleEncoder, columns: Mapping[str, str], *, config: Config) -> Question:
    prompt = encoder.prompt(record)
    choices: tuple[Choice, ...] = ()
    metric = config.evaluation.metric
    match metric:
        case "squad":
            references = _spans(record, columns, prompt)
        case "choice" | "choice_likelihood":
            choices = tuple(Choice(*each) for each in encoder.choices(record))
            references = (_right_label(record, columns, choices),)
        case _:
            references = (_final_answer(record.name, prompt.completion, config),)
    return Question(record.name, prompt.text, prompt.ids, references, choices)


def _spans(record: Record, columns: Mapping[str, str], prompt: Prompt) -> tuple[str, ...]:
    """All answers that SQuAD's row holds right; of other rows, their completion."""
    answers = record.fields.get(columns.get("answers", "answers"))
    texts = answers.get("text") if isinstance(answers, Mapping) else answers
    found = tuple(str(text) for text in texts) if isinstance(texts, list) else ()
    return found or (prompt.completion.strip(),)


def _right_label(record: Record, columns: Mapping[str, str], choices: tuple[Choice, ...]) -> str:
    keys = [columns.get(name, name) for name in ("answer", "answerKey")]
    right: Any = next((record.fields[key] for key in keys if key in record.fields), None)
    label = choices[right].label if isinstance(right, int) and 0 <= right < len(choices) else right
    if label not in [choice.label for choice in choices]:
        do = f"wanted: one of {', '.join(choice.label for choice in choices)} (or its number from 0) as {keys[-1]}"
        raise DataError(f"{record.name}: none of the choices is said to be right", got=repr(right), do=do)
    return str(label)


def _final_answer(name: str, completion: str, config: Config) -> str:
    pattern = config.evaluation.pattern
    reference = extract_answer(completion, pattern)
    if reference is None:
        raise DataError(
            f"{name}: evaluation.answer_pattern finds no answer in this held-out row",
            got=pattern,
            do="mend the pattern, or lengthen training.parameters.max_seq_length if the row was truncated",
        )
    return reference


def _of_store(store: TokenStore, tokenizer: PreTrainedTokenizerFast, config: Config) -> Iterator[Question]:
    """From a prepared store, which has kept tokens and no columns: what comes before a document's first answer."""
    if config.evaluation.metric != "exact_match":
        got = f"metric: {config.evaluation.metric} with the prepared store {store.path}"
        raise ConfigError("a prepared store has no columns to judge by", got=got, do="name its source instead")
    for index in range(len(store)):
        document = store.document(index)
        starts = np.flatnonzero(document.turn_start)
        if starts.size == 0 or starts[0] == 0:
            raise DataError(f"{document.name}: there is no prompt to answer", do="evaluate rows with a question")
        ids, completion = (part.tolist() for part in np.split(document.tokens, starts[:1]))
        text = str(tokenizer.decode(completion, skip_special_tokens=True)).rstrip()
        reference = _final_answer(document.name, text, config)
        yield Question(document.name, str(tokenizer.decode(ids)), tuple(ids), (reference,))
