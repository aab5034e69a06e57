"""Options that several commands have, written once."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Overrides = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="A key of the config; repeatable.")
]
DeepSpeedJson = Annotated[Path | None, typer.Option(help="ZeRO json; wins over the config's `deepspeed`.")]
# The deepspeed launcher appends it, and says the same in the environment.
LocalRank = Annotated[int, typer.Option("--local_rank", "--local-rank", hidden=True)]
