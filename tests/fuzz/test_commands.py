"""Hostile options and configs of the commands that look at data, a model or a host: none reaches a rank."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml
from hypothesis import given
from hypothesis import strategies as st

import launcher.doctor
import launcher.evaluate
import launcher.prepare
import launcher.preview
import launcher.verify
import launcher.weights
from seqaware.errors import ConfigError
from tests.fuzz import hostile
from tests.fuzz.bounds import ends_well, fuzzed
from tests.fuzz.test_config import DEMO, PATHS, RANKS
from tests.fuzz.test_init import NUMBERS, TYPED

BASE = hostile.mutated(
    DEMO,
    [
        ("dataset.max_examples", 8),
        ("dataset.store_dir", "stores"),
        ("evaluation.dataset.max_examples", 4),
        ("evaluation.dataset.store_dir", "stores"),
        ("training.schedule", {"global_batch_size": 2, "num_epochs": 1}),
    ],
)
# Only where these commands may write.
FOLDERS = [
    "no/such/folder",
    "/dev/null/x",
    "/dev/null",
    "run.yaml",
    "x" * 300,
    "a\nb",
    "~nouser/x",
    "/proc/x",
    "",
    "\0",
    ".",
]
WRITABLE = [path for path in PATHS if not path.endswith(("_dir", "output.dir", "output_name"))]
FILES = ["out.html", "no/such/out.html", ".", "/", "x" * 300, "a\nb.html", "~nouser/x", "/dev/null/x", "/proc/x", ""]
COUNTS = [*NUMBERS, *RANKS, "1_0", "９", "1e3", " 1", "--", ""]
MODELS = ["demo", "demo/tokenizer", "run.yaml", ".", "no/such", "a/b", *TYPED]
JSONS = ["ds_configs/zero3.json", "run.yaml", "no/such.json", "/dev/zero", ".", "x" * 300, ""]

OPTIONS: dict[str, dict[str, list[str]]] = {
    "preview": {"--step": COUNTS, "--rows": COUNTS, "--documents": COUNTS, "--ranks": COUNTS, "--html": FILES},
    "weights": {"--documents": COUNTS, "--json": [*FILES, "-"], "--png": FILES},
    "prepare": {"--part": ["1/1", "1/2", "2/1", "0/0", "1/99999999999", "/", "a/b", *COUNTS], "--merge": COUNTS},
    "evaluate": {"--deepspeed": JSONS, "--out": FOLDERS[:6]},
    "verify": {"--deepspeed": JSONS, "--steps": COUNTS, "--dtype": ["float32", "int8", ""]},
    "doctor": {
        "--deepspeed": JSONS,
        "--ranks": COUNTS,
        "--hostfile": ["run.yaml", "no/such", "/dev/zero", ".", "hosts"],
    },
}
APPS: dict[str, typer.Typer] = {
    "preview": launcher.preview.app,
    "weights": launcher.weights.app,
    "prepare": launcher.prepare.app,
    "evaluate": launcher.evaluate.app,
    "verify": launcher.verify.app,
    "doctor": launcher.doctor.app,
}
NAMES = ["preview"] * 5 + ["weights"] * 5 + ["prepare"] * 2 + ["evaluate"] * 3 + ["verify"] * 3 + ["doctor"]

Arguments = tuple[str, list[tuple[str, Any]], list[str]]


@st.composite
def calls(draw: st.DrawFn) -> Arguments:
    """A command, changes to its config, and its arguments."""
    name = draw(st.sampled_from(NAMES))
    options = draw(st.lists(st.sampled_from(sorted(OPTIONS[name])), max_size=2, unique=True))
    typed = [part for option in options for part in (option, draw(st.sampled_from(OPTIONS[name][option])))]
    change = st.one_of(
        st.tuples(st.sampled_from(WRITABLE), hostile.values),
        st.tuples(st.sampled_from(["dataset.store_dir", "output.dir"]), st.sampled_from(FOLDERS)),
    )
    model = [draw(st.sampled_from(MODELS))] if name == "evaluate" else []
    return name, draw(st.lists(change, max_size=2)), [*model, "run.yaml", *typed]


@pytest.fixture(scope="module")
def offline(place: Path) -> Iterator[Path]:
    """No hub, and no ranks: whoever would connect ends there."""

    def connect(*args: object, **options: object) -> None:
        raise ConfigError("no ranks here")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        patch.setattr("seqaware.tools.evaluate_model.connect", connect)
        patch.setattr("seqaware.verify.verification.connect", connect)
        yield place


@fuzzed("commands")
@given(call=calls())
def test_hostile_calls_end_well(offline: Path, call: Arguments) -> None:
    name, changes, arguments = call
    shutil.rmtree(offline / "stores", ignore_errors=True)
    (offline / "run.yaml").write_text(yaml.dump(hostile.mutated(BASE, changes), allow_unicode=True))
    (offline / "hosts").write_text("a slots=99999999999\n\x1b[31m slots=x\n")
    ends_well(APPS[name], [argument.replace("\0", "") for argument in arguments])


@pytest.mark.parametrize(
    ("name", "changes", "arguments", "said"),
    [
        ("preview", [], ["--html", "no/such/out.html"], "--html cannot be written; got no/such/out.html (No such file"),
        ("preview", [], ["--html", ""], "--html cannot be written; got . (Is a directory"),
        ("weights", [], ["--json", "/dev/null/x"], "--json cannot be written; got /dev/null/x (Not a directory"),
        ("weights", [], ["--png", "out.html"], "--png cannot be written; got out.html (Format 'html' is not supported"),
        ("prepare", [("dataset.store_dir", "/proc/x")], [], "/proc/x cannot be written"),
        ("prepare", [], ["--merge", "1000000"], "part 20/1000000 is missing; run"),
        ("evaluate", [], ["demo", "--out", "/dev/null/x"], "--out is not a folder"),
        ("doctor", [("output.dir", "/dev/null/x")], [], "output.dir is not a folder"),
    ],
)
def test_calls_that_once_failed(
    offline: Path, name: str, changes: list[tuple[str, Any]], arguments: list[str], said: str
) -> None:
    shutil.rmtree(offline / "stores", ignore_errors=True)
    model, typed = (arguments[:1], arguments[1:]) if name == "evaluate" else ([], arguments)
    (offline / "run.yaml").write_text(yaml.dump(hostile.mutated(BASE, changes)))
    assert said in " ".join(ends_well(APPS[name], [*model, "run.yaml", *typed]).split())
