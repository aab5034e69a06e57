"""Analyse: `python launcher/analyse.py MODEL --prompt TEXT -n 64`: how sure a model is, step by step, over samples."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from launcher.imports import quick_imports
from launcher.options import bounded, bounded_seed
from launcher.outcome import person_errors, say
from seqaware.distributed.process_group import disconnect, find_address, prepare_environment

app = typer.Typer(add_completion=False)


class ModelDType(StrEnum):
    """What the weights are held in."""

    float32 = "float32"
    bfloat16 = "bfloat16"


def _share(top_p: float) -> float:
    if not 0.0 < top_p <= 1.0:
        raise typer.BadParameter(f"{top_p} is not above 0 and at most 1")
    return top_p


@app.command()
def analyse(
    model: Annotated[
        str, typer.Argument(help="A hub id, or the folder of a model, an adapter, a checkpoint or a run.")
    ],
    prompt: Annotated[str, typer.Option(help="What the model continues.")],
    samples: Annotated[
        int, typer.Option("--samples", "-n", metavar="N", min=1, callback=bounded, help="Continuations to draw.")
    ] = 64,
    max_new_tokens: Annotated[
        int, typer.Option(metavar="N", min=1, callback=bounded, help="Tokens of a continuation at most.")
    ] = 32,
    temperature: Annotated[float, typer.Option(metavar="X", min=0, callback=bounded, help="0: greedy.")] = 1.0,
    top_p: Annotated[
        float, typer.Option(metavar="X", callback=_share, help="Draw from the likeliest with this share.")
    ] = 1.0,
    seed: Annotated[int, typer.Option(metavar="N", min=0, callback=bounded_seed, help="Of the draws.")] = 0,
    dtype: Annotated[
        ModelDType, typer.Option(metavar="DTYPE", help="Of the weights: float32 or bfloat16.")
    ] = ModelDType.float32,
    out: Annotated[Path, typer.Option(help="Folder for analysis.json, .png and .html.")] = Path("analysis"),
) -> None:
    """Draw continuations of a prompt; show entropy and probability by step, and token frequencies.

    Example:

        python launcher/analyse.py runs/demo --prompt "Question: Tom has 3 apples." -n 64 --out runs/demo/analysis
    """
    with person_errors():
        address = find_address()
    with person_errors(address.rank):
        prepare_environment()
        with quick_imports():
            from seqaware.evaluation.sampling import Decoding
            from seqaware.tools.analyse import AnalyseRequest
            from seqaware.tools.analyse import analyse as analyse_here

        decoding = Decoding(max_new_tokens, temperature, top_p, seed)
        request = AnalyseRequest(model, prompt, samples, decoding, dtype.value, out)
        analyse_here(request, address=address, say=say)
        disconnect()


if __name__ == "__main__":
    app()
