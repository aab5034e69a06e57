"""The tables of a report, as rows of text; and the same figures as CSV files, in full."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from seqaware.metrics.intervals import Mean
from seqaware.metrics.progress import duration
from seqaware.report.compare import (
    Group,
    baseline_of,
    bucket_name,
    buckets,
    differences,
    last_evaluation,
    paired,
    position_loss,
)
from seqaware.report.run_record import RunRecord

_OUTCOMES = (
    ("unweighted_loss", "held-out nats a token, unweighted"),
    ("accuracy", "held-out tokens that are right"),
    ("exact_match", "exact match"),
)


@dataclass(frozen=True)
class ReportSection:
    """A heading, sentences, a table, figures. prose: the cells are words, not numbers."""

    title: str
    text: Sequence[str] = ()
    head: Sequence[str] = ()
    rows: Sequence[Sequence[str]] = ()
    prose: bool = False
    figures: Sequence[Mapping[str, str]] = field(default=())


def outcomes(groups: Sequence[Group]) -> ReportSection:
    """Every group's results, and their differences from the baseline's."""
    baseline = baseline_of(groups)
    names = [(name, says) for name, says in _OUTCOMES if any(_has(group, name) for group in groups)]
    head = ["", "runs"]
    for _, says in names:
        head += [says] + ([f"minus {baseline.label}"] if baseline else [])
    rows = []
    for group in groups:
        row = [group.label, str(len(group.runs))]
        for name, _ in names:
            row.append(str(group.mean(last_evaluation(name))))
            if baseline:
                row.append("" if group is baseline else _difference(paired(group, baseline, last_evaluation(name))))
        rows.append(row)
    many = any(len(group.runs) > 1 for group in groups)
    text = ["± is the 95 % interval of the mean over seeds (Student's t)."] if many else []
    if many and baseline:
        text.append(
            "Differences are taken seed by seed; * marks those whose interval excludes 0. Each is one test at 95 %: of "
            "twenty differences that are none, one is marked."
        )
    return ReportSection("Results of the last evaluation", text, head, rows if names else ())


def positions(groups: Sequence[Group]) -> ReportSection:
    """Held-out loss by position, and each group's difference from the baseline's."""
    baseline = baseline_of(groups)
    others = [group for group in groups if group is not baseline] if baseline else []
    head = ["", *(group.label for group in groups)]
    head += [f"{group.label} minus {baseline.label}" for group in others if baseline]
    rows = []
    for first, last in buckets([run for group in groups for run in group.runs]):
        figure = position_loss(first)
        row = [bucket_name(first, last), *(str(group.mean(figure)) for group in groups)]
        row += [_difference(paired(group, baseline, figure)) for group in others if baseline]
        rows.append(row)
    text = ["Nats a token, unweighted; k counts the tokens as the objective does."]
    return ReportSection("Held-out loss by position", text, head, rows)


def runs_table(groups: Sequence[Group]) -> ReportSection:
    """Where each run stands."""
    head = ["run", "objective", "seed", "state", "steps", "ranks", "training loss", "held-out", "tokens/s", "time"]
    rows = [_run_row(group, run) for group in groups for run in group.runs]
    return ReportSection("Runs", (), head, rows)


def _run_row(group: Group, run: RunRecord) -> list[str]:
    seconds = [float(line.get("step_seconds", 0.0)) for line in run.steps]
    tokens = sum(float(line.get("tokens", 0.0)) for line in run.steps)
    world = run.plan.get("world") or {}
    held_out = last_evaluation("unweighted_loss")(run)
    return [
        run.name,
        group.label,
        str(run.mathematics.get("seed", "?")),
        run.state(),
        f"{run.done} of {run.total_steps or '?'}",
        str(world.get("size", "?")),
        f"{run.steps[-1]['unweighted_loss']:.4f}" if run.steps else "–",
        "–" if held_out is None else f"{held_out:.4f}",
        f"{tokens / sum(seconds):,.0f}" if sum(seconds) else "–",
        duration(sum(seconds)),
    ]


def plan_against_run(run: RunRecord) -> ReportSection:
    """What was planned and what came of it."""
    plan, steps = run.plan, run.steps
    batches, data = plan.get("batches") or {}, plan.get("data") or {}
    config = run.config.get("training") or {}
    rows = [["optimizer steps", str(run.total_steps or "?"), str(run.done)]]
    if steps and data.get("tokens") and data.get("documents"):
        epochs = float(steps[-1].get("epoch", 0.0))
        rows.append(["tokens", f"{epochs * data['tokens']:,.0f}", f"{_total(run, 'tokens'):,.0f}"])
        supervised = epochs * (data.get("supervised_tokens") or 0)
        rows.append(["supervised tokens", f"{supervised:,.0f}", f"{_total(run, 'supervised_tokens'):,.0f}"])
        rows.append(["sequences", f"{epochs * data['documents']:,.0f}", f"{_total(run, 'sequences'):,.0f}"])
    if steps and batches.get("global_batch_size"):
        rows.append(["sequences of a step", str(batches["global_batch_size"]), _range(run, "sequences")])
    if steps:
        peak = max(float(line.get("lr", 0.0)) for line in steps)
        rows.append(["highest learning rate", f"{(config.get('optimizer') or {}).get('lr', '?')}", f"{peak:g}"])
    rows.append(["steps passed over, saves that failed, …", "0", str(len(run.troubles))])
    rows.append(["attempts", "1", str(len(run.manifest.get("attempts") or []))])
    note = "What is planned of the data is the share of it that the steps so far go over."
    return ReportSection(f"The plan and what happened: {run.name}", [note], ["", "planned", "happened"], rows)


def certificate(run: RunRecord) -> ReportSection | None:
    """What `seqaware verify` found, if it was asked."""
    found = run.certificate
    if not found:
        return None
    same = found.get("mathematics_hash") == run.plan.get("mathematics_hash")
    text = [f"The loss and gradients of the first steps against an oracle: {found.get('verdict', 'no verdict')}."]
    if not same:
        text.append("It was made for another config, data or objective than this run's.")
    items = found.get("items") or []
    rows = [[str(item.get(name, "")) for name in ("item", "step", "expected", "seen", "verdict")] for item in items]
    return ReportSection(f"Certificate: {run.name}", text, ["item", "step", "expected error", "seen", "verdict"], rows)


def results(runs: Sequence[RunRecord]) -> ReportSection | None:
    """What `seqaware evaluate` found of the runs' models: every share that has an interval."""
    rows = [
        [run.name, name, figure.replace("_", " "), f"{share:.1%}", f"{low:.1%} to {high:.1%}"]
        for run in runs
        for name, content in run.results.items()
        for figure, share in content.items()
        if isinstance(share, float)
        and isinstance(low := content.get(f"{figure}_low"), float)
        and isinstance(high := content.get(f"{figure}_high"), float)
    ]
    head = ["run", "model", "figure", "share", "95 %"]
    return ReportSection("Evaluations of the trained models", (), head, rows) if rows else None


def config_differences(runs: Sequence[RunRecord]) -> ReportSection | None:
    """The keys that are not the same in all runs."""
    found = differences(runs) if len(runs) > 1 else []
    if not found:
        return None
    rows = [[name, *values] for name, values in found]
    return ReportSection("What differs between the configs", (), ["", *(run.name for run in runs)], rows)


def write_csv(folder: Path, groups: Sequence[Group]) -> None:
    """steps.csv, evaluations.csv and by_position.csv: every figure of every run."""
    runs = [(group, run) for group in groups for run in group.runs]
    for name, kind in (("steps", "steps"), ("evaluations", "evaluations")):
        rows = [_scalars(group, run, line) for group, run in runs for line in getattr(run, kind)]
        _write(folder / f"{name}.csv", rows)
    _write(
        folder / "by_position.csv",
        [
            {**_about(group, run), "step": line["step"], **entry}
            for group, run in runs
            for line in run.evaluations
            for entry in line.get("by_position", ())
        ],
    )


def _scalars(group: Group, run: RunRecord, line: Mapping[str, Any]) -> dict[str, Any]:
    return {**_about(group, run), **{key: value for key, value in line.items() if not isinstance(value, list | dict)}}


def _about(group: Group, run: RunRecord) -> dict[str, Any]:
    return {"run": run.name, "group": group.label, "seed": run.mathematics.get("seed")}


def _write(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    rows = list(rows)
    names = list(dict.fromkeys(name for row in rows for name in row))
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, names)
        writer.writeheader()
        writer.writerows(rows)


def _has(group: Group, name: str) -> bool:
    return any(last_evaluation(name)(run) is not None for run in group.runs)


def _difference(found: Mean | None) -> str:
    if found is None:
        return "–"
    sign = "+" if found.value >= 0 else ""
    return f"{sign}{found}{' *' if found.excludes_zero else ''}"


def _total(run: RunRecord, name: str) -> float:
    return sum(float(line.get(name, 0.0)) for line in run.steps)


def _range(run: RunRecord, name: str) -> str:
    values = [int(line.get(name, 0)) for line in run.steps]
    return f"{min(values)}" if min(values) == max(values) else f"{min(values)} to {max(values)}"
