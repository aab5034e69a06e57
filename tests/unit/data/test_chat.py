"""Conversations: the assistant's part, and nothing else, carries loss."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from transformers import PreTrainedTokenizerFast

from seqaware.data.chat import InferenceTokenizer
from seqaware.data.encode import Outcome
from seqaware.errors import ConfigError, DataError
from tests.small_tokenizers import CHATML, CHATML_MARKED, FORGETFUL, PLAIN, byte_level
from tests.unit.data.test_encode import encode

TALK: list[dict[str, Any]] = [
    {"role": "system", "content": "the quick brown fox"},
    {"role": "user", "content": "hello"},
    {"role": "assistant", "content": "hello world"},
    {"role": "user", "content": "How many apples?"},
    {"role": "assistant", "content": "12+30=42"},
]


def encode_talk(messages: list[dict[str, Any]], template: str | None = CHATML, **form: Any) -> Outcome:
    return encode({"messages": messages}, byte_level(chat_template=template), **form)


def supervised_texts(outcome: Outcome, tokenizer: PreTrainedTokenizerFast) -> list[str]:
    """The texts of the runs of supervised tokens."""
    flags = outcome.block.supervised
    edges = np.flatnonzero(np.diff(np.concatenate([[False], flags, [False]]).astype(int)))
    return [tokenizer.decode(outcome.block.tokens[a:b]) for a, b in zip(edges[::2], edges[1::2], strict=True)]


@pytest.mark.parametrize("template", [CHATML, CHATML_MARKED])
def test_the_assistants_turns_carry_loss_up_to_what_closes_them(template: str) -> None:
    tokenizer = byte_level(chat_template=template)
    outcome = encode_talk(TALK, template)
    assert tokenizer.decode(outcome.block.tokens) == tokenizer.apply_chat_template(TALK, tokenize=False)
    assert supervised_texts(outcome, tokenizer) == ["hello world<|im_end|>", "12+30=42<|im_end|>"]
    starts = np.flatnonzero(outcome.block.turn_start)
    assert outcome.block.supervised[starts].all()
    assert not outcome.block.supervised[starts - 1].any()
    assert len(starts) == 2
    assert outcome.block.weights is None


def test_a_turn_begins_with_the_tokens_that_inference_begins_with() -> None:
    tokenizer = byte_level(chat_template=CHATML)
    asked = tokenizer.apply_chat_template(TALK[:2], tokenize=False, add_generation_prompt=True)
    block = encode_talk(TALK[:3]).block
    start = int(np.flatnonzero(block.turn_start)[0])
    assert block.tokens[:start].tolist() == tokenizer.encode(asked, add_special_tokens=False)


def test_the_configs_template_goes_before_the_tokenizers() -> None:
    tokenizer = byte_level(chat_template=CHATML)
    outcome = encode({"messages": TALK[1:3]}, tokenizer, chat_template=PLAIN)
    assert tokenizer.decode(outcome.block.tokens) == "user: hello\nassistant: hello world\n<|end|>"


def test_eos_ends_a_conversation_that_no_special_token_closes() -> None:
    outcome = encode_talk(TALK[1:3], PLAIN)
    assert supervised_texts(outcome, byte_level()) == ["hello world\n<|end|>"]
    asked_last = encode_talk([*TALK[1:3], TALK[3]], PLAIN)
    assert asked_last.block.tokens[-1] != byte_level().eos_token_id


def test_weights_of_messages() -> None:
    weighted = [*TALK[:2], {**TALK[2], "weight": 0}, TALK[3], {**TALK[4], "weight": 0.5}]
    outcome = encode_talk(weighted)
    assert supervised_texts(outcome, byte_level()) == ["12+30=42<|im_end|>"]
    assert outcome.block.weights is not None
    assert set(outcome.block.weights[outcome.block.supervised].tolist()) == {0.5}
    # A turn without loss is a turn all the same.
    assert len(np.flatnonzero(outcome.block.turn_start)) == 2


def test_null_weights_are_none() -> None:
    talk = [{**message, "weight": None} for message in TALK]
    assert encode_talk(talk).block.weights is None


def test_train_on_all_supervises_everything() -> None:
    assert encode_talk(TALK, train_on="all").block.supervised.all()


def test_a_prompt_template_goes_before_messages() -> None:
    row = {"messages": TALK, "question": "x", "answer": "y"}
    outcome = encode(row, byte_level(chat_template=CHATML), prompt_template="{question}")
    assert byte_level().decode(outcome.block.tokens) == "x y<|end|>"


def test_a_conversation_without_the_assistant_is_dropped() -> None:
    assert encode_talk(TALK[:2]).dropped == [("rows:1", "no supervised token")]


def test_a_template_that_rewrites_earlier_turns_is_refused() -> None:
    assert len(encode_talk(TALK[:3], FORGETFUL).block.lengths) == 1
    with pytest.raises(DataError, match=r"rows:1: the chat template rewrites earlier turns.*message 3 of 5"):
        encode_talk(TALK, FORGETFUL)


def test_no_template_at_all() -> None:
    with pytest.raises(ConfigError, match=r"tokenizer has none; write format\.chat_template"):
        encode_talk(TALK, None)


@pytest.mark.parametrize(
    ("messages", "said"),
    [
        ([], "must be a list"),
        ("hello", "must be a list"),
        ([{"role": "user"}], "needs role and content"),
        ([{"role": "user", "content": [{"type": "image"}]}], "content must be text"),
        ([{**TALK[1]}, {**TALK[2], "weight": -1}], "weight must be a number"),
    ],
)
def test_messages_that_are_none(messages: Any, said: str) -> None:
    with pytest.raises(DataError, match=f"rows:1: .*{said}"):
        encode_talk(messages)


@pytest.mark.parametrize(
    "template",
    ["{{ raise_exception('roles must alternate') }}", "{{ messages[7].content }}", "{% for x in messages %}"],
)
def test_what_the_template_refuses_is_told(template: str) -> None:
    with pytest.raises(DataError, match="rows:1: the chat template refuses the messages"):
        encode_talk(TALK, template)


LAST_TURN_APART = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}"
    "{% if loop.last %}<|end|>{% else %}<|im_end|>{% endif %}{% endfor %}"
)
WITHOUT_SYSTEM = "{% if messages[0].role != 'system' %}{{ raise_exception('no system prompt') }}{% endif %}" + CHATML


@pytest.mark.parametrize(
    ("template", "closed"),
    [
        (CHATML, ["<|im_end|>"]),
        (CHATML_MARKED, ["<|im_end|>"]),
        (PLAIN, []),  # EOS ends it, as in training
        (LAST_TURN_APART, []),  # an earlier turn's token would cut an answer of several parts
        (WITHOUT_SYSTEM, []),
        (None, []),
    ],
)
def test_an_answer_ends_at_eos_and_at_what_closes_the_last_turn(template: str | None, closed: list[str]) -> None:
    tokenizer = byte_level(chat_template=template)
    expected = tokenizer.convert_tokens_to_ids(["<|end|>", *closed])
    assert InferenceTokenizer.of(tokenizer, None).answer_ends == tuple(expected)
    assert InferenceTokenizer.of(byte_level(), template).answer_ends == tuple(expected)


def test_the_template_that_is_used_is_the_tokenizers_afterwards() -> None:
    def used(tokenizer: PreTrainedTokenizerFast, written: str | None) -> Any:
        return InferenceTokenizer.of(tokenizer, written).tokenizer

    tokenizer = byte_level(chat_template=CHATML)
    assert used(tokenizer, PLAIN).chat_template == PLAIN and tokenizer.chat_template == CHATML
    several = used(tokenizer, None)
    assert several.chat_template == CHATML
    several.chat_template = {"default": CHATML, "tool_use": FORGETFUL}
    assert used(several, PLAIN).chat_template == {"default": PLAIN, "tool_use": FORGETFUL}
    # A name among them is no template.
    assert used(several, "tool_use").get_chat_template() == FORGETFUL


def test_a_template_without_end_does_not_end_the_run() -> None:
    endless = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
    tokenizer = byte_level(chat_template=endless)
    assert InferenceTokenizer.of(tokenizer, None).answer_ends == (tokenizer.eos_token_id,)
