"""Where a reported line goes: into metrics.jsonl, to the services that track runs, and past the alerts."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from seqaware.metrics.alerts import Alerts
from seqaware.metrics.metrics_file import MetricsWriter
from seqaware.metrics.trackers import Trackers


class ReportingMetricsWriter(MetricsWriter):
    """metrics.jsonl, whose lines are told further.

    Args:
        path, from_step: as for `MetricsFile`. say: shows a line to the person.
    """

    def __init__(
        self, path: Path, *, from_step: int, trackers: Trackers, alerts: Alerts, say: Callable[[str], None]
    ) -> None:
        super().__init__(path, from_step=from_step)
        self._trackers = trackers
        self._alerts = alerts
        self._say = say
        if self.lost:
            first = self.lost[0]
            which = f"line {first}" if len(self.lost) == 1 else f"{len(self.lost)} lines (the first is line {first})"
            say(f"warning     {path}: left out {which} that could not be read; the training needs none of it")

    def write(self, line: Mapping[str, Any]) -> None:
        super().write(line)
        self._trackers.write(line)
        for alert in self._alerts.see(line):
            self._say(f"warning     step {line['step']}: {alert}")

    def close(self) -> None:
        try:
            super().close()
        finally:
            self._trackers.close()
