"""Examples to tokens: what stands where, which tokens carry loss, and what becomes of examples that are too long."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from seqaware.config.schema import Config
from seqaware.data.encode import ExampleEncoder, Outcome, Recipe
from seqaware.data.encode_pool import encode_records
from seqaware.data.sources import Record
from seqaware.data.tokenization import recipe_of
from seqaware.errors import DataError
from tests.small_tokenizers import byte_level, with_dummy_space

GSM8K = {"question": "Tom has 12 apples", "answer": "12+30=42\n#### 42"}
PROMPT = "Question: Tom has 12 apples\nAnswer:"
COMPLETION = " 12+30=42\n#### 42"


def recipe(tokenizer: PreTrainedTokenizerFast, *, max_seq_length: int = 512, **form: Any) -> Recipe:
    config = Config.model_validate({"model": {"base_name": "x"}, "dataset": {"name": "x"}, "format": form})
    return recipe_of(config.dataset, config=config, tokenizer=tokenizer, max_seq_length=max_seq_length)


def encode(
    row: dict[str, Any], tokenizer: PreTrainedTokenizerFast | None = None, *, max_seq_length: int = 512, **form: Any
) -> Outcome:
    made = recipe(tokenizer or byte_level(), max_seq_length=max_seq_length, **form)
    return ExampleEncoder(made).encode([Record(row, "rows", 1)])


def plain(tokenizer: PreTrainedTokenizerFast, text: str) -> list[int]:
    return list(tokenizer.encode(text, add_special_tokens=False))


def test_prompt_and_completion_are_tokenised_apart_and_eos_ends_them() -> None:
    tokenizer = byte_level()
    block = encode(GSM8K).block
    prompt, completion = plain(tokenizer, PROMPT), plain(tokenizer, COMPLETION)
    assert block.tokens.tolist() == [*prompt, *completion, tokenizer.eos_token_id]
    assert block.supervised.tolist() == [False] * len(prompt) + [True] * (len(completion) + 1)
    assert np.flatnonzero(block.turn_start).tolist() == [len(prompt)]
    assert block.weights is None
    assert block.counted is None


def test_eos_is_left_out_or_not_doubled() -> None:
    tokenizer = byte_level()
    completion = plain(tokenizer, COMPLETION)
    assert encode(GSM8K, append_eos=False).block.tokens.tolist()[-len(completion) :] == completion
    ended = {**GSM8K, "answer": GSM8K["answer"] + "<|end|>"}
    assert encode(ended).block.tokens.tolist() == encode(GSM8K).block.tokens.tolist()


def test_what_the_tokenizer_puts_in_front_is_there_once() -> None:
    tokenizer = byte_level(adds_bos=True, adds_eos=True)
    block = encode(GSM8K, tokenizer).block
    assert block.tokens.tolist() == [1, *plain(tokenizer, PROMPT), *plain(tokenizer, COMPLETION), 0]
    written = encode(GSM8K, tokenizer, prompt_template="<|begin|>Question: {question}\nAnswer:").block
    assert written.tokens.tolist() == block.tokens.tolist()
    assert written.supervised.tolist() == block.supervised.tolist()


@pytest.mark.parametrize(("has_bos", "opening"), [(True, [1]), (False, [])])
def test_plain_text_stands_behind_bos_so_that_its_first_token_is_predicted(has_bos: bool, opening: list[int]) -> None:
    tokenizer = byte_level(has_bos=has_bos)
    block = encode({"text": "hello world"}, tokenizer).block
    assert block.tokens.tolist() == [*opening, *plain(tokenizer, "hello world"), tokenizer.eos_token_id]
    assert block.supervised.all()
    assert not block.turn_start.any()


def test_a_completion_has_no_space_that_is_not_in_the_text() -> None:
    tokenizer = with_dummy_space()
    row = {"prompt": "12+30=", "completion": "42"}
    joint = tokenizer.encode("12+30=42")
    block = encode(row, tokenizer).block
    assert tokenizer.decode(block.tokens, skip_special_tokens=True) == "12+30=42"
    # By itself the completion would have begun with a space.
    assert tokenizer.convert_ids_to_tokens(plain(tokenizer, "42"))[0].startswith("\u2581")
    assert block.tokens.tolist()[:-1] == joint
    spaced = encode({"prompt": "Answer:", "completion": " 42"}, tokenizer).block
    assert tokenizer.decode(spaced.tokens, skip_special_tokens=True) == "Answer: 42"


def test_weights_of_an_example_and_of_its_tokens() -> None:
    tokenizer = byte_level()
    prompt, completion = plain(tokenizer, PROMPT), plain(tokenizer, COMPLETION)
    whole = encode({**GSM8K, "weight": 0.5}).block
    assert whole.weights is not None
    assert whole.weights[whole.supervised].tolist() == [0.5] * (len(completion) + 1)
    each = [0.0, *(1.0 + i for i in range(len(completion) - 1))]
    for listed in (each, [*each, 1.0]):  # with or without one for EOS, whose weight else is 1
        block = encode({**GSM8K, "weight": listed}).block
        assert block.weights is not None
        assert block.weights[len(prompt) :].tolist() == [*each, 1.0]
        # A token of weight 0 carries no loss, so it does not count.
        assert np.flatnonzero(block.supervised)[0] == len(prompt) + 1
    with pytest.raises(DataError, match=rf"rows:1.*got 2 weights for {len(completion)} tokens"):
        encode({**GSM8K, "weight": [1.0, 2.0]})


def test_weights_of_plain_text_leave_the_separator_alone() -> None:
    tokenizer = byte_level(has_bos=True)
    own = len(plain(tokenizer, "hello"))
    block = encode({"text": "hello", "weight": [0.5] * own}, tokenizer).block
    assert block.weights is not None
    assert block.weights.tolist() == [1.0, *[0.5] * own, 1.0]


def test_an_example_of_weight_zero_is_dropped_and_named() -> None:
    outcome = encode({**GSM8K, "weight": 0})
    assert outcome.dropped == [("rows:1", "no supervised token")]
    assert len(outcome.block.lengths) == 0


def test_empty_texts_are_dropped_and_named() -> None:
    assert encode({"text": ""}).dropped == [("rows:1", "empty")]


def test_truncate_keeps_the_front() -> None:
    full = encode(GSM8K).block.tokens.tolist()
    outcome = encode(GSM8K, max_seq_length=len(full) - 3)
    assert outcome.block.tokens.tolist() == full[:-3]
    assert outcome.truncated == 1
    assert encode(GSM8K, max_seq_length=len(full)).truncated == 0
    no_completion = encode(GSM8K, max_seq_length=len(plain(byte_level(), PROMPT)))
    assert (no_completion.dropped, no_completion.truncated) == ([("rows:1", "no supervised token")], 1)


def test_drop_and_error() -> None:
    assert encode(GSM8K, max_seq_length=10, on_overlong="drop").dropped == [("rows:1", "longer than max_seq_length")]
    with pytest.raises(DataError, match=r"rows:1: longer than 10 tokens; got \d+ tokens"):
        encode(GSM8K, max_seq_length=10, on_overlong="error")


def test_split_keeps_every_supervised_token() -> None:
    whole = encode(GSM8K).block
    outcome = encode(GSM8K, max_seq_length=8, on_overlong="split")
    block = outcome.block
    assert outcome.split == 1
    assert block.counted is not None
    begins = np.cumsum([0, *block.lengths[:-1]])
    # Pieces of the prompt alone carry no loss: they are dropped, and counted.
    assert len(outcome.dropped) + len(block.lengths) == -(-(len(whole.tokens) - 1) // 7)
    assert {reason for _, reason in outcome.dropped} == {"piece without a supervised token"}
    seen = []
    for begin, length, counted in zip(begins, block.lengths, block.counted, strict=True):
        first = int(counted[1])
        np.testing.assert_array_equal(block.tokens[begin : begin + length], whole.tokens[first : first + length])
        assert not block.supervised[begin]
        seen += [first + i for i in range(1, length) if block.supervised[begin + i]]
        assert counted[3] == whole.supervised.sum()
    assert seen == np.flatnonzero(whole.supervised).tolist()
    assert int(block.turn_start.sum()) <= 1


@settings(deadline=None, max_examples=40)
@given(
    answers=st.lists(st.text("ab 0123\n", max_size=40), min_size=1, max_size=6),
    max_seq_length=st.integers(2, 60),
    on_overlong=st.sampled_from(["truncate", "drop", "split"]),
)
def test_a_chunk_is_the_sum_of_its_records(answers: list[str], max_seq_length: int, on_overlong: str) -> None:
    made = recipe(byte_level(), max_seq_length=max_seq_length, on_overlong=on_overlong)
    encoder = ExampleEncoder(made)
    records = [Record({"question": "q", "answer": text}, "rows", i) for i, text in enumerate(answers)]
    together = encoder.encode(records)
    single = [encoder.encode([record]) for record in records]
    assert together.block.tokens.tolist() == [token for one in single for token in one.block.tokens.tolist()]
    assert together.block.supervised.tolist() == [flag for one in single for flag in one.block.supervised.tolist()]
    assert together.block.rows.tolist() == [row for one in single for row in one.block.rows.tolist()]
    assert together.dropped == [each for one in single for each in one.dropped]
    assert together.truncated == sum(one.truncated for one in single)
    assert (together.block.lengths <= max_seq_length).all()


def test_long_texts_are_tokenised_in_batches_and_longer_ones_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    records = [Record({"text": text}, "rows", row) for row, text in enumerate(["ab 01" * n for n in range(1, 9)])]
    encoder = ExampleEncoder(recipe(byte_level()))
    whole = encoder.encode(records).block.tokens.tolist()
    monkeypatch.setattr("seqaware.data.encode.TEXT_BYTES", 40)
    assert encoder.encode(records).block.tokens.tolist() == whole
    for text in ("x" * 41, "é" * 21, "\U0001f642" * 11):
        with pytest.raises(DataError, match=r"rows:9: an example may have .* MiB of text; got 4[124] bytes"):
            encoder.encode([*records, Record({"text": text}, "rows", 9)])


def test_chunks_of_long_records_are_small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("seqaware.data.encode_pool.TEXT_BYTES", 40)
    made = recipe(byte_level(), max_seq_length=9, train_on="all")
    rows: list[dict[str, Any]] = [{"text": "a" * 30, "other": [{"b": "c" * 30}, 1]}, {"text": "a" * 30}, {"text": "b"}]
    records = [Record(row, "rows", number) for number, row in enumerate([*rows, *rows])]
    assert [count for count, _ in encode_records(made, records, workers=1)] == [1, 3, 2]


def test_a_recipe_without_conversations_never_unpickles_the_tokenizer() -> None:
    broken = dataclasses.replace(recipe(byte_level()), chat_tokenizer=b"not a pickle")
    assert len(ExampleEncoder(broken).encode([Record(GSM8K, "rows", 1)]).block.lengths) == 1
