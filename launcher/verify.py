"""Verify: `deepspeed launcher/verify.py CONFIG`: is this config, on these ranks, the training that its formulas say?

Started as launcher/train.py is, by the same launchers. Exit codes: 0 it holds, 1 it falls short, 2 something a person
has to mend.
"""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from launcher.imports import quick_imports
from launcher.options import DeepSpeedJson, LocalRank, Overrides, bounded
from launcher.outcome import person_errors, say
from seqaware.config.loading import load_config
from seqaware.distributed.launch_environment import LaunchEnvironment
from seqaware.distributed.process_group import disconnect, find_address, prepare_environment

app = typer.Typer(add_completion=False)


class OracleDType(StrEnum):
    """The oracle's dtype: float64 for models of up to 10⁹ weights, else float32, unless it is named."""

    auto = "auto"
    float32 = "float32"
    float64 = "float64"


@app.command()
def verify(
    config: Annotated[Path | None, typer.Argument(help="The run's YAML; default: train_configs/default.yaml.")] = None,
    deepspeed: DeepSpeedJson = None,
    overrides: Overrides = None,
    steps: Annotated[int, typer.Option(metavar="N", min=1, callback=bounded, help="Optimizer steps to compare.")] = 3,
    dtype: Annotated[
        OracleDType, typer.Option(metavar="DTYPE", help="Of the oracle: auto, float32 or float64.")
    ] = OracleDType.auto,
    local_rank: LocalRank = -1,
) -> None:
    """Compare a run's first steps, on its own model, data and layout, with a plain computation in one process.
    Prints a table and writes certificate.json into the run's folder, before or after the run itself.

    Example:

        deepspeed --num_gpus 2 launcher/verify.py train_configs/demo.yaml --deepspeed ds_configs/zero3.json
    """
    del local_rank
    with person_errors():
        address = find_address()
    with person_errors(address.rank):
        holds = _verify(config, deepspeed, overrides or [], steps=steps, dtype=dtype, address=address)
    if not holds:
        raise typer.Exit(1)


def _verify(
    path: Path | None,
    deepspeed: Path | None,
    overrides: list[str],
    *,
    steps: int,
    dtype: OracleDType,
    address: LaunchEnvironment,
) -> bool:
    config = load_config(path, overrides)
    prepare_environment()
    with quick_imports():
        from seqaware.verify.verification import VerifyRequest, verify

    request = VerifyRequest(config, deepspeed, steps, dtype.value)
    certificate = verify(request, address=address, say=say if address.rank == 0 else _silence)
    disconnect()
    return certificate.holds


def _silence(text: str) -> None:
    del text


if __name__ == "__main__":
    app()
