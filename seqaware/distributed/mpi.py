"""The MPI of the mpirun that started this process: only to meet, and to end together; tensors never go through it."""

from __future__ import annotations

import sys
from types import ModuleType, TracebackType

from seqaware.errors import ConfigError


def load_mpi(started: int) -> ModuleType:
    """mpi4py's MPI, connected to all `started` ranks, which from now on crash together.

    Raises:
        ConfigError: there is no MPI library, or it is not that of the mpirun that started us.
    """
    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:
        raise ConfigError(
            "mpirun started this process, but mpi4py cannot load an MPI library", got=error, do="load the MPI module"
        ) from error
    if MPI.COMM_WORLD.size != started:
        # Every rank would take itself for the only one, and all would write to the same folder.
        library = MPI.Get_library_version().splitlines()[0].split(",")[0]
        raise ConfigError(
            "mpi4py has loaded another MPI library than that of the mpirun that started this process",
            got=f"mpirun started {started} ranks, and {library} knows of {MPI.COMM_WORLD.size}",
            do="set MPI4PY_LIBMPI to the libmpi.so of that mpirun",
        )
    _crash_together()
    return MPI


def _crash_together() -> None:
    """Let an exception that nobody catches end all ranks, with exit code 1.

    MPI's own end at exit is collective: the rank that failed would wait there for the others, and they, in their
    collectives, for it.
    """
    show = sys.excepthook

    def show_and_end(kind: type[BaseException], error: BaseException, traceback: TracebackType | None) -> None:
        show(kind, error, traceback)
        end_mpi_ranks(1)

    sys.excepthook = show_and_end


def end_mpi_ranks(code: int) -> None:
    """End every rank of an mpirun at once, with this exit code; where mpirun did not start us, only return."""
    mpi = sys.modules.get("mpi4py.MPI")
    if mpi is not None and mpi.Is_initialized() and not mpi.Is_finalized() and mpi.COMM_WORLD.size > 1:
        sys.stdout.flush()
        sys.stderr.flush()
        mpi.COMM_WORLD.Abort(code)
