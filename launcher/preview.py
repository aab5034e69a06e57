"""Preview: the packed rows of a step as a person reads them, `python launcher/preview.py CONFIG`.

Token text, position k, which tokens carry loss, their weights, and where documents begin. Needs no GPU and loads no
model; tokenises the training rows if that is not done.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from launcher.imports import quick_imports
from launcher.options import Overrides, bounded, bounded_ranks
from launcher.outcome import person_errors, say, writing
from seqaware.config.loading import load_config
from seqaware.distributed.process_group import prepare_environment

app = typer.Typer(add_completion=False)


@app.command()
def preview(
    config: Annotated[Path | None, typer.Argument(help="The run's YAML; default: train_configs/default.yaml.")] = None,
    overrides: Overrides = None,
    step: Annotated[int, typer.Option(metavar="N", min=1, callback=bounded, help="Of this optimizer step.")] = 1,
    rows: Annotated[int, typer.Option(metavar="N", min=1, callback=bounded, help="Show so many rows.")] = 2,
    documents: Annotated[
        int,
        typer.Option(metavar="N", min=1, callback=bounded, help="Show so many documents of a row, in the terminal."),
    ] = 4,
    ranks: Annotated[
        int | None,
        typer.Option(metavar="N", min=1, callback=bounded_ranks, help="As the run on so many ranks lays them out."),
    ] = None,
    html: Annotated[Path | None, typer.Option(help="Write a page of it here.")] = None,
) -> None:
    """Show the packed rows of a step: text, position k, loss or not, and weights.

    Examples:

        seqaware preview train_configs/demo.yaml

        seqaware preview my.yaml --step 100 --rows 8 --html rows.html
    """
    with person_errors():
        settings = load_config(config, overrides or [])
        prepare_environment()
        with quick_imports():
            from rich.console import Console

            from seqaware.report.preview import show_preview
            from seqaware.report.preview_html import preview_html
            from seqaware.tools.inspect_rows import training_rows
            from seqaware.tools.preview_rows import PreviewRequest
            from seqaware.tools.preview_rows import preview as lay_out

        found = lay_out(settings, training_rows(settings), PreviewRequest(step, rows, ranks))
        if html is not None:
            with writing("--html", html):
                html.write_text(preview_html(found), encoding="utf-8")
            say(f"preview     {html}")
        else:
            show_preview(found, console=Console(highlight=False), documents=documents)


if __name__ == "__main__":
    app()
