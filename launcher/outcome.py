"""How a command ends: an error for a person is one line and exit code 2, on every command alike."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

import typer

from seqaware.errors import SeqawareError

USER_ERROR = 2
_PATIENCE_SECONDS = 5.0


@contextmanager
def person_errors(rank: int = 0) -> Iterator[None]:
    """Inside, a `SeqawareError` becomes `error: …` on standard error and exit code 2.

    Args:
        rank: most errors are every rank's. Rank 0 has the word, and its end ends the others before they repeat it; an
            error of one rank alone is told by that rank a little later.
    """
    try:
        yield
    except SeqawareError as error:
        if rank == 0:
            typer.echo(f"error: {error}", err=True)
        else:
            time.sleep(_PATIENCE_SECONDS)
            typer.echo(f"error on rank {rank}: {error}", err=True)
        sys.exit(USER_ERROR)
