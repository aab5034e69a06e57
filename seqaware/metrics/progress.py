"""What rank 0 shows while a run goes on: a bar in a terminal, plain lines in a log file."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Column

from seqaware.masking import escaped

_SECONDS_BETWEEN_LINES = 5.0
# Time left is reckoned from so many steps.
_STEPS_OF_PACE = 200
_SHORTEST_PACE = 0.05


class ProgressDisplay:
    """Shows the steps of a run.

    Args:
        total_steps: of the whole run. done: steps that a resumed run already has.
        style: "bar", "lines", "off", or "auto": a bar where the output is a terminal, lines elsewhere.
    """

    def __init__(self, total_steps: int, *, done: int = 0, style: str = "auto", console: Console | None = None) -> None:
        self.console = console or Console(highlight=False, soft_wrap=True)
        if style == "auto":
            style = "bar" if self.console.is_terminal else "lines"
        self._style = style
        self._total = total_steps
        self._times: deque[tuple[float, int]] = deque(maxlen=_STEPS_OF_PACE)
        self._last_line: float | None = None
        self._bar: Progress | None = None
        self._task: TaskID | None = None
        if style == "bar":
            self._start_bar(done)

    def _start_bar(self, done: int) -> None:
        self._bar = Progress(
            BarColumn(bar_width=16),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            # A narrow terminal cuts the last figures, not the step.
            TextColumn("{task.fields[figures]}", table_column=Column(ratio=1, no_wrap=True, overflow="ellipsis")),
            console=self.console,
            expand=True,
        )
        self._task = self._bar.add_task("training", total=self._total, completed=done, figures="")
        self._bar.start()

    def step(self, line: Mapping[str, Any]) -> None:
        """Show the newest optimizer step; `line` is what `metrics.jsonl` gets."""
        self._times.append((time.monotonic(), int(line["step"])))
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, completed=line["step"], figures=_figures(line))
        elif self._style == "lines":
            self._print_line(line)

    def go_back(self) -> None:
        """Steps that were shown come again: the pace is reckoned anew."""
        self._times.clear()

    def _print_line(self, line: Mapping[str, Any]) -> None:
        now, step = time.monotonic(), int(line["step"])
        waits = self._last_line is not None and now - self._last_line < _SECONDS_BETWEEN_LINES
        if waits and step != self._total:
            return
        self._last_line = now
        self.console.print(f"step {step:>{len(str(self._total))}}/{self._total}  {_figures(line)}{self._left(step)}")

    def _left(self, step: int) -> str:
        """From the last steps, evaluations and checkpoints among them; the first, told at once, say nothing."""
        (earlier, before), (now, at) = self._times[0], self._times[-1]
        if step >= self._total or now - earlier < _SHORTEST_PACE:
            return ""
        return f"  {duration((now - earlier) / (at - before) * (self._total - step))} left"

    def say(self, text: str) -> None:
        """Print a line without disturbing the bar."""
        if self._style != "off":
            self.console.print(escaped(text, keep="\n"), markup=False)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.stop()


def _figures(line: Mapping[str, Any]) -> str:
    used = f"  mfu {line['mfu']:.1%}" if "mfu" in line else ""
    return (
        f"loss {line['loss']:.4f}  unweighted {line['unweighted_loss']:.4f}  accuracy {line['accuracy']:.3f}  "
        f"grad {line['grad_norm']:.3g}  lr {line['lr']:.2e}  {line['tokens_per_second']:,.0f} tok/s "
        f"({line['supervised_tokens_per_second']:,.0f} supervised){used}  wait {line['wait_share']:.1%}  "
        f"padding {line['padding_share']:.1%}  {line['peak_memory_gb']:.1f} GB"
    )


class RowCounter:
    """Says how many rows are tokenised, every few seconds; call it with the rows done so far."""

    def __init__(self, say: Callable[[str], None]) -> None:
        self._say = say
        self._last = time.monotonic()

    def __call__(self, rows: int) -> None:
        now = time.monotonic()
        if now - self._last >= _SECONDS_BETWEEN_LINES:
            self._last = now
            self._say(f"tokenised   {rows:,} rows")


def duration(seconds: float) -> str:
    """Seconds as a person says them: `48 s`, `3 min 05 s`, `2 h 10 min`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
