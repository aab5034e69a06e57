"""Several runs side by side: which are the same but for their seed, what differs, and by how much it matters.

Runs with the same mathematics but for the seed are a group; a group's figures are means over its seeds. Two groups are
compared seed by seed: runs of one seed start from the same weights and see the same rows in the same order, so that the
differences of pairs say more than the difference of the means.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from seqaware.metrics.intervals import Mean, mean
from seqaware.report.run_record import RunRecord

Figure = Callable[[RunRecord], float | None]

_ADVICE = "weighted losses of different objectives are different quantities: compare unweighted ones"


@dataclass(frozen=True)
class Group:
    """Runs that differ in their seed alone. label: what tells the group from the others."""

    label: str
    runs: tuple[RunRecord, ...]

    @property
    def seeds(self) -> dict[Any, RunRecord]:
        """The runs by their seed; of several with one seed the last."""
        return {run.mathematics.get("seed"): run for run in self.runs}

    def mean(self, figure: Figure) -> Mean:
        return mean([value for run in self.runs if (value := figure(run)) is not None])


def groups_of(runs: Sequence[RunRecord]) -> list[Group]:
    """The groups, by their γ, then in the order in which they were named."""
    found: dict[str, list[RunRecord]] = {}
    for run in runs:
        found.setdefault(_identity(run), []).append(run)
    members = sorted(found.values(), key=lambda each: _gamma(each[0]))
    labels = _labels([each[0] for each in members])
    return [Group(label, tuple(each)) for label, each in zip(labels, members, strict=True)]


def baseline_of(groups: Sequence[Group]) -> Group | None:
    """What the others are held against: plain cross-entropy where there is one, else the first; None for one group."""
    if len(groups) < 2:
        return None
    return next((group for group in groups if _is_plain(group.runs[0])), groups[0])


def paired(group: Group, baseline: Group, figure: Figure) -> Mean | None:
    """The mean over seeds of group − baseline; None where they have no seed in common."""
    ours, theirs = group.seeds, baseline.seeds
    pairs = [(figure(run), figure(theirs[seed])) for seed, run in ours.items() if seed in theirs]
    differences = [a - b for a, b in pairs if a is not None and b is not None]
    return mean(differences) if differences else None


def differences(runs: Sequence[RunRecord]) -> list[tuple[str, list[str]]]:
    """The keys of the configs and topologies that are not the same in all runs, with each run's value."""
    flat = [dict(_flat(_settings(run))) for run in runs]
    names = sorted({name for each in flat for name in each} - {"output.dir"})
    rows = [(name, [_shown(each.get(name)) for each in flat]) for name in names]
    return [(name, values) for name, values in rows if len(set(values)) > 1]


def cautions(runs: Sequence[RunRecord]) -> list[str]:
    """What a reader must know before comparing these runs, in words."""
    found = []
    objectives = {json.dumps(run.objective, sort_keys=True) for run in runs}
    if len(objectives) > 1:
        found.append(f"The runs have {len(objectives)} different objectives; {_ADVICE}.")
    if len({json.dumps(run.mathematics.get("data"), sort_keys=True) for run in runs}) > 1:
        found.append("The runs were trained on different data.")
    held_out = {json.dumps((run.config.get("evaluation") or {}).get("dataset"), sort_keys=True) for run in runs}
    if len(held_out) > 1:
        found.append("The runs were evaluated on different held-out rows: their evaluations cannot be compared.")
    ends = {run.done for run in runs}
    if len(ends) > 1:
        found.append(f"The runs stand at different steps, from {min(ends)} to {max(ends)}.")
    counted = {str(run.objective.get("positions")) for run in runs}
    if len(counted) > 1:
        found.append(f"The runs count positions in different ways ({', '.join(sorted(counted))}): buckets differ.")
    return found


def last_evaluation(name: str) -> Figure:
    """A figure of a run's last look at the held-out rows."""

    def figure(run: RunRecord) -> float | None:
        value = run.evaluations[-1].get(name) if run.evaluations else None
        return float(value) if isinstance(value, int | float) else None

    return figure


def position_loss(first: int) -> Figure:
    """The held-out loss of the bucket that begins at k = first, at the last evaluation."""

    def figure(run: RunRecord) -> float | None:
        entries = run.evaluations[-1].get("by_position", ()) if run.evaluations else ()
        return next((float(entry["loss"]) for entry in entries if entry["from"] == first), None)

    return figure


def buckets(runs: Sequence[RunRecord]) -> list[tuple[int, int | None]]:
    """The buckets of positions that any of the runs has, as (first k, last k)."""
    found = {
        (int(entry["from"]), entry["to"])
        for run in runs
        for line in run.evaluations[-1:]
        for entry in line.get("by_position", ())
    }
    return sorted(found, key=lambda each: each[0])


def bucket_name(first: int, last: int | None) -> str:
    return f"k = {first}" if first == last else f"k = {first} …" if last is None else f"k = {first} – {last}"


def _identity(run: RunRecord) -> str:
    shared = {name: value for name, value in run.mathematics.items() if name != "seed"}
    return json.dumps(shared, sort_keys=True) if shared else str(run.path)


def _gamma(run: RunRecord) -> float:
    return float(run.objective.get("gamma", 0.0))


def _is_plain(run: RunRecord) -> bool:
    objective = run.objective
    return objective.get("weighting") == "uniform" or (
        objective.get("weighting") == "log_suffix" and objective.get("gamma") == 0.0
    )


def _labels(first: Sequence[RunRecord]) -> list[str]:
    if len(first) == 1:
        return [f"γ = {_gamma(first[0]):g}" if first[0].objective else first[0].name]
    flat = [{key: v for key, v in _flat(run.mathematics) if key != "seed"} for run in first]
    names = sorted({name for each in flat for name in each})
    telling = [name for name in names if len({_shown(each.get(name)) for each in flat}) > 1]
    if not telling or len(telling) > 3 or not all(flat):
        return [run.name for run in first]
    return [", ".join(_says(name, each.get(name)) for name in telling) for each in flat]


def _says(name: str, value: Any) -> str:
    is_gamma = name == "objective.gamma" and value is not None
    return f"γ = {value:g}" if is_gamma else f"{name.rpartition('.')[2]} {_shown(value)}"


def _settings(run: RunRecord) -> dict[str, Any]:
    attempts = run.manifest.get("attempts") or [{}]
    topology = attempts[-1].get("topology") or {}
    about = {"seqaware": run.manifest.get("seqaware"), "git_revision": run.manifest.get("git_revision")}
    return {**run.config, "topology": topology, "data_fingerprint": run.manifest.get("data_fingerprint"), **about}


def _flat(values: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{above}{key}.")
        else:
            yield f"{above}{key}", value


def _shown(value: Any) -> str:
    return "—" if value is None else value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
