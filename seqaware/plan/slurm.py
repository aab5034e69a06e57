"""The batch script of one run for SLURM: slurm/train.sbatch, filled in.

That file is both what a person submits by hand and the form of every script that is printed, so that the two cannot
drift apart. Printed scripts keep the folder they were printed in and the arguments that were typed.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from seqaware.config.loading import REPOSITORY
from seqaware.config.schema import Config
from seqaware.errors import ConfigError
from seqaware.masking import escaped
from seqaware.plan.plan import make_plan
from seqaware.plan.specs import World, model_facts

FORM = REPOSITORY / "slurm" / "train.sbatch"
# As the run itself reckons: where the limit is short, most of it is for training.
_LARGEST_SHARE_OF_LIMIT = 0.25
_TIME = re.compile(r"(?:([0-9]{1,6})-)?([0-9]{1,9}(?::[0-9]{1,9}){0,2})")


@dataclass(frozen=True)
class SlurmJob:
    """What SLURM is asked for.

    Attributes:
        gpus_per_node: one rank each; 0: a cluster without GPUs, one rank a node.
        time: the limit as SLURM reads it: minutes, [days-]hours:minutes:seconds, days-hours.
    """

    nodes: int = 1
    gpus_per_node: int = 8
    time: str = "24:00:00"

    @property
    def ranks_per_node(self) -> int:
        return self.gpus_per_node or 1

    @property
    def world(self) -> World:
        """Its ranks as the Plan counts them."""
        size = self.nodes * self.ranks_per_node
        return World(size, self.ranks_per_node, self.nodes, "cuda" if self.gpus_per_node else "cpu", bf16=True)


def sbatch_script(
    config: Config, *, job: SlurmJob, arguments: Sequence[str], deepspeed_path: Path | None, folder: Path
) -> str:
    """The script that trains `config` as `job`.

    Args:
        arguments: those of launcher/train.py, the config's path first. folder: where the job runs, absolute.

    Raises:
        ConfigError: there can be no run on these ranks, `job.time` is no time, or a name holds control characters.
    """
    for text in (str(folder), str(REPOSITORY), *arguments):
        # A line break would begin another line of the script, perhaps one for SLURM.
        if escaped(text) != text:
            do = "rename it, or leave it out"
            raise ConfigError("a script for SLURM cannot hold control characters", got=text, do=do)
    make_plan(config, world=job.world, deepspeed_path=deepspeed_path, model=model_facts(config.model))
    lead = min(config.faults.leave_minutes * 60, limit_seconds(job.time) * _LARGEST_SHARE_OF_LIMIT)
    text = re.sub(r"^#(?:   .*)?\n", "", FORM.read_text(encoding="utf-8"), flags=re.MULTILINE)  # how to submit the form
    name = re.sub(r"[^\w.-]+", "-", config.model.output_name)
    for option, value in {
        "job-name": name,
        "nodes": job.nodes,
        "ntasks-per-node": job.ranks_per_node,
        "gpus-per-node": job.gpus_per_node,
        "time": job.time,
        "signal": f"B:USR2@{max(1, round(lead))}",
    }.items():
        text = _with_line(text, f"#SBATCH --{option}=", str(value) if value else None)
    text = _with_line(text, "#SBATCH --output=", f"slurm-%x-%j.out\n#SBATCH --chdir={shlex.quote(str(folder))}")
    text = _with_line(text, "SEQAWARE_HOME=", f"${{SEQAWARE_HOME:-{shlex.quote(str(REPOSITORY))}}}")
    return _with_line(text, "arguments=", f'({shlex.join(arguments)} "$@")')


def _with_line(text: str, start: str, value: str | None) -> str:
    """`text` with another value on its one line that starts with `start`; None: without the line."""
    lines = re.findall(f"^{re.escape(start)}.*\n", text, flags=re.MULTILINE)
    assert len(lines) == 1, f"{FORM} has {len(lines)} lines {start}"
    return text.replace(lines[0], "" if value is None else f"{start}{value}\n")


def limit_seconds(time: str) -> int:
    """A time limit as SLURM reads it, in seconds.

    Raises:
        ConfigError: it is none, or zero.
    """
    found = _TIME.fullmatch(time)
    seconds = 0
    if found:
        days, rest = found.groups()
        fields = [int(field) for field in rest.split(":")]
        # Behind days comes the hour; without them one number is minutes, and two are minutes and seconds.
        if days is None and len(fields) < 3:
            fields.insert(0, 0)
        hours, minutes, left = (*fields, 0, 0)[:3]
        seconds = int(days or 0) * 86400 + hours * 3600 + minutes * 60 + left
    if seconds == 0:
        raise ConfigError("--time must be a time limit as SLURM reads it", got=repr(time), do="as in 12:00:00 or 2-00")
    return seconds
