"""The source of a user's weighting function, read without importing it."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from seqaware.plan.weighting_source import weighting_source
from tests.unit.plan.test_plan import config, plan

FILES = {
    "mine.py": "import torch\nimport json\nfrom parts import base\n\ndef late(k, length):\n    return base.square(k)\n",
    "parts/__init__.py": "",
    "parts/base.py": "from .deep import power\nimport seqaware\n\ndef square(k):\n    return k ** power\n",
    "parts/deep.py": "power = 2\n",
    "other.py": "raise SystemExit\n",
    "seqaware/__init__.py": "",
}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name, text in FILES.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("name", "counts"), [(name, name not in ("other.py", "seqaware/__init__.py")) for name in FILES]
)
def test_what_the_function_is_made_of_counts_and_nothing_else(folder: Path, name: str, counts: bool) -> None:
    before = weighting_source("mine:late")
    assert before is not None and len(before) == 64
    (folder / name).write_bytes((FILES[name] + "# changed\n").encode())
    assert (weighting_source("mine:late") != before) == counts
    (folder / name).write_bytes(FILES[name].replace("\n", "\r\n").encode())
    assert weighting_source("mine:late") == before


def test_nothing_is_executed(folder: Path) -> None:
    assert weighting_source("other:late") is not None
    assert "other" not in sys.modules


def test_a_module_in_a_package_and_an_installed_one_are_found(folder: Path) -> None:
    assert weighting_source("parts.base:square") is not None
    assert weighting_source("torch.nn.functional:relu") is not None


@pytest.mark.parametrize(
    "name", ["log_suffix", "no_such_module:f", "parts.none:f", "sys:intern", "parts..base:f", ".:f"]
)
def test_what_has_no_source(folder: Path, name: str) -> None:
    assert weighting_source(name) is None


def test_another_source_is_another_run(folder: Path) -> None:
    written = config(training={"sft": {"weighting": "mine:late"}})
    before = plan(written)
    assert before.mathematics()["objective"]["weighting_source"] == weighting_source("mine:late")
    (folder / "parts" / "deep.py").write_text("power = 3\n")
    assert plan(written).mathematics_hash() != before.mathematics_hash()
    # A plan holds what it was made from, whatever is edited while the run goes on.
    assert before.mathematics()["objective"]["weighting_source"] != weighting_source("mine:late")
    assert not before.unknown_mathematics()
    absent = plan(config(training={"sft": {"weighting": "absent:late"}}))
    assert absent.unknown_mathematics() == ("the weighting function's source",)
    # Without a source the identity is what the first releases wrote.
    first = config(training={"sft": {"weighting": "no_such_module:late"}})
    assert "weighting_source" not in plan(first).mathematics()["objective"]
