"""Two hosts for the tests of launchers, made once."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from tests.cluster.hosts import Cluster, hosts, what_is_missing


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    """Hosts h1 and h2. Skipped where there can be none, and says why; where CI has promised them, a failure."""
    missing = what_is_missing("pdsh")
    if missing is not None and os.environ.get("CI"):
        pytest.fail(missing)
    if missing is not None:
        pytest.skip(missing)
    with hosts("h1", "h2") as two:
        yield two
