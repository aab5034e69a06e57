"""Prepare: tokenise a run's data ahead of time, `python launcher/prepare.py CONFIG`, so that no GPU waits for it.

Needs no GPU and no ranks. A run with the same data, format and tokenizer finds the store and starts at once. Large
data is tokenised in parts by as many jobs: `--part I/N` in each of them, in any order, then `--merge N` in one.
"""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer

from launcher.imports import quick_imports
from launcher.options import Overrides, bounded_ranks
from launcher.outcome import person_errors, say
from seqaware.config.loading import load_config
from seqaware.config.schema import Config
from seqaware.distributed.process_group import prepare_environment
from seqaware.errors import ConfigError

app = typer.Typer(add_completion=False)


@app.command()
def prepare(
    config: Annotated[Path | None, typer.Argument(help="The run's YAML; default: train_configs/default.yaml.")] = None,
    overrides: Overrides = None,
    part: Annotated[
        str | None, typer.Option(help="I/N: only the I-th (from 1) of N parts of the training rows.")
    ] = None,
    merge: Annotated[
        int | None,
        typer.Option(
            metavar="N", min=1, callback=bounded_ranks, help="N: make the store of the N parts, and remove them."
        ),
    ] = None,
) -> None:
    """Tokenise the training rows of a config, and its held-out rows.

    Examples:

        seqaware prepare train_configs/smollm2.yaml --set dataset.workers=16

        seqaware prepare my.yaml --part $SLURM_ARRAY_TASK_ID/$SLURM_ARRAY_TASK_COUNT

        seqaware prepare my.yaml --merge 64
    """
    with person_errors():
        if part is not None and merge is not None:
            raise ConfigError(
                "--part and --merge are two steps", do="run --part for every part, and --merge after them"
            )
        settings = load_config(config, overrides or [])
        prepare_environment()
        if part is not None:
            _part(settings, part)
        elif merge is not None:
            _merge(settings, merge, command=_command(config, overrides or []))
        else:
            _whole(settings)


def _whole(settings: Config) -> None:
    from seqaware.metrics.progress import RowCounter

    with quick_imports():
        from seqaware.training.prepare import prepare_data

    for store in prepare_data(settings, progress=RowCounter(say)):
        say(f"prepared    {store}")


def _part(settings: Config, text: str) -> None:
    from seqaware.data.store.store_parts import PartNumber
    from seqaware.metrics.progress import RowCounter

    with quick_imports():
        from seqaware.tools.prepare_parts import prepare_one_part

    part = PartNumber.parse(text)
    say(f"part {part}    {prepare_one_part(settings, part, progress=RowCounter(say))}")


def _merge(settings: Config, count: int, *, command: str) -> None:
    from seqaware.metrics.progress import RowCounter
    from seqaware.tools.prepare_parts import merge_all_parts

    for store in merge_all_parts(settings, count, command=command, progress=RowCounter(say)):
        say(f"prepared    {store}")


def _command(config: Path | None, overrides: list[str]) -> str:
    """This command as it was typed, without --part and --merge."""
    written = [str(config)] if config else []
    return shlex.join(["python", "launcher/prepare.py", *written, *(f"--set={each}" for each in overrides)])


if __name__ == "__main__":
    app()
