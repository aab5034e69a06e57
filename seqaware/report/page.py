"""A report: one HTML file that opens anywhere, with PNG, SVG and CSV files beside it."""

from __future__ import annotations

import base64
import io
import time
from collections.abc import Sequence
from pathlib import Path

import jinja2
from matplotlib.figure import Figure

from seqaware import __version__
from seqaware.errors import DataError
from seqaware.metrics.alerts import limits_of, standing_alerts
from seqaware.report import tables
from seqaware.report.compare import Group, baseline_of, cautions, groups_of, last_evaluation, paired
from seqaware.report.page_template import PAGE, as_shown
from seqaware.report.plots import figures, runs_of
from seqaware.report.run_record import Line, RunRecord, read_run
from seqaware.report.tables import ReportSection

_EVALUATION_FIGURES = ("evaluation", "exact_match", "position_end", "position_differences", "position_time", "weights")
_PNG_DPI = 150


def write_report(paths: Sequence[Path], *, out: Path) -> Path:
    """Write the report of these runs into a folder; returns the page.

    Raises:
        DataError: a folder holds no run, or nothing can be written.
    """
    runs = [read_run(path) for path in paths]
    if not runs:
        raise DataError("there is no run to report")
    try:
        out.mkdir(parents=True, exist_ok=True)
        page = out / "index.html"
        page.write_text(_render(groups_of(runs), out), encoding="utf-8")
    except OSError as error:
        where = f"{out} ({error.strerror})"
        raise DataError("the report cannot be written", got=where, do="name another --out") from error
    return page


def _render(groups: Sequence[Group], out: Path) -> str:
    runs = runs_of(groups)
    tables.write_csv(out, groups)
    drawn = {name: _saved(name, caption, figure, out) for name, caption, figure in figures(groups)}
    evaluation = [drawn[name] for name in _EVALUATION_FIGURES if name in drawn]
    others = [each for name, each in drawn.items() if name not in _EVALUATION_FIGURES]
    sections = [
        tables.outcomes(groups),
        tables.positions(groups),
        ReportSection("Evaluation", figures=evaluation),
        ReportSection("Training", figures=others),
        tables.results(runs),
        tables.runs_table(groups),
        *(_of_each(runs)),
        tables.config_differences(runs),
        _problems(runs),
    ]
    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, undefined=jinja2.StrictUndefined, finalize=as_shown
    )
    return environment.from_string(PAGE).render(
        title=runs[0].name if len(runs) == 1 else f"{len(runs)} runs, {len(groups)} settings",
        subtitle=_subtitle(runs),
        findings=findings(groups),
        cautions=cautions(runs) if len(runs) > 1 else [],
        alerts=[f"{run.name}: {alert}" for run in runs for alert in standing_alerts(run.lines, limits_of(run.plan))],
        sections=[each for each in sections if each is not None and (each.rows or each.figures)],
        foot=f"Made by seqaware {__version__} on {time.strftime('%Y-%m-%d %H:%M')}. "
        "Every figure lies beside this page as PNG and SVG, every number as CSV.",
    )


def findings(groups: Sequence[Group]) -> list[str]:
    """What the evaluations say, in sentences; differences with their intervals, and what they do not tell."""
    baseline = baseline_of(groups)
    if baseline is None:
        first = groups[0].runs[0].evaluations[:1]
        now = groups[0].mean(last_evaluation("unweighted_loss"))
        if not first or now.runs == 0:
            return ["No held-out rows were evaluated."]
        return [f"Held-out loss {first[0]['unweighted_loss']:.4f} → {now} nats a token, unweighted."]
    found = []
    for group in groups:
        if group is not baseline:
            found.append(f"{group.label} against {baseline.label}: {_finding(group, baseline)}.")
    return found


def _finding(group: Group, baseline: Group) -> str:
    parts = []
    for name, says, better in (("unweighted_loss", "held-out loss", -1), ("exact_match", "exact match", 1)):
        difference = paired(group, baseline, last_evaluation(name))
        if difference is None:
            continue
        if difference.half is None:
            verdict = "one seed, so no interval"
        elif not difference.excludes_zero:
            verdict = "no difference that these seeds can tell from chance"
        else:
            verdict = "better" if difference.value * better > 0 else "worse"
        sign = "+" if difference.value >= 0 else ""
        parts.append(f"{says} {sign}{difference} ({verdict})")
    return "; ".join(parts) or "no evaluation in common"


def _subtitle(runs: Sequence[RunRecord]) -> str:
    if len(runs) > 1:
        return ", ".join(run.name for run in runs)
    run = runs[0]
    objective = run.objective
    known = f"{objective.get('weighting')} weights, γ = {objective.get('gamma', 0):g}"
    what = known if objective else "no objective known"
    return f"{run.path} · {run.state()} · step {run.done} of {run.total_steps or '?'} · {what}"


def _of_each(runs: Sequence[RunRecord]) -> list[ReportSection | None]:
    """The sections about single runs; of many runs only the first's plan, which is the others' too."""
    plans = [tables.plan_against_run(run) for run in (runs if len(runs) <= 3 else runs[:1]) if run.plan]
    return [*plans, *(tables.certificate(run) for run in runs)]


def _problems(runs: Sequence[RunRecord]) -> ReportSection | None:
    rows = [[run.name, note] for run in runs for note in run.notes]
    for run in runs:
        rows += [[run.name, _event(line)] for line in run.troubles]
    return ReportSection("What went wrong, or could not be read", (), ["run", ""], rows, prose=True) if rows else None


def _event(line: Line) -> str:
    more = ", ".join(f"{key} {value}" for key, value in line.items() if key not in ("kind", "step"))
    return f"{line['kind']} at step {line.get('step')}: {more}"


def _saved(name: str, caption: str, figure: Figure, out: Path) -> dict[str, str]:
    figure.savefig(out / f"{name}.png", dpi=_PNG_DPI)
    # The same bytes for the same runs: no date, no random ids.
    buffer = io.BytesIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    (out / f"{name}.svg").write_bytes(buffer.getvalue())
    return {"caption": caption, "svg": base64.b64encode(buffer.getvalue()).decode()}
