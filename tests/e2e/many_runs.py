"""Several runs in one launch, so that imports and the meeting of the ranks are paid once.

Started by a launcher with a JSON file: a list of {"config": YAML file, "deepspeed": ZeRO json, "set": [overrides],
"resume": optional, "requests": optional}.
Each is run as launcher/train.py runs it. With "requests", a folder, `requests-<rank>.json` in it lists the files of the
run's checkpoints that the rank asked for.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from benchmarks.worlds import counted
from seqaware.config.load import load_config
from seqaware.engine.ranks import disconnect, find_address, prepare_environment


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("requests", type=Path)
    requests = json.loads(parser.parse_known_args()[0].requests.read_text())
    prepare_environment()
    from seqaware.training.run import RunRequest, run

    address = find_address()
    for request in requests:
        config = load_config(Path(request["config"]), request["set"])
        asked = RunRequest(config, Path(request["deepspeed"]), resume=request.get("resume", "auto"))
        with counted(Path(config.output_dir, "checkpoints")) as counts:
            run(asked, address=address, say=lambda text: None)
        if "requests" in request:
            Path(request["requests"], f"requests-{address.rank}.json").write_text(json.dumps(sorted(counts.paths)))
        print(f"rank {address.rank} ran {config.output_dir}", file=sys.stderr, flush=True)
    disconnect()


if __name__ == "__main__":
    main()
