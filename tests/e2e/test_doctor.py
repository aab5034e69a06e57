"""The doctor as a person starts it: alone, with a config, with a hostfile, and by a launcher."""

from __future__ import annotations

import re
import socket
import sys
from pathlib import Path

import pytest

from tests import launch, tiny

# Distinctive, so that any trace of them is found.
SECRETS = {"HF_TOKEN": "hf_QQdoctorQQtokenQQ", "WANDB_API_KEY": "QQdoctorQQwandbQQ"}
# Answers for hosts by their names; the command itself runs on this one, as ssh would run it: by a shell, from home.
SSH = f"""#!{sys.executable}
import os, subprocess, sys
*options, host, command = sys.argv[1:]
assert "BatchMode=yes" in options, "nobody is there to type a password"
match host:
    case "localhost":
        print("Welcome to localhost!", flush=True)
        sys.exit(subprocess.run(["sh", "-c", command], cwd="/").returncode)
    case "127.0.0.2":
        sys.exit(print("root@127.0.0.2: Permission denied (publickey).", file=sys.stderr) or 255)
    case "127.0.0.3":
        sys.exit(print("sh: 1: exec: python: not found", file=sys.stderr) or 127)
"""


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> tiny.Workshop:
    return tiny.build(tmp_path_factory.mktemp("doctor"))


def lines_of(output: str) -> dict[str, list[str]]:
    """Level -> subject and words of each finding, on one line."""
    found: dict[str, list[str]] = {"ok": [], "warning": [], "ERROR": []}
    last = found["ok"]
    for line in output.splitlines():
        match = re.match(r"(ok|warning|ERROR) +(\S.*)", line)
        if match:
            last = found[match[1]]
            last.append(match[2])
        elif line.startswith(" ") and last:
            last[-1] += " " + line.strip()
    return {level: [" ".join(line.split()) for line in lines] for level, lines in found.items()}


def test_a_machine_without_troubles(tmp_path: Path) -> None:
    """Into a file of 60 columns: no colours, nothing cut off, exit code 0, and no file is left."""
    port = str(launch.free_port())
    done = launch.python("launcher/doctor.py", cwd=tmp_path, COLUMNS="60", TERM="dumb", MASTER_PORT=port)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stderr == ""
    assert done.stdout.isascii() and "\x1b" not in done.stdout
    assert max(map(len, done.stdout.splitlines())) <= 60
    found = lines_of(done.stdout)
    assert found["ERROR"] == []
    for subject in ("python", "torch", "deepspeed", "transformers", "compiler", "GPU", "run folder", "master port"):
        assert any(line.startswith(subject) for line in found["ok"] + found["warning"]), subject
    assert not list(tmp_path.iterdir())


def test_every_trouble_is_told_at_once(workshop: tiny.Workshop) -> None:
    config = workshop.config(
        model={"base_name": str(workshop.folder / "no-model")},
        dataset={"name": str(workshop.folder / "no-rows.jsonl"), "store_dir": "/proc/stores"},
        output__dir="/proc/run",
    )
    path = str(workshop.write("troubles", config))
    with socket.create_server(("", 0)) as server:
        done = launch.forked(
            "launcher/doctor.py",
            path,
            ranks=None,
            COLUMNS="200",
            MASTER_PORT=str(server.getsockname()[1]),
            NCCL_SOCKET_IFNAME="=absent0",
            CUDA_LAUNCH_BLOCKING="1",
            **SECRETS,
        )
    assert done.returncode == 2, done.stdout + done.stderr
    found = lines_of(done.stdout)
    for told in ("plan model.base_name", "model model.base_name", "dataset dataset file not found", "run folder /proc"):
        assert any(line.startswith(told) for line in found["ERROR"]), (told, found["ERROR"])
    assert any("master port" in line and "in use" in line for line in found["ERROR"])
    assert any("NCCL_SOCKET_IFNAME" in line and "absent0" in line for line in found["ERROR"])
    assert any("CUDA_LAUNCH_BLOCKING" in line for line in found["warning"])
    assert any("HF_TOKEN set, WANDB_API_KEY set" in line for line in found["ok"])
    assert all(secret not in done.stdout + done.stderr for secret in SECRETS.values())
    assert done.stdout.splitlines()[-1].startswith(f"{len(found['ERROR'])} errors")


@pytest.mark.distributed
def test_ranks_that_a_launcher_started(workshop: tiny.Workshop) -> None:
    """They meet and measure; rank 0 alone speaks. The optimizer's operator is looked for as well."""
    config = workshop.config(output__dir=str(workshop.folder / "run"), training__optimizer={"type": "cpu_adam"})
    done = launch.forked("launcher/doctor.py", str(workshop.write("ranks", config)), ranks=2)
    assert done.returncode == 0, done.stdout + done.stderr
    found = lines_of(done.stdout)
    assert "ranks all 2 meet, on 1 host" in found["ok"]
    assert any(re.match(r"all-reduce gloo: \d+\.\d+ GB/s over each link", line) for line in found["ok"])
    assert any(line.startswith("operator CPUAdam") for line in found["ok"])
    assert any(line.startswith("plan 2 ranks on cpu, ZeRO 2, float32") for line in found["ok"])
    assert done.stdout.count(" ok\n") == 1  # one sum, of one table
    assert not (workshop.folder / "run").exists()


def test_hosts_of_a_hostfile(workshop: tiny.Workshop, tmp_path: Path) -> None:
    (tmp_path / "ssh").write_text(SSH)
    (tmp_path / "ssh").chmod(0o755)
    hosts = tmp_path / "hosts"
    hosts.write_text("localhost slots=1\n127.0.0.2 slots=1\n127.0.0.3 slots=1\nno-such-host.invalid slots=1\n")
    path = str(workshop.write("hosts", workshop.config(output__dir=str(workshop.folder / "run"))))
    known = {**launch.environment(), "COLUMNS": "200"}
    command = ("launcher/doctor.py", path, "--hostfile", str(hosts))
    done = launch.forked(*command, ranks=None, COLUMNS="200", PATH=f"{tmp_path}:{known['PATH']}")
    assert done.returncode == 2, done.stdout + done.stderr
    found = lines_of(done.stdout)
    assert any(
        "127.0.0.2 ssh: root@127.0.0.2: Permission denied" in line and "ssh-copy-id" in line for line in found["ERROR"]
    )
    assert any("127.0.0.3 this Python does not run there" in line and sys.executable in line for line in found["ERROR"])
    assert any("no-such-host.invalid the name leads nowhere" in line for line in found["ERROR"])
    for told in ("same software", "run folder one and the same", "ports", "clocks"):
        assert any(line.startswith(told) for line in found["ok"]), (told, done.stdout)
    hosts.write_text("localhost slots=one\n")
    done = launch.forked("launcher/doctor.py", "--hostfile", str(hosts), ranks=None, COLUMNS="200")
    assert done.returncode == 2 and "line 1: not a host" in done.stdout


def test_it_may_stand_in_a_batch_script(workshop: tiny.Workshop) -> None:
    """The first node's shell has the job's variables; no srun has started us, so no rank is waited for."""
    path = str(workshop.write("batch", workshop.config(output__dir=str(workshop.folder / "run"))))
    job = {"SLURM_JOB_ID": "7", "SLURM_NNODES": "2", "SLURM_NTASKS": "2", "SLURM_PROCID": "0", "SLURM_NODEID": "0"}
    done = launch.forked("launcher/doctor.py", path, ranks=None, COLUMNS="200", **job)
    assert done.returncode == 0, done.stdout + done.stderr
    assert any(line.startswith("plan 2 ranks") for line in lines_of(done.stdout)["ok"])
