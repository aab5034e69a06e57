"""A rank without a model, moved by lines on its standard input: `python fake_rank.py RANK SIZE PORT FOLDER [JSON]`.

phase NAME STEP · settle RUN · hang MINUTES · say TEXT     it answers each with a line
fail TEXT · lose · mend TEXT · end CODE                    how it ends
stand · wait · grab                                        it stands still: by itself, in a collective, with the GIL
build LOCK PROGRAM                                         it builds an operator under a lock, PROGRAM is the compiler
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from pathlib import Path

from launcher.outcome import Watched
from seqaware.compat.build_lock import KernelLock
from seqaware.distributed.launch_environment import LaunchEnvironment
from seqaware.errors import DataError
from seqaware.watchdog.heartbeat import WatchedHeartbeat, start_heartbeat

# As a stack shows it whose rank waits for others.
_COLLECTIVE: dict[str, object] = {}
exec(
    compile(
        "import time\ndef all_reduce():\n    time.sleep(600)",
        "/site-packages/torch/distributed/distributed_c10d.py",
        "exec",
    ),
    _COLLECTIVE,
)


def stand_in_forward() -> None:
    time.sleep(600)


def build(lock_file: str, program: str) -> None:
    lock = KernelLock(lock_file)
    lock.try_acquire()
    subprocess.run([sys.executable, "-c", program], check=True)
    lock.release()


def act(heartbeat: WatchedHeartbeat, command: str, rest: str) -> None:
    match command:
        case "phase":
            name, step = rest.rsplit(" ", 1)
            heartbeat.phase(name, int(step))
        case "settle":
            heartbeat.settle(Path(rest), 1)
        case "hang":
            heartbeat.watch_hangs(float(rest))
        case "say":
            heartbeat.note(rest)
        case "dead?":
            print(heartbeat.sibling_is_dead(), flush=True)
        case "fail":
            raise ValueError(rest)
        case "lose":
            raise RuntimeError("[gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:19424")
        case "mend":
            raise DataError(rest)
        case "end":
            raise SystemExit(int(rest))
        case "build":
            build(*rest.split(" ", 1))
        case "stand":
            stand_in_forward()
        case "wait":
            _COLLECTIVE["all_reduce"]()  # type: ignore[operator]
        case "grab":
            # The regular expressions of Python keep the interpreter's lock, and this one takes years.
            re.match(r"(a+)+$", "a" * 64 + "b")


def main() -> None:
    rank, size, port = (int(text) for text in sys.argv[1:4])
    options = {"launcher": "test", "local_rank": rank, "local_size": size, "nodes": 1, "host": None}
    options |= json.loads((sys.argv[5:6] or ["{}"])[0])
    host, base = options.pop("host"), Path(sys.argv[4], options.pop("base", "."))
    base.mkdir(exist_ok=True)
    address = LaunchEnvironment(rank=rank, size=size, master_address="127.0.0.1", master_port=port, **options)
    with Watched(start_heartbeat(address, base, host=host)) as heartbeat:
        print("ready", flush=True)
        for line in sys.stdin:
            act(heartbeat, *line.rstrip("\n").partition(" ")[::2])
            print("done", flush=True)


if __name__ == "__main__":
    main()
