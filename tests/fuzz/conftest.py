"""A folder to fuzz in: no home, no network, and the repository's examples under the names that configs write."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from seqaware.config.loading import REPOSITORY


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The working directory while a module's targets run, with an empty home beside it."""
    folder, home = tmp_path_factory.mktemp("fuzz"), tmp_path_factory.mktemp("home")
    for name in ("demo", "ds_configs", "train_configs"):
        (folder / name).symlink_to(REPOSITORY / name)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for name in [name for name in os.environ if name.startswith(("HF_", "WANDB", "SLURM", "OMPI", "PMI"))]:
            patch.delenv(name)
        patch.setenv("HOME", str(home))
        patch.setenv("HF_HUB_OFFLINE", "1")
        yield folder
