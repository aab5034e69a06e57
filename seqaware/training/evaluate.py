"""Held-out rows: the objective's loss over them, and answers generated and compared, every row exactly once.

All ranks stay in step whatever the rows: each takes part in the same number of forwards and generations, because under
ZeRO-3 every one of them is collective.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from seqaware.data.batch import Batch
from seqaware.engine.attention import standard_attention
from seqaware.engine.engine import Engine
from seqaware.objective.sums import NormalizeBy
from seqaware.training.answers import exact_match, extract_answer
from seqaware.training.questions import Question


@dataclass(frozen=True)
class Answer:
    """What the model wrote for a question and what was read out of it."""

    name: str
    generated: str
    answer: str | None
    reference: str
    correct: bool


Leaving = Callable[[], bool]
"""Collective: whether the run is asked to leave, which no long evaluation may hold up."""


def held_out_loss(
    engine: Engine, steps: Iterable[Sequence[Batch]], normalize_by: NormalizeBy, *, leaving: Leaving
) -> dict[str, Any] | None:
    """Over all held-out rows: loss weighted, unweighted and by position, accuracy. Collective; the same on every rank.

    Args:
        steps: this rank's micro-batches, the same number on every rank.

    Returns:
        None where the run leaves before the end.
    """
    total = None
    for batches in steps:
        if leaving():
            return None
        sums = engine.evaluate_step(batches)
        total = sums if total is None else total + sums
    assert total is not None, "no held-out batch"
    engine.ranks.sum(total.vector)
    return {**total.metrics(normalize_by), "by_position": total.positions()}


@dataclass(frozen=True)
class GenerationOptions:
    """Greedy decoding of at most max_new_tokens, batch_size prompts at a time on a rank."""

    max_new_tokens: int
    batch_size: int
    answer_pattern: str


def generate_answers(
    engine: Engine,
    questions: Sequence[Question],
    *,
    tokenizer: PreTrainedTokenizerBase,
    options: GenerationOptions,
    leaving: Leaving,
) -> list[Answer] | None:
    """Answer every question once, shared among the ranks; all answers in the questions' order, on every rank.

    None where the run leaves before the end.
    """
    ranks = engine.ranks
    # Prompts of a like length together: little padding. Dealt out in turn, so that the ranks' work is alike.
    order = sorted(range(len(questions)), key=lambda i: len(questions[i].prompt_ids))
    mine = order[ranks.rank :: ranks.size]
    rounds = math.ceil(math.ceil(len(questions) / ranks.size) / options.batch_size)
    texts: dict[int, str] = {}
    engine.deepspeed.eval()
    with standard_attention(engine.wrapped.model):
        for round_number in range(rounds):
            if leaving():
                return None
            indices = mine[round_number * options.batch_size :][: options.batch_size]
            # A rank that has run out generates for the first question again, only to stay in step.
            prompts = [questions[i].prompt_ids for i in indices] or [questions[0].prompt_ids]
            written = _generate(engine, prompts, tokenizer, options.max_new_tokens)
            texts.update(zip(indices, written, strict=False))
    merged = {index: text for part in ranks.gather(texts) for index, text in part.items()}
    assert len(merged) == len(questions), "a question was answered twice or never"
    pattern = re.compile(options.answer_pattern)
    return [_judge(question, merged[index], pattern) for index, question in enumerate(questions)]


def _judge(question: Question, text: str, pattern: re.Pattern[str]) -> Answer:
    answer = extract_answer(text, pattern)
    return Answer(question.name, text, answer, question.reference, exact_match(answer, question.reference))


@torch.no_grad()
def _generate(
    engine: Engine, prompts: Sequence[tuple[int, ...]], tokenizer: PreTrainedTokenizerBase, max_new_tokens: int
) -> list[str]:
    longest = max(map(len, prompts))
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    # Padded on the left, so that every prompt ends where its answer begins.
    ids = [[pad] * (longest - len(prompt)) + list(prompt) for prompt in prompts]
    mask = [[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts]
    device = engine.ranks.device
    model: Any = engine.wrapped.model
    output = model.generate(
        input_ids=torch.tensor(ids, device=device),
        attention_mask=torch.tensor(mask, device=device),
        max_new_tokens=max_new_tokens,
        do_sample=False,
        use_cache=True,
        pad_token_id=pad,
        eos_token_id=tokenizer.eos_token_id,
        synced_gpus=engine.ranks.size > 1,
    )
    written = output[:, longest:].tolist()
    return [str(tokenizer.decode(row, skip_special_tokens=True)) for row in written]


def accuracy(answers: Sequence[Answer]) -> float:
    """The share of correct answers."""
    return sum(answer.correct for answer in answers) / len(answers)


def as_lines(answers: Sequence[Answer]) -> list[dict[str, Any]]:
    """The answers as JSON objects, for `answers.jsonl`."""
    return [asdict(answer) for answer in answers]
