"""A frame of `seqaware watch`: at 60 columns, without colours, of runs in any state."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from rich.console import Console

from seqaware.report.live_view import frame, sparkline
from tests.unit.report.runs import write_run


def _shown(folder: Path, *, width: int = 60, plain: bool = False) -> list[str]:
    output = io.StringIO()
    Console(file=output, width=width, no_color=True).print(frame(folder, width=width, plain=plain))
    return output.getvalue().splitlines()


@pytest.mark.parametrize("width", [40, 60, 120])
def test_it_fits_and_has_no_control_characters(tmp_path: Path, width: int) -> None:
    lines = _shown(write_run(tmp_path / "run", done=30), width=width)
    text = "\n".join(lines)
    assert max(map(len, lines)) <= width and "\x1b" not in text
    for word in (
        "30/60",
        "3 s left",
        "loss, weighted",
        "peak memory, GB 1.50",
        "exact match 50.0%",
        "k = 2 – 3",
        "γ = 0.98",
    ):
        assert word in " ".join(text.split())


def test_letters_alone_are_enough(tmp_path: Path) -> None:
    text = "\n".join(_shown(write_run(tmp_path / "run", done=30), plain=True))
    assert "#####" in text and not set(text) & set("▁▂▃▄▅▆▇█░")


def test_what_is_wrong_is_in_words(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", done=30, version="99.0")
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "skipped", "step": 31, "documents": []}\n')
    text = " ".join(" ".join(_shown(folder)).split())
    assert "! step 31 was passed over" in text and "? written by seqaware 99.0" in text


def test_sparklines_keep_the_course() -> None:
    assert sparkline([1.0, 2.0, 3.0, float("nan"), 4.0] * 1, 8) == "▁▃▆█"
    assert sparkline(list(range(100)), 10)[0] == "▁" and sparkline([1.0] * 20, 10) == "▁" * 10
    assert sparkline([1.0, 2.0], 5) == "" and sparkline([1.0], 20) == ""
