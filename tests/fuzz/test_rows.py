"""Hostile files of rows: a preview shows them as they would be trained on, or one error names the row."""

from __future__ import annotations

import csv
import gzip
import io
import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given
from hypothesis import strategies as st

import launcher.preview
from seqaware.config.loading import load_config
from seqaware.data.questions import read_questions
from seqaware.data.tokenization import load_tokenizer
from tests.fuzz import hostile
from tests.fuzz.bounds import corpus, ends_well, fuzzed, refuses_clearly
from tests.small_tokenizers import CHATML

ARGUMENTS = [
    *("train_configs/demo.yaml", "--set=dataset.store_dir=stores", "--set=evaluation.dataset=null"),
    *("--set=evaluation.metric=none", "--set=training.schedule={global_batch_size: 1, num_epochs: 1}"),
]
FORMATS = [
    [],
    ["--set=format.prompt_template=null"],
    ["--set=format.prompt_template=null", f"--set=format.chat_template={json.dumps(CHATML)}"],
    ["--set=format.prompt_template=null", "--set=format.train_on=null", "--set=format.on_overlong=split"],
    ["--set=format.prompt_template={question} {text}", "--set=dataset.columns={answer: completion}"],
    ["--set=dataset.max_examples=1", "--set=format.on_overlong=error"],
    ["--set=dataset.split=train[1:3]", "--set=format.on_overlong=drop"],
]
ROWS: list[dict[str, Any]] = [
    {"question": "At first Emil has 2 keys.", "answer": "2+1=3\n#### 3", "weight": 0.5},
    {"prompt": "a b", "completion": "c d"},
    {"text": "one two three"},
    {"messages": [{"role": "user", "content": "1"}, {"role": "assistant", "content": "2", "weight": 0}]},
    {"question_stem": "q", "choices": {"text": ["a", "b"], "label": ["A", "B"]}, "answerKey": "B"},
    {"context": "c", "question": "q", "answers": {"text": ["x", "y"], "answer_start": [1, 2]}},
]
KEYS = [
    *("question", "answer", "prompt", "completion", "text", "messages", "weight", "choices", "answers", "answerKey"),
    *("messages.0", "answers.text", "choices.text", "choices.label", "context", "question_stem", "final", "", "\0"),
]
MESSAGE_LISTS: list[Any] = [
    *([], [[]], {}, "x", [None], [{}], [{"role": "user"}], [{"role": "assistant", "content": "x"}]),
    *(
        [{"role": role, "content": "x"} for role in ("user", "user", "assistant", "tool")],
        [{"role": 1, "content": "x"}],
    ),
    [{"role": "user", "content": ["x"]}, {"role": "assistant", "content": None}],
    [{"role": "assistant", "content": "a" * 3000, "weight": [1, 2]}, {"role": "user", "content": "<|end|>"}],
    [{"role": "assistant", "content": "", "tool_calls": [{"a": 1}]}] * 20,
]
PIECES = [
    *("\0", "\ufeff", "\ud800", "\\ud800", "\r", "\n", "\n\n", "\u2028", "\x85", '"', "'", ",", "{", "}", "[", "]"),
    *("[" * 70, '{"a":' * 2000, "[" * 100_000, "9" * 5000, "1e999", "NaN", "-Infinity", "\x1b[2J", '{"question": 1}\n'),
    *("<|end|>", "<|pad|>" * 300, "x" * 100_000, "\n" * 100_002, " " * 40_000, "\t" * 500, "é🙂" * 900),
]
VALUES = st.one_of(
    hostile.values,
    st.sampled_from(MESSAGE_LISTS),
    st.lists(hostile.numbers, max_size=4),
    st.sampled_from(["a" * 200_000, "1" * 70_000, " " * 50_000, "\ud800", "<|end|>" * 500]),
)


@st.composite
def rows(draw: st.DrawFn) -> list[Any]:
    """Rows of known shapes with a few hostile values."""
    made: list[Any] = []
    for _ in range(draw(st.integers(1, 3))):
        changes = draw(st.lists(st.tuples(st.sampled_from(KEYS), VALUES), max_size=2))
        made.append(hostile.mutated(draw(st.sampled_from(ROWS)), changes))
    return made if draw(st.integers(0, 9)) else [*made, draw(hostile.values)]


def written(made: Sequence[Any], kind: str) -> bytes:
    """The rows as a file of a kind; what the kind cannot hold is turned into text."""
    if kind in ("jsonl", "json"):
        lines = [json.dumps(row) for row in made]
        text = "\n".join(lines) if kind == "jsonl" else f"[{', '.join(lines)}]"
        return text.encode("utf-8", "surrogatepass")
    table = [{str(key): value for key, value in row.items()} for row in made if isinstance(row, Mapping)]
    if kind in ("csv", "tsv", "txt"):
        stream = io.StringIO()
        out = csv.DictWriter(stream, sorted({*ROWS[0], *(key for row in table for key in row)}), dialect="excel")
        out.writeheader()
        out.writerows(table)
        return stream.getvalue().encode("utf-8", "surrogatepass")
    sink = io.BytesIO()
    try:
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(table), sink)
    except (pyarrow.ArrowException, UnicodeError, OverflowError, TypeError, ValueError):
        plain = [{"text": ascii(row)} for row in table]
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(plain), sink)
    return sink.getvalue()


@st.composite
def files(draw: st.DrawFn) -> tuple[str, bytes]:
    """The name and the content of a file of rows."""
    kind = draw(st.sampled_from(["jsonl", "jsonl", "jsonl", "json", "csv", "tsv", "txt", "parquet"]))
    content = written(draw(rows()), kind)
    match draw(st.integers(0, 5)):
        case 0:
            text = content.decode("latin-1" if kind == "parquet" else "utf-8", "surrogateescape")
            content = draw(hostile.damaged(text, PIECES))
        case 1 if kind == "parquet":
            at = draw(st.integers(0, len(content) - 1))
            content = content[:at] + draw(st.binary(max_size=4)) + content[at + draw(st.integers(0, 4)) :]
        case 2:
            return f"rows.{kind}.gz", draw(zipped(content))
    return f"rows.{kind}", content


@st.composite
def zipped(draw: st.DrawFn, content: bytes) -> bytes:
    """Compressed, at times cut off, changed, or with what expands a thousand times behind it."""
    bomb = draw(st.sampled_from([b"", b"", b"\n" + b"[" * 2**20, b'{"text": "' + b"a" * 2**23, b"\n" * 2**17]))
    packed = gzip.compress(content + bomb)
    at = draw(st.integers(0, len(packed)))
    return draw(st.sampled_from([packed, packed, packed[:at], packed[:at] + b"\0" + packed[at + 1 :], packed * 2]))


def preview(place: Path, name: str, content: bytes, options: Sequence[str]) -> str:
    """Show a file's rows; its token store is new each time."""
    shutil.rmtree(place / "stores", ignore_errors=True)
    (place / name).write_bytes(content)
    return ends_well(launcher.preview.app, [*ARGUMENTS, f"--set=dataset.name={name}", *options])


@fuzzed("rows")
@given(file=files(), options=st.sampled_from(FORMATS))
def test_hostile_rows_end_a_preview_well(place: Path, file: tuple[str, bytes], options: list[str]) -> None:
    preview(place, *file, options)


@fuzzed("questions")
@given(file=files(), metric=st.sampled_from(["exact_match", "squad", "choice", "choice_likelihood"]))
def test_hostile_rows_make_questions_or_an_error(place: Path, file: tuple[str, bytes], metric: str) -> None:
    name, content = file
    (place / name).write_bytes(content)
    changes = [f"evaluation.metric={metric}", f"evaluation.dataset.name={name}", "format.prompt_template=null"]
    config = load_config(place / "train_configs/demo.yaml", changes)
    tokenizer = load_tokenizer(config.model)
    refuses_clearly(lambda: read_questions(config, tokenizer=tokenizer, max_seq_length=128))


@pytest.mark.parametrize("path", corpus("rows"), ids=lambda path: path.name)
def test_rows_that_once_failed(place: Path, path: Path) -> None:
    for options in FORMATS:
        preview(place, path.name, path.read_bytes(), options)
