"""Several runs in one launch, so that imports and the meeting of the ranks are paid once, and each has its own outcome.

As a script, each request is run as launcher/train.py runs it: {"config": YAML file, "deepspeed": ZeRO json,
"set": [overrides], "resume": optional, "requests": optional}. With "requests", a folder, `requests-<rank>.json` in it
lists the files of the run's checkpoints that the rank asked for.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.worlds import counted
from seqaware.config.loading import load_config
from seqaware.distributed.launch_environment import LaunchEnvironment
from seqaware.distributed.process_group import disconnect, find_address, prepare_environment
from tests import launch

SCRIPT = "tests/e2e/many_runs.py"
Request = dict[str, Any]


@dataclass(frozen=True)
class Outcome:
    """What came of one request.

    Attributes:
        results: by rank, what the script returned for it; empty if it failed.
        problem: how it failed, with the last lines of what the ranks printed.
    """

    results: tuple[Any, ...] = ()
    problem: str = ""

    def check(self) -> Outcome:
        """Fail the test if the request failed."""
        assert not self.problem, self.problem
        return self


def launch_all(
    requests: Sequence[Request], *, ranks: int, folder: Path, script: str = SCRIPT, **variables: str
) -> list[Outcome]:
    """Carry out the requests one after the other on forked ranks; one that fails or hangs does not fail the next ones.

    Args:
        folder: for the files of this launch; several launches may share it. script: one that calls `do_each`.
    """
    outcomes: list[Outcome] = []
    while len(outcomes) < len(requests):
        place = folder / f"launch-{sum(1 for _ in folder.glob('launch-*')) + 1}"
        place.mkdir(parents=True)
        listed = place / "requests.json"
        listed.write_text(json.dumps(requests[len(outcomes) :]))
        notes = [_notes(listed, rank) for rank in range(ranks)]
        for path in notes:
            path.touch()
        started = launch.Forked([script, str(listed)], ranks=ranks, folder=place, **variables)
        code = started.finish(lambda paths=notes: sum(path.stat().st_size for path in paths))
        done = list(
            zip(*([json.loads(line) for line in path.read_text().splitlines()] for path in notes), strict=False)
        )
        outcomes += [Outcome(results) for results in done]
        if code != 0 or len(outcomes) < len(requests):
            how = "hangs" if code == -1 else f"ended with exit code {code}"
            said = "\n".join(text[-6000:] for text in started.said())
            if len(outcomes) == len(requests):  # after the last one
                outcomes.pop()
            outcomes.append(Outcome(problem=f"{requests[len(outcomes)]}: the launch {how}: {said}"))
    return outcomes


def check_all(outcomes: Sequence[Outcome]) -> None:
    """Fail the test if any request failed."""
    problems = [outcome.problem for outcome in outcomes if outcome.problem]
    assert not problems, "\n\n".join(problems)


def do_each(do: Callable[[Request, LaunchEnvironment], Any]) -> None:
    """The main function of a script for `launch_all`: carry out every request and note what it returned."""
    listed = Path(sys.argv[1])
    prepare_environment()
    address = find_address()
    for request in json.loads(listed.read_text()):
        result = do(request, address)
        with _notes(listed, address.rank).open("a") as notes:
            notes.write(json.dumps(result) + "\n")
    disconnect()


def _notes(listed: Path, rank: int) -> Path:
    return listed.with_name(f"notes-{rank}.jsonl")


def _train(request: Request, address: LaunchEnvironment) -> None:
    from seqaware.training.launch import RunRequest, run

    config = load_config(Path(request["config"]), request["set"])
    asked = RunRequest(config, Path(request["deepspeed"]), resume=request.get("resume", "auto"))
    with counted(Path(config.output_dir, "checkpoints")) as counts:
        run(asked, address=address, say=lambda text: None)
    if "requests" in request:
        Path(request["requests"], f"requests-{address.rank}.json").write_text(json.dumps(sorted(counts.paths)))


if __name__ == "__main__":
    do_each(_train)
