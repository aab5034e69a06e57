"""Evaluate: `deepspeed launcher/evaluate.py MODEL CONFIG`, or `python launcher/evaluate.py MODEL CONFIG` for one rank.

Started as launcher/train.py is, by the same launchers. Exit codes: 0 done, 2 something a person has to mend, 1
anything else.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from launcher.imports import quick_imports
from launcher.options import LocalRank, Overrides
from launcher.outcome import person_errors, say
from seqaware.config.loading import load_config
from seqaware.config.schema import Config
from seqaware.distributed.launch_environment import LaunchEnvironment
from seqaware.distributed.process_group import disconnect, find_address, prepare_environment

app = typer.Typer(add_completion=False)


@app.command()
def evaluate(
    model: Annotated[
        str, typer.Argument(help="A hub id, or the folder of a model, an adapter, a checkpoint or a run.")
    ],
    config: Annotated[Path, typer.Argument(help="YAML with evaluation and format; --set overrides.")],
    deepspeed: Annotated[Path | None, typer.Option(help="ZeRO json; stage 3 shards the model over the ranks.")] = None,
    overrides: Overrides = None,
    out: Annotated[Path | None, typer.Option(help="Folder for results; default: evaluations/ of the run.")] = None,
    local_rank: LocalRank = -1,
) -> None:
    """Answer the config's held-out questions with a model, and judge the answers.
    Writes results.json (each share with its 95 % interval) and answers.jsonl (every answer).

    Examples:

        python launcher/evaluate.py runs/demo train_configs/demo.yaml

        python launcher/evaluate.py runs/demo/checkpoints/step-00000340 train_configs/demo.yaml

        deepspeed launcher/evaluate.py runs/demo/model train_configs/demo.yaml --deepspeed ds_configs/zero3.json

        python launcher/evaluate.py openai-community/gpt2 my.yaml --set evaluation.metric=choice_likelihood
    """
    del local_rank
    with person_errors():
        address = find_address()
    with person_errors(address.rank):
        _evaluate(load_config(config, overrides or []), model, deepspeed=deepspeed, out=out, address=address)


def _evaluate(
    config: Config, model: str, *, deepspeed: Path | None, out: Path | None, address: LaunchEnvironment
) -> None:
    prepare_environment()
    with quick_imports():
        from seqaware.tools.evaluate_model import EvaluateRequest
        from seqaware.tools.evaluate_model import evaluate as evaluate_here

    request = EvaluateRequest(config, model, deepspeed, out)
    evaluate_here(request, address=address, say=say if address.rank == 0 else _silence)
    disconnect()


def _silence(text: str) -> None:
    del text


if __name__ == "__main__":
    app()
