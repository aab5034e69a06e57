"""Doctor: is this machine, are these hosts, is this config fit for a run? `python launcher/doctor.py [CONFIG]`.

Alone it looks at this host, in a few seconds; with --hostfile also at the hosts that stand in it; started by deepspeed,
torchrun, srun or mpirun as a run is, at all ranks together. Exit codes: 0 nothing has to be mended, 2 something has.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from launcher.options import DeepSpeedJson, LocalRank, Overrides, bounded_ranks
from launcher.outcome import person_errors, say
from seqaware.distributed.process_group import environment, find_address, prepare_environment
from seqaware.errors import USER_ERROR

app = typer.Typer(add_completion=False)


@app.command()
def doctor(
    config: Annotated[
        Path | None, typer.Argument(help="The run's YAML; without it the machine alone is looked at.")
    ] = None,
    overrides: Overrides = None,
    deepspeed: DeepSpeedJson = None,
    hostfile: Annotated[Path | None, typer.Option(help="Of deepspeed: look at these hosts too, over ssh.")] = None,
    ranks: Annotated[
        int | None,
        typer.Option(metavar="N", min=1, callback=bounded_ranks, help="Of the run; default: as started, or one a GPU."),
    ] = None,
    local_rank: LocalRank = -1,
) -> None:
    """Look for what would stop a run or make it slow, and say what to do about it.

    Examples:

        seqaware doctor train_configs/demo.yaml

        seqaware doctor my.yaml --hostfile hosts

        srun --ntasks-per-node 8 python launcher/doctor.py my.yaml
    """
    del local_rank
    found = environment()
    prepare_environment()
    with person_errors():
        address = find_address(check=False)
    from rich.console import Console

    from seqaware.doctor.checks import DoctorRequest, diagnose
    from seqaware.doctor.findings import Level, some_hang
    from seqaware.doctor.findings_table import show

    request = DoctorRequest(config, overrides or [], deepspeed, hostfile, ranks, found)
    diagnosis = diagnose(request, address)
    if address.rank == 0:
        show(diagnosis.findings, hosts=diagnosis.hosts, console=Console(highlight=False))
    elif not diagnosis.met:
        for finding in diagnosis.findings:
            if finding.level is Level.ERROR:
                say("; ".join(filter(None, (f"error: {finding.found}", finding.do))), err=True)
    code = 0 if diagnosis.holds else USER_ERROR
    if some_hang():  # what hangs must not keep the doctor from leaving
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    raise typer.Exit(code)


if __name__ == "__main__":
    app()
