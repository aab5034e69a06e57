"""Runs one after the other in one process a rank, with something done to the disk before each.

A request: {"config": YAML file, "deepspeed": ZeRO json, "resume", "anyway": [names], "before": [[what `damage.py`
does, arguments…]]}. Its outcome says how it ended. A run that is refused before its ranks have met would leave the
others waiting: such runs are for one rank.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from seqaware.config.loading import load_config
from seqaware.distributed.launch_environment import LaunchEnvironment
from seqaware.errors import SeqawareError
from tests.e2e.many_runs import do_each


def _run(request: dict[str, Any], address: LaunchEnvironment) -> dict[str, Any]:
    from seqaware.training.launch import RunRequest, run
    from tests.e2e import damage

    for action, *arguments in request["before"] if address.rank == 0 else ():
        getattr(damage, action)(*arguments)
    said: list[str] = []
    config = load_config(Path(request["config"]), [])
    asked = RunRequest(config, Path(request["deepspeed"]), request["resume"], tuple(request["anyway"]))
    try:
        run(asked, address=address, say=said.append)
    except SeqawareError as error:
        return {"how": type(error).__name__, "text": str(error), "said": said}
    return {"how": "trained", "text": "", "said": said}


if __name__ == "__main__":
    do_each(_run)
