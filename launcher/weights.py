"""Weights: where a config's objective puts its weight, on its own data, `python launcher/weights.py CONFIG`.

Needs no GPU and loads no model; tokenises the training rows if that is not done.
"""

from __future__ import annotations

import importlib.util
import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from launcher.imports import quick_imports
from launcher.options import Overrides, bounded
from launcher.outcome import person_errors, say, writing
from seqaware.config.loading import load_config
from seqaware.distributed.process_group import prepare_environment
from seqaware.errors import ConfigError

app = typer.Typer(add_completion=False)


@app.command()
def weights(
    config: Annotated[Path | None, typer.Argument(help="The run's YAML; default: train_configs/default.yaml.")] = None,
    overrides: Overrides = None,
    documents: Annotated[
        int | None,
        typer.Option(metavar="N", min=1, callback=bounded, help="Weigh only so many documents; default: all."),
    ] = None,
    lost: Annotated[
        bool,
        typer.Option(
            show_default=False, help="Do or do not tokenise overlong rows again, to see what truncation loses."
        ),
    ] = True,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the figures here; - prints them.")] = None,
    png: Annotated[Path | None, typer.Option(help="Draw them here, with matplotlib.")] = None,
) -> None:
    """Show w over k, the share of the loss by position and by document length, and what a clip means on this scale.

    Examples:

        seqaware weights train_configs/demo.yaml

        seqaware weights my.yaml --set training.sft.gamma=0.999 --png weights.png
    """
    with person_errors():
        if png is not None and importlib.util.find_spec("matplotlib") is None:
            raise ConfigError("--png needs the package matplotlib", do="pip install matplotlib")
        settings = load_config(config, overrides or [])
        prepare_environment()
        with quick_imports():
            from rich.console import Console

            from seqaware.report.weight_text import draw_weights, show_weights, weight_lines
            from seqaware.tools.inspect_rows import training_rows
            from seqaware.tools.weight_distribution import weights_view

        view = weights_view(settings, training_rows(settings), documents=documents, find_lost=lost)
        if json_file is not None:
            text = json.dumps({"gamma": settings.training.sft.discount, **asdict(view)}, indent=1)
            if str(json_file) == "-":
                say(text)
                return
            with writing("--json", json_file):
                json_file.write_text(text + "\n", encoding="utf-8")
        if png is not None:
            with writing("--png", png):
                draw_weights(view, png, title=f"γ = {settings.training.sft.discount:.6g}")
        show_weights(view, list(weight_lines(view, settings)), console=Console(highlight=False))


if __name__ == "__main__":
    app()
