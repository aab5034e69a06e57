"""Report: `seqaware report RUN [RUN …]`: runs as one HTML page that opens anywhere, figures and tables beside it."""

from __future__ import annotations

import os.path
from pathlib import Path
from typing import Annotated

import typer

from launcher.outcome import person_errors, say

app = typer.Typer(add_completion=False)


@app.command()
def report(
    runs: Annotated[list[Path], typer.Argument(help="Run folders: one, or several to compare.")],
    out: Annotated[
        Path | None, typer.Option(help="Folder to write; default: report, in the run or beside the runs.")
    ] = None,
) -> None:
    """Write one HTML page about a run, or a comparison of several.

    Examples:

        seqaware report runs/demo

        seqaware report runs/demo-sweep/gamma-*
    """
    with person_errors():
        from seqaware.report.page import write_report

        folders = list(dict.fromkeys(path.resolve() for path in runs))
        beside = folders[0] if len(folders) == 1 else Path(os.path.commonpath([path.parent for path in folders]))
        say(f"report      {write_report(folders, out=out or beside / 'report')}")


if __name__ == "__main__":
    app()
