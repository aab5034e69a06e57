"""Hostile DeepSpeed JSONs: a plan is made of them, or one error names what is wrong."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from seqaware.config.loading import REPOSITORY
from seqaware.config.schema import Config
from seqaware.estimate.render_plan import render_plan
from seqaware.plan.deepspeed_config import COMMUNICATION_KEYS, OWNED_KEYS
from seqaware.plan.plan import make_plan
from seqaware.plan.specs import World, model_facts
from seqaware.plan.zero_schema import COMMUNICATION_BLOCKS, DEPRECATED, REMOVED, ZERO_BLOCKS, ZERO_VALUES
from tests.fuzz import hostile
from tests.fuzz.bounds import corpus, fuzzed, refuses_clearly
from tests.fuzz.test_config import DEMO

SHIPPED = [json.loads(path.read_text()) for path in sorted((REPOSITORY / "ds_configs").glob("*.json"))]
PATHS = [
    *COMMUNICATION_KEYS,
    *list(OWNED_KEYS)[:3],
    "zzz",
    *(f"zero_optimization.{name}" for name in (*ZERO_VALUES, *DEPRECATED, *REMOVED, *ZERO_BLOCKS)),
    *(f"zero_optimization.{block}.{name}" for block, keys in ZERO_BLOCKS.items() for name in (*keys, "zzz")),
    *(f"{block}.{name}" for block, keys in COMMUNICATION_BLOCKS.items() for name in keys),
]
PIECES = [
    *("\0", "\ufeff", "{", "[", "]", ",", '"', "1e999", "-", "NaN", "Infinity", "9" * 400, "9" * 5000, "[" * 5000),
    *('{"a":' * 2000, '"stage": 2, "stage": 3,', '"\\ud800"', "null", "//", "'"),
]
CONFIG = Config.model_validate(DEMO)
WORLDS = [
    World(size=2, local_size=2, nodes=1, device="cpu", bf16=True),
    World(size=6, local_size=3, nodes=2, device="cuda", bf16=True, elsewhere=True),
]


@st.composite
def jsons(draw: st.DrawFn) -> bytes:
    changes = draw(st.lists(st.tuples(st.sampled_from(PATHS), hostile.values), min_size=1, max_size=3))
    text = json.dumps(hostile.mutated(draw(st.sampled_from(SHIPPED)), changes), ensure_ascii=draw(st.booleans()))
    if draw(st.integers(0, 4)):
        return text.encode("utf-8", "surrogatepass")
    return draw(hostile.damaged(text, PIECES))


def plan(path: Path, world: World) -> Any:
    made = make_plan(CONFIG, world=world, deepspeed_path=path, model=model_facts(CONFIG.model))
    return render_plan(made), json.dumps(made.to_json())


@fuzzed("deepspeed")
@given(content=jsons(), world=st.sampled_from(WORLDS))
def test_a_hostile_json_makes_a_plan_or_an_error(place: Path, content: bytes, world: World) -> None:
    path = place / "ds.json"
    path.write_bytes(content)
    refuses_clearly(lambda: plan(path, world))


@pytest.mark.parametrize("path", corpus("deepspeed"), ids=lambda path: path.stem)
def test_jsons_that_once_failed(place: Path, path: Path) -> None:
    del place
    assert not refuses_clearly(lambda: plan(path, WORLDS[0]))
