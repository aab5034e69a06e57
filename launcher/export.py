"""Export: `python launcher/export.py CHECKPOINT FOLDER` makes a Hugging Face folder of any checkpoint, on one CPU."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from launcher.imports import quick_imports
from launcher.outcome import person_errors, say
from seqaware.distributed.process_group import prepare_environment
from seqaware.errors import ConfigError

app = typer.Typer(add_completion=False)


@app.command()
def export(
    checkpoint: Annotated[
        Path, typer.Argument(help="A checkpoint's folder, runs/NAME/checkpoints/step-…, or a LoRA adapter's.")
    ],
    folder: Annotated[Path, typer.Argument(help="The folder to make.")],
    run: Annotated[
        Path | None, typer.Option(help="The run's folder, where the checkpoint does not lie in it any more.")
    ] = None,
    lora: Annotated[
        str | None, typer.Option(help="With adapters: merged or adapter; default: the config's lora.export.")
    ] = None,
) -> None:
    """Make a Hugging Face folder (safetensors, config, tokenizer) of any checkpoint, on one CPU.
    Any ZeRO stage and number of ranks; the weights are bit for bit those that the run would have exported at that step.
    A LoRA adapter's folder is merged into its base model.

    Examples:

        seqaware export runs/demo/checkpoints/step-00000340 models/demo

        seqaware export runs/lora/checkpoints/step-00000100 models/adapter --lora adapter

        seqaware export runs/lora/model models/merged
    """
    with person_errors():
        if lora not in (None, "merged", "adapter"):
            raise ConfigError("--lora takes merged or adapter", got=lora)
        prepare_environment()
        with quick_imports():
            from seqaware.tools.export_model import export_checkpoint, merge_adapter
            from seqaware.tools.whole_model import is_adapter
        if is_adapter(checkpoint):
            if run is not None or lora is not None:
                raise ConfigError("--run and --lora are for checkpoints, not for an adapter", got=checkpoint)
            merge_adapter(checkpoint, folder)
            say(f"merged      {checkpoint} and its base model to {folder}")
            return
        step = export_checkpoint(checkpoint, folder, run=run, lora=lora)
        say(f"exported    step {step} of {checkpoint} to {folder}")


if __name__ == "__main__":
    app()
