"""What every input must do: succeed or end in one clear error, within bounded time and memory.

A target is a test that draws inputs with hypothesis and hands them to `ends_well` (a command of the launcher) or
`refuses_clearly` (a function). Its inputs that once failed lie in `corpus/<target>/` and are replayed first. To add a
target, give it a share of the examples in SHARES.
"""

from __future__ import annotations

import os
import resource
import signal
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, TypeVar

import typer
from hypothesis import HealthCheck, settings
from typer.testing import CliRunner

from seqaware.errors import USER_ERROR, SeqawareError
from seqaware.files import MalformedError

CORPUS = Path(__file__).parent / "corpus"
# Of 2,000 examples in `make test`; `make fuzz FUZZ_EXAMPLES=…` draws more, with another seed each time.
EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", "2000"))
SHARES = {
    "config": 0.23,
    "commands": 0.04,
    "deepspeed": 0.14,
    "model": 0.06,
    "init": 0.06,
    "plan": 0.02,
    "rows": 0.11,
    "questions": 0.03,
    "templates": 0.08,
    "prompts": 0.02,
    "tokenizers": 0.04,
    "manifests": 0.04,
    "stores": 0.04,
    "shards": 0.016,
    "generators": 0.004,
    "adapters": 0.01,
    "metrics": 0.04,
    "cards": 0.016,
    "reports": 0.004,
}
assert abs(sum(SHARES.values()) - 1) < 1e-9

# Of one input: 5 s on an idle machine is the requirement. These only catch what never ends: CPU time, so that other
# processes do not count, and with room for cores several times slower.
MOST_CPU_SECONDS = 60
MOST_BYTES = 2**30

Test = TypeVar("Test", bound=Callable[..., Any])


def fuzzed(target: str) -> Callable[[Test], Test]:
    """Draw this target's share of the examples: always the same ones, unless FUZZ_EXAMPLES asks for others."""
    return settings(
        max_examples=max(1, round(EXAMPLES * SHARES[target])),
        derandomize="FUZZ_EXAMPLES" not in os.environ,
        database=None,
        deadline=None,
        print_blob=True,
        suppress_health_check=list(HealthCheck),
    )


def corpus(target: str) -> Sequence[Path]:
    """The inputs of a target that once failed, smallest first."""
    found = sorted((CORPUS / target).iterdir(), key=lambda path: (path.stat().st_size, path.name))
    assert found, f"no corpus for {target}"
    return found


class _NeverEndsError(BaseException):
    """No `except Exception` on the way may take it."""


@contextmanager
def bounded() -> Iterator[None]:
    """Fail on an input that takes more CPU time or address space than any may."""

    def ring(signum: int, frame: FrameType | None) -> None:
        del signum, frame
        raise _NeverEndsError(f"more than {MOST_CPU_SECONDS} s of CPU time")

    pages = int(Path("/proc/self/statm").read_text().split()[0])
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    before = signal.signal(signal.SIGVTALRM, ring)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + MOST_BYTES, hard))
    signal.setitimer(signal.ITIMER_VIRTUAL, MOST_CPU_SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
        signal.signal(signal.SIGVTALRM, before)


def ends_well(app: typer.Typer, arguments: Sequence[str]) -> str:
    """Run a command and return what it printed; it must exit with 0, or with 2 and an error."""
    with bounded():
        result = CliRunner().invoke(app, list(arguments))
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        shown = "".join(traceback.format_exception(result.exception))
        raise AssertionError(f"{list(arguments)} ended in a traceback:\n{shown}")
    assert result.exit_code in (0, USER_ERROR), f"{list(arguments)}: exit code {result.exit_code}\n{result.output}"
    if result.exit_code == USER_ERROR:
        # The last two are the sum of the doctor's findings.
        signs = ("error: ", "Usage: ", " error, ", " errors, ")
        assert any(sign in result.output for sign in signs), result.output
    return result.output


def refuses_clearly(read: Callable[[], object]) -> bool:
    """Call a function; return whether it succeeded. It may raise a user error only."""
    with bounded():
        try:
            read()
        except (SeqawareError, MalformedError):
            return False
    return True
