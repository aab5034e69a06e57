"""Options that several commands have, written once."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, TypeVar

import typer

Number = TypeVar("Number", int, float, int | None)


def _at_most(largest: int) -> Callable[[Number], Number]:
    """A callback, and not the option's `max`: the range in the help would leave no room for the help."""

    def check(value: Number) -> Number:
        if value is not None and not value <= largest:  # nor NaN
            raise typer.BadParameter(f"{value} is more than {largest:,}")
        return value

    return check


# Larger numbers name nothing there is, and overflow what is computed from them.
bounded = _at_most(10**12)
bounded_ranks = _at_most(10**6)
bounded_seed = _at_most(2**32 - 1)

Overrides = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="A key of the config; repeatable.")
]
DeepSpeedJson = Annotated[Path | None, typer.Option(help="ZeRO json; wins over the config's `deepspeed`.")]
# The deepspeed launcher appends it, and says the same in the environment.
LocalRank = Annotated[int, typer.Option("--local_rank", "--local-rank", hidden=True)]
