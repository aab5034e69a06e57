"""Hostile YAML and `--set`: a dry run and a plan end in a plan or in one error."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

import launcher.plan
import launcher.train
from seqaware.config.loading import REPOSITORY
from seqaware.config.messages import config_paths
from tests.fuzz import hostile
from tests.fuzz.bounds import corpus, ends_well, fuzzed

DEMO, NODE = (
    yaml.safe_load((REPOSITORY / "train_configs" / name).read_text()) for name in ("demo.yaml", "llama8b_node.yaml")
)
PATHS = config_paths()
SIZES = [
    *("model_type", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *(
        "num_key_value_heads",
        "max_position_embeddings",
        "tie_word_embeddings",
        "head_dim",
        "text_config",
        "num_parameters",
    ),
]
# What is not YAML, or YAML that few expect.
PIECES = [
    *("\t", "\0", "\x85", "\ufeff", "\u2028", "&a ", "*a ", "<<: ", "<<: *x", "- ", "? ", "| ", ": ", "---\n", "...\n"),
    *(
        "%YAML 3.0\n",
        "{",
        "}",
        "[",
        "]",
        "'",
        '"',
        "#",
        "@",
        "`",
        "\\x",
        "0o7",
        "\r",
        "!!set {}",
        "!!omap [1]",
        "!foo ",
    ),
    *("!!int x", "!!float y", "!!bool z", "!!timestamp z", "!!binary x", "!!python/object/apply:os.system ['id']"),
    *("[" * 200, "{a: " * 100, "- " * 200, "a: &a [*a]\n", "? [a]\n: b\n", "\ud800", "9" * 5000, "0x" + "f" * 300),
]
RANKS = ["1", "2", "7", "4096", "1000000", "0", "-1", "99999999999999999999"]


@st.composite
def configs(draw: st.DrawFn) -> bytes:
    """A shipped config with a few hostile values, and some of them damaged as text."""
    base = draw(st.sampled_from([DEMO, DEMO, NODE]))
    paths = st.one_of(st.sampled_from(PATHS), st.sampled_from(SIZES).map("model.from_scratch.{}".format))
    changes = draw(st.lists(st.tuples(paths, hostile.values), min_size=1, max_size=3))
    text = yaml.dump(hostile.mutated(base, changes), allow_unicode=True, sort_keys=False)
    if draw(st.integers(0, 3)):
        return text.encode("utf-8", "surrogatepass")
    return draw(hostile.damaged(text, PIECES))


settings_typed = st.tuples(
    st.sampled_from([*PATHS, "", "a", "x." * 500 + "y", "training..sft", "dataset.mixture.0.name"]),
    st.sampled_from([*PIECES, *hostile.TEXTS, "[[[[]]]]", "{a: 1}", ".nan", "-.inf", "*a", "<<", "null"]),
).map(lambda pair: f"--set={pair[0]}={pair[1]}".replace("\0", ""))


@fuzzed("config")
@given(content=configs(), typed=st.lists(settings_typed, max_size=2), ranks=st.none() | st.sampled_from(RANKS))
def test_a_hostile_config_ends_a_dry_run_well(place: Path, content: bytes, typed: list[str], ranks: str | None) -> None:
    (place / "run.yaml").write_bytes(content)
    arguments = ["run.yaml", "--dry-run", *typed, *(["--ranks", ranks] if ranks else [])]
    ends_well(launcher.train.app, arguments)


@fuzzed("plan")
@given(
    changes=st.lists(st.tuples(st.sampled_from(PATHS), hostile.numbers), max_size=2),
    gpus=st.sampled_from(RANKS),
    option=st.sampled_from(["--memory", "--nvlink", "--network"]),
    number=st.sampled_from(["1", "80", "1e6", "1e300", "nan", "-5", "0", "1e-300", "x"]),
)
def test_a_hostile_config_ends_a_plan_well(
    place: Path, changes: list[tuple[str, Any]], gpus: str, option: str, number: str
) -> None:
    (place / "run.yaml").write_text(yaml.dump(hostile.mutated(DEMO, changes)))
    ends_well(launcher.plan.app, ["run.yaml", "--gpus", gpus, option, number])


@pytest.mark.parametrize("path", corpus("config"), ids=lambda path: path.stem)
def test_configs_that_once_failed(place: Path, path: Path) -> None:
    del place
    shown = ends_well(launcher.train.app, [str(path), "--dry-run"])
    assert "error: " in shown
    ends_well(launcher.plan.app, [str(path), "--gpus", "8"])
