"""Several runs in one launch, each disturbed at a moment of its own; a line of JSON a rank and run says how it ended.

Started by a launcher with a JSON file: a list of {"config", "deepspeed", "set": [overrides], "disturb": {…} or null}.
disturb: {"step": n, "rank": r, "signal": name} or {"step": n, "touch": file} — done as step n begins.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
from pathlib import Path
from typing import Any

from seqaware.config.load import load_config
from seqaware.engine.ranks import disconnect, find_address, prepare_environment
from seqaware.errors import SeqawareError
from seqaware.training.interrupt import Left, Signals
from seqaware.training.watch.heartbeat import Heartbeat


class Disturbance(Heartbeat):
    """Hears a step begin, and disturbs the run once."""

    def __init__(self, rank: int, what: dict[str, Any] | None) -> None:
        self.rank = rank
        self.what = what

    def phase(self, name: str, step: int | None = None) -> None:
        what = self.what
        if what is None or step != what["step"] or name != what.get("phase", "batches"):
            return
        self.what = None
        if "touch" in what and self.rank == 0:
            Path(what["touch"]).touch()
        if "signal" in what and self.rank == what["rank"]:
            os.kill(os.getpid(), signal.Signals[what["signal"]])


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("requests", type=Path)
    path = parser.parse_known_args()[0].requests
    prepare_environment()
    from seqaware.training.run import RunRequest, run

    address = find_address()
    endings = []
    for request in json.loads(path.read_text()):
        config = load_config(Path(request["config"]), request["set"])
        said: list[str] = []
        with Signals() as signals:
            ending = {"how": "trained", "text": ""}
            try:
                run(
                    RunRequest(config, Path(request["deepspeed"])),
                    address=address,
                    say=said.append,
                    signals=signals,
                    heartbeat=Disturbance(address.rank, request["disturb"]),
                )
            except Left as left:
                ending = {"how": "left", "text": left.reason}
            except SeqawareError as error:
                ending = {"how": type(error).__name__, "text": str(error)}
        endings.append({**ending, "said": said})
        path.with_name(f"endings-{address.rank}.json").write_text(json.dumps(endings))
    disconnect()


if __name__ == "__main__":
    main()
