"""Progress reads well in a log file and says times as people do."""

from __future__ import annotations

import io
import re

import pytest
from rich.console import Console

from seqaware.metrics.progress import ProgressDisplay, duration

LINE = {
    "supervised_tokens_per_second": 2345.6,
    "mfu": 0.412,
    "wait_share": 0.0012,
    "padding_share": 0.02,
    "peak_memory_gb": 1.5,
    "loss": 1.5,
    "unweighted_loss": 1.25,
    "accuracy": 0.5,
    "grad_norm": 2.0,
    "lr": 1e-3,
    "tokens_per_second": 12345.6,
}


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.4, "0 s"), (59.4, "59 s"), (59.6, "1 min 00 s"), (185, "3 min 05 s"), (7800, "2 h 10 min")]
)
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def _shown(style: str, *, done: int = 0) -> list[str]:
    output = io.StringIO()
    display = ProgressDisplay(3, done=done, style=style, console=Console(file=output, width=200))
    for step in range(done + 1, 4):
        display.step({"step": step, **LINE})
    display.close()
    return output.getvalue().splitlines()


def test_a_log_file_gets_the_first_and_the_last_step_and_no_control_characters() -> None:
    lines = _shown("auto")
    assert [line.split()[1] for line in lines] == ["1/3", "3/3"]
    assert "12,346 tok/s (2,346 supervised)  mfu 41.2%  wait 0.1%  padding 2.0%  1.5 GB" in lines[0]
    assert "loss 1.5000" in lines[0] and "\x1b" not in "".join(lines)


def test_a_resumed_run_starts_where_it_stopped() -> None:
    assert [line.split()[1] for line in _shown("lines", done=1)] == ["2/3", "3/3"]


@pytest.mark.parametrize("width", [60, 100])
def test_a_narrow_terminal_shows_the_step_and_the_loss(width: int) -> None:
    output = io.StringIO()
    display = ProgressDisplay(300, style="bar", console=Console(file=output, width=width, force_terminal=True))
    display.step({"step": 7, **LINE})
    display.close()
    last = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", output.getvalue()).strip().splitlines()[-1]
    assert len(last) <= width and "7/300" in last and "loss 1.5000" in last


def test_a_run_that_goes_back_reckons_its_pace_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    output, clock = io.StringIO(), iter(range(0, 1000, 10))
    monkeypatch.setattr("seqaware.metrics.progress.time.monotonic", lambda: float(next(clock)))
    display = ProgressDisplay(9, done=5, style="lines", console=Console(file=output, width=200))
    display.step({"step": 6, **LINE})
    display.go_back()
    for step in (6, 7):
        display.step({"step": step, **LINE})
    lines = output.getvalue().splitlines()
    assert [line.split()[1] for line in lines] == ["6/9", "6/9", "7/9"]
    assert "left" not in lines[1] and lines[2].endswith("s left")


def test_off_shows_nothing() -> None:
    assert _shown("off") == []
