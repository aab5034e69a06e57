"""`seqaware watch RUN`: a run as it stands, drawn from its files; on any machine that sees the folder.

Built to be read without colours and at 60 columns: what a colour says, a word says too.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from pathlib import Path

from rich.console import Group
from rich.table import Table
from rich.text import Text

from seqaware.masking import escaped, masked
from seqaware.metrics.alerts import limits_of, standing_alerts
from seqaware.metrics.progress import duration
from seqaware.report.compare import bucket_name
from seqaware.report.run_record import TROUBLES, Line, RunRecord, read_run

_BARS = "▁▂▃▄▅▆▇█"
_RECENT = 50
# What a line of metrics.jsonl may hold, what a person calls it, how it is written, and the factor of its unit.
_FIGURES = (
    ("loss", "loss, weighted", "{:.4f}"),
    ("unweighted_loss", "loss, unweighted", "{:.4f}"),
    ("accuracy", "accuracy", "{:.3f}"),
    ("grad_norm", "gradient norm", "{:.3g}"),
    ("lr", "learning rate", "{:.2e}"),
    ("tokens_per_second", "tokens/s", "{:,.0f}"),
    ("mfu", "MFU", "{:.1%}"),
    ("wait_share", "waiting", "{:.1%}"),
    ("padding_share", "padding", "{:.1%}"),
    ("peak_memory_gb", "peak memory, GB", "{:.2f}"),
)


def frame(path: Path, *, width: int, now: float | None = None, plain: bool = False) -> Group:
    """One look at a run.

    Args:
        width: columns. now: seconds since 1970. plain: letters only, for terminals without block characters.

    Raises:
        DataError: the folder holds no run.
    """
    run = read_run(path)
    parts: list[Text | Table] = [_head(run, now)]
    if run.steps:
        parts += [_progress(run, width, plain), Text(), _figures(run, width, plain)]
    if run.evaluations:
        parts += [Text(), *_evaluation(run)]
    limits = limits_of(run.plan)
    parts += [Text(escaped(f"! {alert}"), style="bold red") for alert in standing_alerts(run.lines, limits)]
    parts += [Text(escaped(f"! {_event(line)}"), style="yellow") for line in run.troubles]
    parts += [Text(escaped(f"? {note}"), style="yellow") for note in run.notes]
    return Group(*parts)


def _event(line: Line) -> str:
    return TROUBLES[str(line["kind"])].format(step=line.get("step", "?"))


def _head(run: RunRecord, now: float | None) -> Text:
    objective = run.objective
    what = f", {objective.get('weighting')} γ = {objective['gamma']:g}" if "gamma" in objective else ""
    text = Text(escaped(masked(run.name)), style="bold")
    text.append(escaped(f"  {run.state(now)}{what}"), style="not bold")
    return text


def _progress(run: RunRecord, width: int, plain: bool) -> Text:
    total = run.total_steps
    if not total:
        return Text(f"step {run.done}")
    tail = f" {run.done}/{total}"
    seconds = [float(line["step_seconds"]) for line in run.steps[-_RECENT:] if "step_seconds" in line]
    if seconds and run.done < total:
        tail += f"  {duration(sum(seconds) / len(seconds) * (total - run.done))} left"
    room = max(8, min(40, width - len(tail) - 2))
    filled = round(room * min(1.0, run.done / total))
    full, empty = ("#", "-") if plain else ("█", "░")
    return Text(full * filled + empty * (room - filled) + tail)


def _figures(run: RunRecord, width: int, plain: bool) -> Table:
    table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column(no_wrap=True)
    table.add_column(justify="right", no_wrap=True)
    table.add_column(no_wrap=True, overflow="crop")
    room = 0 if plain else max(0, min(60, width - 34))
    for name, label, form in _FIGURES:
        values = [float(line[name]) for line in run.steps if isinstance(line.get(name), int | float)]
        if values:
            table.add_row(label, form.format(values[-1]), sparkline(values, room))
    return table


def sparkline(values: Sequence[float], width: int) -> str:
    """The course of the values in `width` characters; empty where there is no room or nothing to show."""
    finite = [value for value in values if math.isfinite(value)]
    if width < 8 or len(finite) < 2:
        return ""
    width = min(width, len(finite))
    parts = [finite[i * len(finite) // width : (i + 1) * len(finite) // width] for i in range(width)]
    means = [sum(part) / len(part) for part in parts]
    low, high = min(means), max(means)
    span = high - low or 1.0
    return "".join(_BARS[min(len(_BARS) - 1, int((mean - low) / span * len(_BARS)))] for mean in means)


def _evaluation(run: RunRecord) -> list[Text | Table]:
    first, last = run.evaluations[0], run.evaluations[-1]
    text = f"held out, step {last['step']}: unweighted {last['unweighted_loss']:.4f}"
    if first is not last:
        text += f" (step {first['step']}: {first['unweighted_loss']:.4f})"
    if last.get("exact_match") is not None:
        text += f", exact match {last['exact_match']:.1%} of {last.get('questions', '?')}"
    entries = last.get("by_position", ())
    if not entries:
        return [Text(text)]
    before = {entry["from"]: entry["loss"] for entry in first.get("by_position", ())}
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="")
    for name in ("position", "first", "now", "right"):
        table.add_column(name, justify="left" if name == "position" else "right", no_wrap=True)
    for entry in entries:
        start = before.get(entry["from"])
        table.add_row(
            bucket_name(entry["from"], entry["to"]),
            "" if start is None else f"{start:.4f}",
            f"{entry['loss']:.4f}",
            f"{entry['accuracy']:.1%}",
        )
    return [Text(text), table]


def is_over(path: Path) -> bool:
    """Whether nothing more will come of this run by itself."""
    return read_run(path).state(time.time()) in ("finished", "left, and goes on with the same command")
