"""Hostile answers to `init`: a config that reads back, or one error and no file."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import launcher.init
from seqaware.config.loading import load_config
from tests.fuzz import hostile
from tests.fuzz.bounds import ends_well, fuzzed

TYPED = [text.replace("\0", "") for text in hostile.TEXTS]
NUMBERS = [
    "0",
    "1",
    "2",
    "8",
    "16",
    "100",
    "1000000",
    "1000001",
    "10000000000000",
    "-1",
    "nan",
    "inf",
    "1e-300",
    "1e300",
    "x",
]
NAMES = [
    "run.yaml",
    "é 🙂.yaml",
    "a\nb.yaml",
    "\x1b[31m.yaml",
    "x" * 300 + ".yaml",
    "no/such/run.yaml",
    ".",
    "/",
    "",
    "x",
]
OPTIONS = ["--gamma", "--half-life", "--gpus", "--per-node", "--max-seq-length", "--batch"]

answers = st.tuples(
    st.sampled_from(NAMES[:2] * 4 + NAMES),
    st.sampled_from(["gpt2", "meta-llama/Llama-3.1-8B", *TYPED]),
    st.sampled_from(["demo/train.jsonl", *TYPED]),
    st.lists(st.tuples(st.sampled_from(OPTIONS), st.sampled_from([*NUMBERS, *TYPED])), max_size=3),
    st.none() | st.sampled_from(TYPED),
)


@fuzzed("init")
@given(answers=answers)
def test_hostile_answers_end_init_well(
    place: Path, answers: tuple[str, str, str, list[tuple[str, str]], str | None]
) -> None:
    name, model, data, options, held_out = answers
    written = place / name if name in NAMES[:2] else None
    if written is not None:
        written.unlink(missing_ok=True)
    typed = [part for option in options for part in option]
    held = [] if held_out is None else ["--held-out", held_out]
    ends_well(launcher.init.app, [name, "--model", model, "--data", data, *typed, *held])
    if written is not None and written.exists():
        config = load_config(written)
        assert config.model.base_name == model and config.dataset.name == data


@pytest.mark.parametrize("value", ["10000", "100000", "100000000000"])
def test_a_long_number_does_not_run_into_its_comment(place: Path, value: str) -> None:
    (place / "long.yaml").unlink(missing_ok=True)
    ends_well(launcher.init.app, ["long.yaml", "--model=gpt2", "--data=demo/train.jsonl", f"--batch={value}"])
    assert load_config(place / "long.yaml").training.schedule.global_batch_size == int(value)
