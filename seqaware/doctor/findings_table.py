"""The doctor's findings as a table: in colours on a terminal, plain in a log file, readable at 60 columns."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from seqaware.doctor.findings import Finding, Level
from seqaware.masking import escaped

_WORD = {Level.OK: "ok", Level.WARNING: "warning", Level.ERROR: "ERROR"}
_STYLE = {Level.OK: "green", Level.WARNING: "yellow", Level.ERROR: "bold red"}
_HOSTS_SHOWN = 4


def show(findings: Sequence[Finding], *, hosts: int, console: Console) -> None:
    """Print the table and the sum of it.

    Args:
        hosts: how many were looked at: with one, or where all are alike, no finding needs their names.
    """
    table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold", max_width=max(12, console.width // 4))
    table.add_column(overflow="fold")
    for finding in findings:
        word = Text(_WORD[finding.level], style=_STYLE[finding.level])
        table.add_row(word, Text(escaped(finding.subject)), _described(finding, hosts))
    with console.capture() as captured:
        console.print(table)
        console.print(Text(summary(findings)))
    # rich fills every line up to the column's width; a log file is to hold what was said.
    for line in captured.get().splitlines():
        print(line.rstrip(), file=console.file)
    console.file.flush()


def summary(findings: Sequence[Finding]) -> str:
    """`2 errors, 1 warning, 30 ok`."""
    counts = {level: sum(finding.level == level for finding in findings) for level in Level}
    errors, warnings = counts[Level.ERROR], counts[Level.WARNING]
    parts = [
        f"{errors} error{'s' * (errors != 1)}",
        f"{warnings} warning{'s' * (warnings != 1)}",
        f"{counts[Level.OK]} ok",
    ]
    return ", ".join(parts)


def _described(finding: Finding, hosts: int) -> Text:
    text = Text(escaped(finding.found))
    if hosts > 1 and 0 < len(finding.hosts) < hosts:
        shown = finding.hosts[:_HOSTS_SHOWN]
        more = f" and {len(finding.hosts) - len(shown)} more" if len(finding.hosts) > len(shown) else ""
        text.append(escaped(f" [{', '.join(shown)}{more}]"))
    if finding.do:
        text.append("\n-> " + escaped(finding.do), style="bold")
    return text
