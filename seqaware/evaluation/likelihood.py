"""How likely a model holds each of the choices, every choice once, with the ranks in step."""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Sequence
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from seqaware.data.questions import Question
from seqaware.engine.inference import AnsweringModel, bytes_per_row
from seqaware.evaluation.rounds import BatchSize, Leaving, in_rounds, left_padded

Pair = tuple[tuple[int, ...], tuple[int, ...]]
"""Ids of a prompt, and of what follows it."""


def log_likelihoods(
    model: AnsweringModel,
    questions: Sequence[Question],
    *,
    tokenizer: PreTrainedTokenizerBase,
    batch_size: int | None,
    leaving: Leaving,
) -> list[list[float]] | None:
    """log p(choice | prompt) in nats, for each choice of each question, on every rank. Collective.

    Returns:
        None where the run leaves before the end.
    """
    pairs: list[Pair] = [(question.prompt_ids, choice.ids) for question in questions for choice in question.choices]
    lengths = [len(prompt) + len(choice) for prompt, choice in pairs]
    kept = 1 + max(len(choice) for _, choice in pairs) if _keeps_logits(model) else max(lengths)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id

    def cost(longest: int) -> int:
        return bytes_per_row(model.model, positions=longest, new_tokens=0, logits=min(kept, longest))

    def weigh(together: Sequence[Pair]) -> list[float]:
        return _log_likelihoods(model, together, pad=pad)

    batch = BatchSize(model, cost, fixed=batch_size)
    values = in_rounds(weigh, pairs, lengths, model=model, batch=batch, leaving=leaving)
    if values is None:
        return None
    ordered = iter(values)
    return [list(itertools.islice(ordered, len(each.choices))) for each in questions]


@torch.no_grad()
def _log_likelihoods(model: AnsweringModel, pairs: Sequence[Pair], *, pad: int) -> list[float]:
    longest = max(len(choice) for _, choice in pairs)
    ids, mask = left_padded([prompt + choice for prompt, choice in pairs], pad, model.ranks.device)
    keep = {"logits_to_keep": longest + 1} if _keeps_logits(model) else {}
    answering: Any = model.model
    # Padded places count no position: every row is what it would be alone.
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    logits_RTV = answering(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False, **keep).logits
    found = []
    for row, (_, choice) in enumerate(pairs):
        # The place before a token is the one that predicts it.
        log_p = torch.log_softmax(logits_RTV[row, -len(choice) - 1 : -1].float(), dim=-1)
        wanted = torch.tensor(choice, device=log_p.device)
        found.append(float(log_p.gather(1, wanted[:, None]).sum(dtype=torch.float64)))
    return found


def _keeps_logits(model: AnsweringModel) -> bool:
    return "logits_to_keep" in inspect.signature(model.model.forward).parameters
