"""Plan: what a run costs on GPUs that need not be here, `python launcher/plan.py CONFIG --gpus 64 --device h200`.

Steps, tokens, packing, memory by part, seconds of a step, GPU-hours, disk, the largest micro-batch and the longest
sequence that fit, and the cheapest DeepSpeed config. Starts nothing, loads no model and needs no GPU.
"""

from __future__ import annotations

import shutil
import sys
import textwrap
from pathlib import Path
from typing import Annotated

import typer

from launcher.options import DeepSpeedJson, Overrides, bounded_ranks
from launcher.outcome import person_errors, say
from seqaware.config.loading import load_config

app = typer.Typer(add_completion=False)


@app.command()
def plan(
    config: Annotated[Path | None, typer.Argument(help="The run's YAML; default: train_configs/default.yaml.")] = None,
    deepspeed: DeepSpeedJson = None,
    overrides: Overrides = None,
    gpus: Annotated[int, typer.Option(metavar="N", help="All GPUs of the run.", min=1, callback=bounded_ranks)] = 8,
    per_node: Annotated[int, typer.Option(metavar="N", help="GPUs of one node.", min=1, callback=bounded_ranks)] = 8,
    device: Annotated[str, typer.Option(help="h200, h100 or a100.")] = "h200",
    memory: Annotated[float | None, typer.Option(metavar="X", help="GiB of a GPU, instead of the device's.")] = None,
    nvlink: Annotated[float | None, typer.Option(metavar="X", help="GB/s one way between GPUs of a node.")] = None,
    network: Annotated[
        float | None, typer.Option(metavar="X", help="GB/s one way of each GPU's network adapter.")
    ] = None,
) -> None:
    """Estimate steps, memory, hours and disk of a run, and what else would fit.

    Examples:

        seqaware plan train_configs/llama8b_node.yaml --gpus 8

        seqaware plan train_configs/llama70b_8nodes.yaml --gpus 64 --device h100
    """
    with person_errors():
        from seqaware.estimate.hardware import device_named
        from seqaware.estimate.run_estimate import outlook, overridden
        from seqaware.tools.plan_estimate import Gpus, ask

        chosen = overridden(device_named(device), memory_gib=memory, link_gb=nvlink, network_gb=network)
        settings = load_config(config, overrides or [])
        question = ask(settings, deepspeed_path=deepspeed, gpus=Gpus(gpus, per_node), device=chosen)
        for label, text in outlook(question):
            say(_line(label, text))


def _line(label: str, text: str) -> str:
    """On a terminal as wide as it is, the text beside its label; in a file one line."""
    line = f"{label:<12}{text}"
    if not sys.stdout.isatty():
        return line
    width = shutil.get_terminal_size().columns
    return textwrap.fill(line, width, subsequent_indent=" " * 12, break_on_hyphens=False)


if __name__ == "__main__":
    app()
