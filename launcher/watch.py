"""Watch: `seqaware watch RUN`: a live view of a run in the terminal, from its files."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.live import Live

from launcher.outcome import person_errors
from seqaware.report.live_view import frame, is_over

app = typer.Typer(add_completion=False)


@app.command()
def watch(
    run: Annotated[Path, typer.Argument(help="The run's folder, on any disk that this machine sees.")],
    once: Annotated[bool, typer.Option("--once", help="Show one frame and stop.")] = False,
    every: Annotated[float, typer.Option(metavar="X", min=0.2, max=3600, help="Seconds between two looks.")] = 2.0,
) -> None:
    """Show how a run stands: progress, losses, held-out loss by position, and what is wrong, in words.
    Nothing is asked of the run itself: it may be on another machine. Ctrl-C ends the view, never the run.

    Examples:

        seqaware watch runs/demo

        seqaware watch runs/demo --once
    """
    with person_errors():
        console = Console()
        plain = console.legacy_windows or not console.encoding.lower().startswith("utf")

        def look() -> object:
            return frame(run, width=console.width, plain=plain)

        if once or not console.is_terminal:
            console.print(look())
            return
        try:
            with Live(look(), console=console, auto_refresh=False, screen=False) as live:  # type: ignore[arg-type]
                while not is_over(run):
                    time.sleep(every)
                    live.update(look(), refresh=True)  # type: ignore[arg-type]
        except KeyboardInterrupt:
            return


if __name__ == "__main__":
    app()
