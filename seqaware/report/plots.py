"""The figures of a report, as a paper would take them: every one a matplotlib figure of its own.

A colour is a group of runs; a thin line is a run, a thick one the mean of its group. Colours are Okabe and Ito's, which
people with any colour vision tell apart.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from statistics import fmean
from typing import Any

import matplotlib
from matplotlib import ticker
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from seqaware.masking import escaped
from seqaware.metrics.intervals import wilson
from seqaware.report.compare import Group, baseline_of, bucket_name, buckets, last_evaluation, paired, position_loss
from seqaware.report.run_record import Line, RunRecord

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#F0E442")
_SIZE = (6.4, 3.6)
_POINTS = 1500
_STYLE: dict[Any, Any] = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "legend.frameon": False,
    "legend.fontsize": 8,
    "figure.constrained_layout.use": True,
}


def figures(groups: Sequence[Group]) -> Iterator[tuple[str, str, Figure]]:
    """(file name, caption, figure) of all that these runs can show."""
    groups = [replace(group, label=_plain(group.label)) for group in groups]
    with matplotlib.rc_context(_STYLE):
        for name, caption, draw in _ALL:
            figure = Figure(figsize=_SIZE)
            if draw(figure.add_subplot(), groups):
                yield name, caption, figure


def _plain(text: str) -> str:
    """Text of any origin as matplotlib draws it: a dollar sign would begin mathematics."""
    return escaped(text).replace("$", r"\$")


def _loss(axes: Axes, groups: Sequence[Group]) -> bool:
    return _lines(axes, groups, "unweighted_loss", label="nats a token, unweighted", log=True)


def _weighted(axes: Axes, groups: Sequence[Group]) -> bool:
    return _lines(axes, groups, "loss", label="weighted, as normalised", log=True)


def _rate(axes: Axes, groups: Sequence[Group]) -> bool:
    return _lines(axes, groups[:1], "lr", label="learning rate", log=False)


def _norm(axes: Axes, groups: Sequence[Group]) -> bool:
    return _lines(axes, groups, "grad_norm", label="gradient norm before clipping", log=True)


def _throughput(axes: Axes, groups: Sequence[Group]) -> bool:
    return _lines(axes, groups, "tokens_per_second", label="tokens a second", log=False)


def _mfu(axes: Axes, groups: Sequence[Group]) -> bool:
    return _lines(axes, groups, "mfu", label="model FLOPs utilisation", log=False)


def _memory(axes: Axes, groups: Sequence[Group]) -> bool:
    return _lines(axes, groups, "peak_memory_gb", label="peak memory of rank 0, GB", log=False)


def _waste(axes: Axes, groups: Sequence[Group]) -> bool:
    return _lines(axes, groups, "padding_share", label="share of places that hold no token", log=False)


def _lines(axes: Axes, groups: Sequence[Group], name: str, *, label: str, log: bool) -> bool:
    """Every run thin and smoothed, and its group's mean thick where there are several."""
    drawn = False
    for group, colour in _coloured(groups):
        curves = [curve for run in group.runs if (curve := _curve(run.steps, name))]
        for steps, values in curves:
            alone = len(curves) == 1
            axes.plot(
                steps, values, color=colour, lw=1.4 if alone else 0.6, alpha=1.0 if alone else 0.45,
                label=group.label if alone else None,
            )  # fmt: skip
        if len(curves) > 1:
            axes.plot(*_mean_curve(curves), color=colour, lw=1.8, label=group.label)
        drawn = drawn or bool(curves)
    return _finish(axes, drawn, x="optimizer step", y=label, log=log)


def _evaluation(axes: Axes, groups: Sequence[Group]) -> bool:
    drawn = False
    for group, colour in _coloured(groups):
        curves = [curve for run in group.runs if (curve := _curve(run.evaluations, "unweighted_loss", smooth=False))]
        for steps, values in curves:
            axes.plot(steps, values, color=colour, lw=0.6, alpha=0.45)
        if curves:
            axes.plot(*_mean_curve(curves), color=colour, lw=1.8, marker="o", ms=3, label=group.label)
        drawn = drawn or bool(curves)
    return _finish(axes, drawn, x="optimizer step", y="held-out nats a token, unweighted", log=True)


def _exact_match(axes: Axes, groups: Sequence[Group]) -> bool:
    """Every run's last share of right answers with Wilson's interval."""
    place, names = 0, []
    for group, colour in _coloured(groups):
        for run in group.runs:
            share, of = last_evaluation("exact_match")(run), last_evaluation("questions")(run)
            if share is None or of is None:
                continue
            low, high = wilson(share, int(of))
            axes.errorbar(place, share, yerr=[[share - low], [high - share]], fmt="o", color=colour, capsize=2, ms=4)
            names.append(f"{group.label}\nseed {run.mathematics.get('seed', '?')}")
            place += 1
    axes.set_xticks(range(place), names, fontsize=6 if place > 6 else 8)
    return _finish(axes, place > 0, x="", y="exact match, 95 % interval of the rows", legend=False)


def _position_over_time(axes: Axes, groups: Sequence[Group]) -> bool:
    """One bucket a line, for the first run of the group with the largest γ."""
    run = groups[-1].runs[0]
    found = buckets([run])
    for number, (first, last) in enumerate(found):
        points = [
            (int(line["step"]), float(entry["loss"]))
            for line in run.evaluations
            for entry in line.get("by_position", ())
            if entry["from"] == first
        ]
        shade = 0.15 + 0.8 * number / max(1, len(found) - 1)
        axes.plot(
            *zip(*points, strict=True), color=matplotlib.colormaps["viridis"](1.0 - shade), marker="o", ms=2.5, lw=1.3,
            label=bucket_name(first, last),
        )  # fmt: skip
    axes.set_title(f"{groups[-1].label}, {_plain(run.name)}", fontsize=9)
    return _finish(axes, bool(found), x="optimizer step", y="held-out nats a token", log=True)


def _position_at_end(axes: Axes, groups: Sequence[Group]) -> bool:
    found = buckets([run for group in groups for run in group.runs])
    _per_bucket(axes, groups, found, lambda group, first: group.mean(position_loss(first)))
    return _finish(axes, bool(found), x="position k among the tokens with loss", y="held-out nats a token", log=True)


def _position_differences(axes: Axes, groups: Sequence[Group]) -> bool:
    baseline = baseline_of(groups)
    found = buckets([run for group in groups for run in group.runs])
    if baseline is None or not found:
        return False
    others = [group for group in groups if group is not baseline]
    _per_bucket(axes, others, found, lambda group, first: paired(group, baseline, position_loss(first)), first_colour=1)
    axes.axhline(0.0, color="black", lw=0.8)
    y = f"held-out nats a token, minus {baseline.label}"
    return _finish(axes, True, x="position k among the tokens with loss", y=y)


def _per_bucket(
    axes: Axes,
    groups: Sequence[Group],
    found: Sequence[tuple[int, int | None]],
    value: Callable[[Group, int], Any],
    *,
    first_colour: int = 0,
) -> None:
    width = 0.6 / max(1, len(groups))
    for number, group in enumerate(groups):
        means = [value(group, first) for first, _ in found]
        places = [place - 0.3 + width * (number + 0.5) for place in range(len(found))]
        shown = [(x, m.value, m.half or 0.0) for x, m in zip(places, means, strict=True) if m is not None]
        if shown:
            x, y, half = zip(*shown, strict=True)
            colour = COLOURS[(number + first_colour) % len(COLOURS)]
            axes.errorbar(x, y, yerr=half, fmt="o", ms=4, capsize=2, lw=1.2, color=colour, label=group.label)
    names = [bucket_name(first, last).removeprefix("k = ") for first, last in found]
    axes.set_xticks(range(len(found)), names, fontsize=8)


def _weights(axes: Axes, groups: Sequence[Group]) -> bool:
    """The mean weight of each bucket as it was measured, and the formula where it is that of log_suffix."""
    drawn = False
    for group, colour in _coloured(groups):
        run = group.runs[0]
        entries = run.evaluations[-1].get("by_position", ()) if run.evaluations else ()
        if entries:
            middles = [math.sqrt(entry["from"] * (entry["to"] or 2 * entry["from"])) for entry in entries]
            axes.plot(middles, [entry["weight"] for entry in entries], "o", color=colour, ms=4, label=group.label)
            drawn = True
        objective = run.objective
        if objective.get("weighting") == "log_suffix" and objective.get("scale") == "raw":
            longest = int((run.plan.get("data") or {}).get("longest") or 128)
            ks = sorted({round(2 ** (i / 8)) for i in range(int(8 * math.log2(max(2, longest))) + 1)})
            axes.plot(ks, [_suffix_weight(k, float(objective.get("gamma", 0.0))) for k in ks], color=colour, lw=1.2)
            drawn = True
    axes.set_xscale("log", base=2)
    return _finish(axes, drawn, x="position k", y="weight w", log=True)


def _suffix_weight(k: int, gamma: float) -> float:
    if gamma in (0.0, 1.0):
        return 1.0 if gamma == 0.0 else float(k)
    return math.expm1(k * math.log(gamma)) / math.expm1(math.log(gamma))


def _coloured(groups: Sequence[Group]) -> Iterator[tuple[Group, str]]:
    for number, group in enumerate(groups):
        yield group, COLOURS[number % len(COLOURS)]


def _finish(axes: Axes, drawn: bool, *, x: str, y: str, log: bool = False, legend: bool = True) -> bool:
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    if log and drawn and axes.dataLim.y0 > 0:
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(ticker.FormatStrFormatter("%g"))
        # On a short axis the numbers between the powers of ten are those that are needed.
        decades = math.log10(axes.dataLim.y1 / axes.dataLim.y0)
        minor = ticker.FormatStrFormatter("%g") if decades < 1.3 else ticker.NullFormatter()
        axes.yaxis.set_minor_formatter(minor)
    if legend and drawn and axes.get_legend_handles_labels()[0]:
        axes.legend(ncols=2)
    return drawn


def _curve(lines: Sequence[Line], name: str, *, smooth: bool = True) -> tuple[list[int], list[float]] | None:
    """Steps and values; long curves as means of equal stretches, which keep what a thinned one would lose."""
    points = [(int(line["step"]), float(line[name])) for line in lines if _is_finite(line.get(name))]
    if not points:
        return None
    stretch = -(-len(points) // min(_POINTS, max(1, len(points) // 4 if smooth and len(points) > 200 else len(points))))
    parts = [points[i : i + stretch] for i in range(0, len(points), stretch)]
    return [part[-1][0] for part in parts], [fmean(value for _, value in part) for part in parts]


def _is_finite(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _mean_curve(curves: Sequence[tuple[list[int], list[float]]]) -> tuple[list[int], list[float]]:
    """The mean at the steps that every curve has."""
    tables: list[Mapping[int, float]] = [dict(zip(*curve, strict=True)) for curve in curves]
    steps = sorted(set.intersection(*(set(table) for table in tables)))
    return steps, [fmean(table[step] for table in tables) for step in steps]


_ALL: tuple[tuple[str, str, Callable[[Axes, Sequence[Group]], bool]], ...] = (
    ("loss", "Training loss, unweighted: what different objectives have in common.", _loss),
    ("loss_weighted", "Training loss as weighed. Between different objectives it cannot be compared.", _weighted),
    ("evaluation", "Loss over the held-out rows, unweighted.", _evaluation),
    ("exact_match", "Held-out answers that are right, with Wilson's 95 % interval over the rows.", _exact_match),
    ("position_end", "Held-out loss by position, last evaluation; bars: 95 % over seeds.", _position_at_end),
    ("position_differences", "The same minus the baseline, seed by seed; bars: 95 %.", _position_differences),
    ("position_time", "Held-out loss by position over time.", _position_over_time),
    ("weights", "A token's weight by its position: lines the formula, points what was measured.", _weights),
    ("grad_norm", "Norm of the gradient before clipping.", _norm),
    ("learning_rate", "Learning rate.", _rate),
    ("throughput", "Tokens a second over all ranks.", _throughput),
    ("mfu", "Share of the device's peak that the model's own arithmetic reaches.", _mfu),
    ("memory", "Peak memory.", _memory),
    ("padding", "Padding: places that are computed and hold no token of a document.", _waste),
)


def runs_of(groups: Sequence[Group]) -> list[RunRecord]:
    """All runs, group by group."""
    return [run for group in groups for run in group.runs]
