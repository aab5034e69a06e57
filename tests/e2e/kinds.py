"""Kinds of data a run may have: the rows, the settings, and the documents worked out by hand for the oracle."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from tests import tiny
from tests.oracles import OracleDocument, question_rows, suffix_weights

_CHAT_TEMPLATE = (
    "{% for message in messages %}{% if message.role == 'assistant' %}A: {% generation %}{{ message.content }} <eos>"
    "{% endgeneration %} {% else %}Q: {{ message.content }} {% endif %}{% endfor %}"
)
# Words in the assistant's turns of each conversation, and the weights of those turns.
_TURNS = (
    ((5,), (None,)),
    ((12, 3), (0.5, 2.0)),
    ((1, 30, 7), (None, 0.25, None)),
    ((4, 9), (0.0, 1.5)),
    ((22,), (3.0,)),
)
_TEXTS = (3, 150, 12, 77, 40, 1, 39, 118)
_PIECE = 40


@dataclass(frozen=True)
class Kind:
    """One kind of data.

    Attributes:
        changes: to the workshop's config. documents: for γ, each supervised token with its weight written out.
    """

    changes: dict[str, Any]
    documents: Callable[[float], list[OracleDocument]]


def kinds(workshop: tiny.Workshop) -> dict[str, Kind]:
    """Writes the rows beside the workshop's own."""
    tokenizer = AutoTokenizer.from_pretrained(workshop.model)
    rows = question_rows(workshop.rows, tokenizer)
    chats, texts = _write_chats(workshop.folder), _write_texts(workshop.folder)
    return {
        "questions": Kind({}, lambda gamma: rows),
        "places": Kind(
            {"training__sft__positions": "sequence"}, lambda gamma: [_weighted_by_place(row, gamma) for row in rows]
        ),
        "chat": Kind(
            {
                "dataset__name": str(chats),
                "format": {"chat_template": _CHAT_TEMPLATE},
                "training__sft__positions": "turn",
                "training__schedule__global_batch_size": len(_TURNS),
            },
            lambda gamma: [_conversation(line, tokenizer, gamma) for line in chats.read_text().splitlines()],
        ),
        "text": Kind(
            {
                "dataset__name": str(texts),
                "format": {"on_overlong": "split"},
                "training__parameters__max_seq_length": _PIECE,
                "training__schedule__global_batch_size": 100,
            },
            lambda gamma: [
                piece for line in texts.read_text().splitlines() for piece in _pieces(line, tokenizer, gamma)
            ],
        ),
    }


def _weighted_by_place(document: OracleDocument, gamma: float) -> OracleDocument:
    """k counts the prompt's predicted tokens as well."""
    by_place = suffix_weights(len(document.tokens) - 1, gamma)
    weights = [weight for weight, counts in zip(by_place, document.supervised[1:], strict=True) if counts]
    return replace(document, weights=weights)


def _write_chats(folder: Path) -> Path:
    choose = random.Random(1)
    lines = []
    for lengths, weights in _TURNS:
        messages = []
        for length, weight in zip(lengths, weights, strict=True):
            messages.append({"role": "user", "content": _words(choose, 4)})
            said: dict[str, Any] = {"role": "assistant", "content": _words(choose, length)}
            messages.append(said if weight is None else {**said, "weight": weight})
        lines.append(json.dumps({"messages": messages}))
    path = folder / "chats.jsonl"
    path.write_text("\n".join(lines) + "\n")
    return path


def _conversation(line: str, tokenizer: PreTrainedTokenizerBase, gamma: float) -> OracleDocument:
    """`Q: … A: … <eos>` for each turn; the assistant's words and what ends them carry loss, counted anew in each."""
    words: list[str] = []
    turn_of: list[tuple[int, float] | None] = []
    for number, message in enumerate(json.loads(line)["messages"]):
        said = message["content"].split()
        if message["role"] == "user":
            words += ["Q:", *said]
            turn_of += [None] * (1 + len(said))
            continue
        weight = message.get("weight", 1.0)
        words += ["A:", *said, "<eos>"]
        turn_of += [None, *[(number, weight) if weight else None] * (len(said) + 1)]
    weights = []
    for (_, weight), places in groupby(turn for turn in turn_of if turn):
        weights += [weight * w for w in suffix_weights(len(list(places)), gamma)]
    ids = tokenizer.convert_tokens_to_ids(words)
    return OracleDocument(ids, [turn is not None for turn in turn_of], weights)


def _write_texts(folder: Path) -> Path:
    choose = random.Random(2)
    path = folder / "texts.jsonl"
    path.write_text("".join(json.dumps({"text": _words(choose, length)}) + "\n" for length in _TEXTS))
    return path


def _pieces(line: str, tokenizer: PreTrainedTokenizerBase, gamma: float) -> list[OracleDocument]:
    """Each piece begins with the last token of the one before; every token but the first is predicted, and counted."""
    ids = tokenizer.convert_tokens_to_ids([*json.loads(line)["text"].split(), "<eos>"])
    weights = suffix_weights(len(ids) - 1, gamma)
    return [
        OracleDocument(
            ids[begin : begin + _PIECE], _all_but_first(ids[begin : begin + _PIECE]), weights[begin:][: _PIECE - 1]
        )
        for begin in range(0, len(ids) - 1, _PIECE - 1)
    ]


def _all_but_first(ids: Sequence[int]) -> list[bool]:
    return [False] + [True] * (len(ids) - 1)


def _words(choose: random.Random, count: int) -> str:
    return " ".join(choose.choices(tiny.WORDS, k=count))
