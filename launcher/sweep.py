"""Sweep: `seqaware sweep CONFIG --gamma 0,0.9,0.98,1 --seeds 3`: every γ with every seed, and one report over all.

Given again, the same command goes on where it stood. Exit codes: 0 all are trained and reported, 2 something a person
has to mend, 85 a run was asked to leave and left, 1 a run failed.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from launcher.options import DeepSpeedJson, Overrides
from launcher.outcome import person_errors, say
from seqaware.distributed.process_group import environment
from seqaware.tools.sweep import Sweep, folders, gammas_of, run_sweep, seeds_of, submit

app = typer.Typer(add_completion=False)


@app.command()
def sweep(
    config: Annotated[Path, typer.Argument(help="The runs' YAML.")],
    gamma: Annotated[str, typer.Option(help="Discounts, with commas.")] = "0,0.9,0.98,1",
    seeds: Annotated[str, typer.Option(help="How many seeds (3: 1, 2 and 3), or which, with commas.")] = "3",
    out: Annotated[Path | None, typer.Option(help="Folder of the runs; default: runs/<config>-sweep.")] = None,
    deepspeed: DeepSpeedJson = None,
    overrides: Overrides = None,
    launch: Annotated[
        str, typer.Option(help='What starts a run: python (one rank), "deepspeed --num_gpus 8", …')
    ] = "python",
    slurm: Annotated[bool, typer.Option("--slurm", help="Submit the runs as an array of SLURM instead.")] = False,
) -> None:
    """Train one config with every γ and every seed, and compare them in one report.

    Examples:

        seqaware sweep train_configs/demo.yaml --gamma 0,0.9,0.98,1 --seeds 3

        seqaware sweep my.yaml --gamma 0,0.98 --seeds 7,11 --launch "deepspeed --num_gpus 8"

        seqaware sweep my.yaml --slurm
    """
    with person_errors():
        wanted = Sweep(
            config,
            gammas_of(gamma),
            seeds_of(seeds),
            out or Path("runs") / f"{config.stem}-sweep",
            overrides=tuple(overrides or []),
            deepspeed=deepspeed,
            launch=launch,
        )
        if slurm:
            submit(wanted, environment(), say=say)
            return
        code = run_sweep(wanted, say=say)
        if code == 0:
            _report(wanted)
    if code:
        raise typer.Exit(code)


def _report(wanted: Sweep) -> None:
    from seqaware.report.page import write_report

    say(f"report      {write_report(folders(wanted), out=wanted.folder / 'report')}")


if __name__ == "__main__":
    app()
