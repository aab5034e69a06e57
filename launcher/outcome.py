"""How a command ends: an error for a person is one line and exit code 2, on every command alike.

A command that trains is watched besides: whatever ends it, it is told once, and first by the rank that knows why.
"""

from __future__ import annotations

import errno
import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import NoReturn

import typer

from seqaware.errors import USER_ERROR, ConfigError, SeqawareError
from seqaware.files import MalformedError
from seqaware.masking import escaped
from seqaware.watchdog.heartbeat import WatchedHeartbeat
from seqaware.watchdog.monitor import FAILURE

_PATIENCE_SECONDS = 5.0
_INTERRUPTED = 130
_OF_A_PATH = (errno.ENAMETOOLONG, errno.ELOOP)


def say(text: str, *, err: bool = False) -> None:
    """Print text of any origin: what is no line break and would control a terminal is written out."""
    typer.echo(escaped(text, keep="\n"), err=err)


@contextmanager
def person_errors(rank: int = 0) -> Iterator[None]:
    """Inside, a `SeqawareError` becomes `error: …` on standard error and exit code 2.

    So do a path that no file system takes, and a file that its bounded reader refuses.

    Args:
        rank: most errors are every rank's. Rank 0 has the word, and its end ends the others before they repeat it; an
            error of one rank alone is told by that rank a little later.
    """
    try:
        yield
    except (SeqawareError, MalformedError) as error:
        _end(error, rank)
    except OSError as error:
        if error.errno not in _OF_A_PATH:
            raise
        _end(error, rank)


@contextmanager
def writing(option: str, path: Path) -> Iterator[None]:
    """Inside, what keeps the file of an option from being written becomes an error that names the option.

    Raises:
        ConfigError: no such folder, no permission, or a suffix of no known kind of picture.
    """
    try:
        yield
    except (OSError, ValueError) as error:
        got = f"{path} ({error.strerror if isinstance(error, OSError) else error})"
        raise ConfigError(f"{option} cannot be written", got=got, do="name another file") from error


def _end(error: Exception, rank: int) -> NoReturn:
    if rank == 0:
        say(f"error: {error}", err=True)
    else:
        time.sleep(_PATIENCE_SECONDS)
        say(f"error on rank {rank}: {error}", err=True)
    sys.exit(USER_ERROR)


class Watched:
    """Around the work of a rank: the others learn how it ended, and a person learns it once.

    Exit codes: that of a `SystemExit`; 2 after a `SeqawareError`; 1 after anything else. A rank that can do nothing
    more because another one is lost is ended by its watch, with 1 or with that one's code.
    """

    def __init__(self, heartbeat: WatchedHeartbeat) -> None:
        self._heartbeat = heartbeat

    def __enter__(self) -> WatchedHeartbeat:
        return self._heartbeat

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        heartbeat = self._heartbeat
        match error:
            case None:
                heartbeat.close()
            case SystemExit() | typer.Exit():
                heartbeat.close(_exit_code(error))
            case KeyboardInterrupt():
                heartbeat.close(_INTERRUPTED)
            case SeqawareError() if heartbeat.own.address.size == 1:
                heartbeat.close(USER_ERROR)  # nobody else to tell it twice
            case _:
                # A launcher may send it while the others are still finding out what happened; we end by ourselves.
                signal.signal(signal.SIGTERM, signal.SIG_IGN)
                self._end(heartbeat.fail(error))

    def _end(self, code: int) -> None:
        """End the process without meeting the other ranks, which a broken group would wait for."""
        if self._heartbeat.own.address.size == 1:
            raise SystemExit(code) from None
        sys.stdout.flush()
        sys.stderr.flush()
        self._heartbeat.own.finish_speaking()
        os._exit(code)


def _exit_code(error: SystemExit | typer.Exit) -> int:
    code = error.exit_code if isinstance(error, typer.Exit) else error.code
    if code is None:
        return 0
    return code if isinstance(code, int) else FAILURE
