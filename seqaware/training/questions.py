"""Held-out rows as questions: the prompt's tokens and the answer that counts, read back from the token store."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from transformers import PreTrainedTokenizerBase

from seqaware.data.store import TokenStore
from seqaware.errors import DataError
from seqaware.training.answers import extract_answer


@dataclass(frozen=True)
class Question:
    """A held-out row as the model sees it: the prompt's token ids, and the reference's final answer."""

    name: str
    prompt_ids: tuple[int, ...]
    reference: str


def read_questions(store: TokenStore, tokenizer: PreTrainedTokenizerBase, answer_pattern: str) -> Iterator[Question]:
    """Prompts as they were tokenised for training: what comes before a document's first assistant turn.

    Raises:
        DataError: a row has no prompt, or its reference has no answer that the pattern finds.
    """
    pattern = re.compile(answer_pattern)
    for index in range(len(store)):
        document = store.document(index)
        starts = np.flatnonzero(document.turn_start)
        if starts.size == 0 or starts[0] == 0:
            raise DataError("evaluation.metric: exact_match needs rows with a prompt", got=document.name)
        prompt, completion = document.tokens[: starts[0]], document.tokens[starts[0] :]
        reference = extract_answer(str(tokenizer.decode(completion.tolist(), skip_special_tokens=True)), pattern)
        if reference is None:
            raise DataError(
                f"{document.name}: evaluation.answer_pattern finds no answer in this held-out row",
                got=answer_pattern,
                do="mend the pattern, or lengthen training.parameters.max_seq_length if the row was truncated",
            )
        yield Question(document.name, tuple(prompt.tolist()), reference)
