"""Hostile config.json of a model: its sizes are read, or one error names the wrong one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import launcher.train
from tests.fuzz import hostile
from tests.fuzz.bounds import corpus, ends_well, fuzzed
from tests.fuzz.test_config import DEMO, SIZES
from tests.fuzz.test_deepspeed_json import PIECES

LLAMA = DEMO["model"]["from_scratch"]
ARGUMENTS = [
    *("train_configs/demo.yaml", "--dry-run", "--set=model.from_scratch=null", "--set=model.tokenizer=demo/tokenizer"),
    "--set=training.parameters.max_seq_length=null",
]


@st.composite
def model_configs(draw: st.DrawFn) -> bytes:
    changes = draw(st.lists(st.tuples(st.sampled_from(SIZES), hostile.values), min_size=1, max_size=3))
    text = json.dumps(hostile.mutated(LLAMA, changes))
    return draw(hostile.damaged(text, PIECES)) if draw(st.integers(0, 4)) == 0 else text.encode()


@fuzzed("model")
@given(content=model_configs())
def test_a_hostile_model_config_ends_a_dry_run_well(place: Path, content: bytes) -> None:
    folder = place / "model"
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_bytes(content)
    ends_well(launcher.train.app, [*ARGUMENTS, "--set=model.base_name=./model"])


@pytest.mark.parametrize("path", corpus("model"), ids=lambda path: path.stem)
def test_model_configs_that_once_failed(place: Path, path: Path) -> None:
    folder = place / path.stem
    folder.mkdir()
    (folder / "config.json").write_bytes(path.read_bytes())
    assert "error: " in ends_well(launcher.train.app, [*ARGUMENTS, f"--set=model.base_name=./{path.stem}"])
