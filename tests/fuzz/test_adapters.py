"""Hostile settings of adapters: they are merged into their base model, or one error names the adapter."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

import launcher.export
from tests import tiny
from tests.fuzz import hostile
from tests.fuzz.bounds import corpus, ends_well, fuzzed

SETTINGS = "adapter_config.json"
PIECES = ["\0", "\ufeff", "{", "}", "[" * 3000, '{"a":' * 2000, "9" * 5000, "1e999", "NaN", "null", '"\\ud800"']


@pytest.fixture(scope="module")
def adapter(place: Path) -> Path:
    """An adapter of a tiny model."""
    workshop = tiny.build(place / "tiny", answers=(2, 3))
    model = AutoModelForCausalLM.from_pretrained(workshop.model)
    get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"])).save_pretrained(place / "written")
    settings = json.loads((place / "written" / SETTINGS).read_text())
    (place / "written" / SETTINGS).write_text(json.dumps({**settings, "base_model_name_or_path": str(workshop.model)}))
    shutil.copytree(place / "written", place / "adapter")
    return place / "adapter"


def settings_of(adapter: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((adapter.with_name("written") / SETTINGS).read_text())
    return found


def merge(adapter: Path, settings: bytes) -> str:
    (adapter / SETTINGS).write_bytes(settings)
    shutil.rmtree(adapter.with_name("merged"), ignore_errors=True)
    return ends_well(launcher.export.app, [adapter.name, "merged"])


@fuzzed("adapters")
@given(data=st.data())
def test_a_hostile_adapter_is_merged_or_refused(adapter: Path, data: st.DataObject) -> None:
    written = settings_of(adapter)
    values = hostile.values | st.just(hostile.ABSENT)
    changes = data.draw(st.lists(st.tuples(st.sampled_from(sorted(written)), values), min_size=1, max_size=2))
    text = json.dumps(hostile.mutated(written, changes))
    merge(adapter, text.encode() if data.draw(st.integers(0, 4)) else data.draw(hostile.damaged(text, PIECES)))


def test_the_adapter_is_merged_as_it_was_written(adapter: Path) -> None:
    assert "merged " in merge(adapter, json.dumps(settings_of(adapter)).encode())


@pytest.mark.parametrize("path", corpus("adapters"), ids=lambda path: path.stem)
def test_adapters_that_once_failed(adapter: Path, path: Path) -> None:
    changed = hostile.mutated(settings_of(adapter), json.loads(path.read_text()))
    assert "make no model" in merge(adapter, json.dumps(changed).encode())
