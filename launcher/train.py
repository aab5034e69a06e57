"""Train: `deepspeed launcher/train.py CONFIG`, or `python launcher/train.py CONFIG` for one rank.

Also started as it is by torchrun, srun and mpirun. Exit codes: 0 trained, 2 something a person has to mend.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from launcher.imports import quick_imports
from launcher.outcome import person_errors
from seqaware.config.load import load_config
from seqaware.engine.address import RankAddress
from seqaware.engine.ranks import disconnect, find_address, gpu_is_visible, prepare_environment

app = typer.Typer(add_completion=False)


@app.command()
def train(
    config: Annotated[Path | None, typer.Argument(help="The run's YAML; default: train_configs/default.yaml.")] = None,
    deepspeed: Annotated[Path | None, typer.Option(help="ZeRO json; wins over the config's `deepspeed`.")] = None,
    overrides: Annotated[list[str] | None, typer.Option("--set", help="key=value, repeatable.")] = None,
    resume: Annotated[str, typer.Option(help="auto, never, or a checkpoint's folder.")] = "auto",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the resolved Plan and stop.")] = False,
    ranks: Annotated[int | None, typer.Option(help="With --dry-run: plan for this many ranks.")] = None,
    local_rank: Annotated[int, typer.Option("--local_rank", "--local-rank", hidden=True)] = -1,
) -> None:
    """Train a causal language model with discounted log-suffix weighting.

    Examples:

        deepspeed --num_gpus 2 launcher/train.py train_configs/demo.yaml --deepspeed ds_configs/zero3.json

        python launcher/train.py train_configs/demo.yaml --set training.sft.gamma=0.9 --dry-run
    """
    del local_rank  # appended by the deepspeed launcher, which says the same in the environment
    with person_errors():
        address = find_address()
    with person_errors(address.rank):
        if dry_run:
            _dry_run(config, deepspeed, overrides or [], ranks or address.size)
        else:
            _train(config, deepspeed, overrides or [], resume=resume, address=address)


def _dry_run(path: Path | None, deepspeed: Path | None, overrides: list[str], ranks: int) -> None:
    from seqaware.training.dry_run import plan_without_torch

    config = load_config(path, overrides)
    typer.echo(plan_without_torch(config, deepspeed_path=deepspeed, ranks=ranks, gpu=gpu_is_visible()).render())


def _train(
    path: Path | None, deepspeed: Path | None, overrides: list[str], *, resume: str, address: RankAddress
) -> None:
    config = load_config(path, overrides)
    prepare_environment()
    with quick_imports():
        from seqaware.training.run import RunRequest, run

    run(RunRequest(config, deepspeed, resume), address=address, say=_say if address.rank == 0 else _silence)
    disconnect()


def _say(text: str) -> None:
    typer.echo(text)


def _silence(text: str) -> None:
    del text


if __name__ == "__main__":
    app()
