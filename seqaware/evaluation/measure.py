"""The answers to held-out questions, as `evaluation` in the config asks for them, each judged."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from seqaware.config.dataset_config import EvaluationConfig
from seqaware.data.questions import Question
from seqaware.engine.inference import AnsweringModel
from seqaware.evaluation.generate import generate_texts
from seqaware.evaluation.likelihood import log_likelihoods
from seqaware.evaluation.rounds import Leaving
from seqaware.evaluation.sampling import Decoding
from seqaware.evaluation.scores import Answer, judge_choices, judge_text


def decoding_of(config: EvaluationConfig) -> Decoding:
    """How the config wants tokens chosen."""
    return Decoding(config.max_new_tokens, config.temperature, config.top_p, config.seed, tuple(config.stop))


def answer_questions(
    model: AnsweringModel,
    questions: Sequence[Question],
    *,
    tokenizer: PreTrainedTokenizerBase,
    config: EvaluationConfig,
    leaving: Leaving,
) -> list[Answer] | None:
    """Every question answered once and judged, in their order, on every rank. Collective.

    Returns:
        None where the run leaves before the end.
    """
    if config.metric == "choice_likelihood":
        weighed = log_likelihoods(model, questions, tokenizer=tokenizer, batch_size=config.batch_size, leaving=leaving)
        if weighed is None:
            return None
        return [judge_choices(each, values) for each, values in zip(questions, weighed, strict=True)]
    texts = generate_texts(
        model,
        questions,
        tokenizer=tokenizer,
        decoding=decoding_of(config),
        batch_size=config.batch_size,
        leaving=leaving,
    )
    if texts is None:
        return None
    pairs = zip(questions, texts, strict=True)
    return [judge_text(each, text, metric=config.metric, pattern=config.pattern) for each, text in pairs]


def write_answers_file(answers: Sequence[Answer], path: Path) -> None:
    """One JSON object a line: prompt, what is right, what the model said, whether it is right."""
    lines = (json.dumps(answer.as_json(), ensure_ascii=False) + "\n" for answer in answers)
    path.write_text("".join(lines), encoding="utf-8")
