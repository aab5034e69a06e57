"""Answers written by the model, every question once, with the ranks in step."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessorList,
    PreTrainedTokenizerBase,
    StoppingCriteria,
    StoppingCriteriaList,
)

from seqaware.data.questions import Question
from seqaware.engine.inference import AnsweringModel, bytes_per_row
from seqaware.evaluation.rounds import BatchSize, Leaving, in_rounds, left_padded
from seqaware.evaluation.sampling import Decoding, Draw, Trace


def generate_texts(
    model: AnsweringModel,
    questions: Sequence[Question],
    *,
    tokenizer: PreTrainedTokenizerBase,
    decoding: Decoding,
    batch_size: int | None,
    leaving: Leaving,
) -> list[str] | None:
    """What the model writes behind each prompt, in the questions' order, on every rank. Collective.

    Args:
        batch_size: prompts answered at once on a rank; None: as many as memory allows.

    Returns:
        None where the run leaves before the end.
    """

    def cost(longest: int) -> int:
        return bytes_per_row(model.model, positions=longest, new_tokens=decoding.max_new_tokens)

    def write(together: Sequence[Question]) -> list[str]:
        return write_answers(model, together, tokenizer=tokenizer, decoding=decoding)

    lengths = [len(question.prompt_ids) for question in questions]
    batch = BatchSize(model, cost, fixed=batch_size)
    return in_rounds(write, questions, lengths, model=model, batch=batch, leaving=leaving)


@torch.no_grad()
def write_answers(
    model: AnsweringModel,
    questions: Sequence[Question],
    *,
    tokenizer: PreTrainedTokenizerBase,
    decoding: Decoding,
    trace: Trace | None = None,
) -> list[str]:
    """One batch. What ends an answer (the end of the sequence, a stop text) is not part of it."""
    ends = _ends(model, tokenizer)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else ends[0]
    ids, mask = left_padded([question.prompt_ids for question in questions], pad, model.ranks.device)
    how = GenerationConfig(
        max_new_tokens=decoding.max_new_tokens,
        do_sample=False,
        use_cache=True,
        pad_token_id=pad,
        eos_token_id=ends,
    )
    draw = Draw(decoding, [question.name for question in questions], trace=trace)
    answering: Any = model.model
    with _without_defaults(answering):
        output = answering.generate(
            input_ids=ids,
            attention_mask=mask,
            generation_config=how,
            logits_processor=LogitsProcessorList([draw]),
            stopping_criteria=StoppingCriteriaList([_Stops(decoding.stop, tokenizer, ids.shape[1])]),
            synced_gpus=model.in_step,
        )
    return [_text(row, ends, tokenizer, decoding.stop) for row in output[:, ids.shape[1] :].tolist()]


class _Stops(StoppingCriteria):
    """Whether each row has written a stop text. Only the end is read, as far as a stop text can reach."""

    def __init__(self, stop: Sequence[str], tokenizer: PreTrainedTokenizerBase, prompt: int) -> None:
        self._stop, self._tokenizer, self._prompt = stop, tokenizer, prompt
        # A token is a byte at least, and a character four bytes at most.
        self._reach = 4 * max(map(len, stop), default=0) + 1

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: Any) -> Tensor:
        del scores, kwargs
        done = torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)
        if not self._stop:
            return done
        tails = self._tokenizer.batch_decode(input_ids[:, self._prompt :][:, -self._reach :], skip_special_tokens=True)
        return done | torch.tensor([any(words in tail for words in self._stop) for tail in tails]).to(done)


@contextmanager
def _without_defaults(model: Any) -> Iterator[None]:
    """Inside, the model has no generation config of its own, whose penalties and temperatures would be mixed in."""
    own, model.generation_config = model.generation_config, GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = own


def _ends(model: AnsweringModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The ids that end an answer: the tokenizer's, and those that the model itself names (the end of a chat's turn)."""
    named = getattr(model.model.generation_config, "eos_token_id", None)
    others = named if isinstance(named, list) else [] if named is None else [named]
    return list(dict.fromkeys([tokenizer.eos_token_id, *others]))


def _text(row: list[int], ends: list[int], tokenizer: PreTrainedTokenizerBase, stop: Sequence[str]) -> str:
    end = next((place for place, token in enumerate(row) if token in ends), len(row))
    text = str(tokenizer.decode(row[:end], skip_special_tokens=True))
    for words in stop:
        text = text.partition(words)[0]
    return text
