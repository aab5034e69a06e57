"""Prepare: tokenise a run's data ahead of time, `python launcher/prepare.py CONFIG`, so that no GPU waits for it.

Needs no GPU and no ranks. A run with the same data, format and tokenizer finds the store and starts at once.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from launcher.outcome import person_errors
from seqaware.config.load import load_config
from seqaware.engine.ranks import prepare_environment

app = typer.Typer(add_completion=False)


@app.command()
def prepare(
    config: Annotated[Path | None, typer.Argument(help="The run's YAML; default: train_configs/default.yaml.")] = None,
    overrides: Annotated[list[str] | None, typer.Option("--set", help="key=value, repeatable.")] = None,
) -> None:
    """Tokenise the training rows of a config, and its held-out rows.

    Example:

        python launcher/prepare.py train_configs/smollm2.yaml --set dataset.workers=16
    """
    with person_errors():
        settings = load_config(config, overrides or [])
        prepare_environment()
        from seqaware.report.progress import RowCounter
        from seqaware.training.prepare import prepare_data

        for store in prepare_data(settings, progress=RowCounter(typer.echo)):
            typer.echo(f"prepared    {store}")


if __name__ == "__main__":
    app()
