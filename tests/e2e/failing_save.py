"""A run whose rank 1 cannot write large files, as on a full disk; every rank must hear of it, and soon."""

from __future__ import annotations

import argparse
import resource
import sys
from pathlib import Path

from seqaware.config.loading import load_config
from seqaware.distributed.process_group import disconnect, find_address, prepare_environment
from seqaware.errors import CheckpointError


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("config", type=Path)
    path = parser.parse_known_args()[0].config
    prepare_environment()
    from seqaware.training.launch import RunRequest, run

    address = find_address()
    if address.rank == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, resource.RLIM_INFINITY))
    try:
        run(RunRequest(load_config(path, [])), address=address, say=lambda text: None)
    except CheckpointError as error:
        print(f"rank {address.rank} heard: {error}", file=sys.stderr, flush=True)
        disconnect()
        return
    sys.exit("the checkpoint was written after all")


if __name__ == "__main__":
    main()
