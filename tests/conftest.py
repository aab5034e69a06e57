"""Tests in several lanes (`make test`): the files that take longest come first, and no example has a deadline.

`make test PYTEST_ARGS=--record-durations` measures the files anew.
"""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import settings

# Beside other tests an example may take any time; none of them is about speed.
settings.register_profile("lanes", deadline=None)
settings.load_profile("lanes")

TESTS = Path(__file__).parent
# Seconds of each file. A lane that reaches a long file when the others are done runs alone.
DURATIONS = TESTS / "durations.json"
# Files of fewer seconds stay in the order of their names, behind the others.
SHORT_SECONDS = 5


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--record-durations", action="store_true", help=f"write {DURATIONS.name} after a run of all tests")


def pytest_configure(config: pytest.Config) -> None:
    if not hasattr(config, "workerinput"):
        config.pluginmanager.register(_Files(record=config.getoption("--record-durations")))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Only in lanes: one after the other, the quick ones tell most for the wait."""
    if hasattr(config, "workerinput"):
        seconds = json.loads(DURATIONS.read_text())
        items.sort(key=lambda item: -seconds.get(item.path.relative_to(TESTS).as_posix(), 0))


class _Files:
    """Adds up what the tests of each file take.

    Args:
        record: write it down at the end.
    """

    def __init__(self, *, record: bool) -> None:
        self._record = record
        self._seconds = Counter[str]()

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        file = report.nodeid.partition("::")[0].removeprefix(f"{TESTS.name}/")
        self._seconds[file] += report.duration

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        long = {file: round(total) for file, total in self._seconds.most_common() if total >= SHORT_SECONDS}
        if self._record:
            DURATIONS.write_text(json.dumps(long, indent=1) + "\n")
        if terminalreporter.config.getoption("durations") is not None:
            terminalreporter.section("slowest files")
            for file, seconds in list(long.items())[:15]:
                terminalreporter.write_line(f"{seconds:5d} s  {file}")
