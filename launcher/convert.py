"""Convert: `python launcher/convert.py CHECKPOINT FOLDER` writes DeepSpeed's universal checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from launcher.imports import quick_imports
from launcher.outcome import person_errors, say
from seqaware.distributed.process_group import prepare_environment

app = typer.Typer(add_completion=False)


@app.command()
def convert(
    checkpoint: Annotated[Path, typer.Argument(help="A checkpoint's folder: runs/NAME/checkpoints/step-….")],
    folder: Annotated[Path, typer.Argument(help="The folder to make.")],
) -> None:
    """Write a checkpoint in DeepSpeed's universal format: for other programs, or to keep it for any topology.
    This program needs no conversion: it resumes its own checkpoints on any number of ranks and any ZeRO stage.

    Examples:

        seqaware convert runs/demo/checkpoints/step-00000340 runs/demo/universal/step-00000340

        deepspeed launcher/train.py train_configs/demo.yaml --resume runs/demo/universal/step-00000340
    """
    with person_errors():
        prepare_environment()
        with quick_imports():
            from seqaware.checkpoint.universal import convert as convert_checkpoint
        parameters, size = convert_checkpoint(checkpoint, folder)
        say(f"converted   {parameters} parameters, {size / 1e9:.2f} GB, to {folder}")


if __name__ == "__main__":
    app()
