"""`launcher/train.py CONFIG --print-sbatch`: the same command as a script for SLURM, `… --print-sbatch | sbatch`."""

from __future__ import annotations

from itertools import chain
from pathlib import Path

import typer

from seqaware.config.loading import DEFAULT_CONFIG, load_config
from seqaware.plan.slurm import SlurmJob, sbatch_script

# These say what is printed; every other option that was typed goes into the script.
_OWN = ("print_sbatch", "nodes", "gpus_per_node", "time")


def print_script(context: typer.Context, *, job: SlurmJob) -> None:
    """Print the script of the command that is being run, for a job that runs in this folder."""
    path, overrides, deepspeed = (context.params[name] for name in ("config", "overrides", "deepspeed"))
    arguments = [str(path or DEFAULT_CONFIG), *_typed_options(context)]
    config = load_config(path, overrides or [])
    script = sbatch_script(config, job=job, arguments=arguments, deepspeed_path=deepspeed, folder=Path.cwd())
    typer.echo(script, nl=False)


def _typed_options(context: typer.Context) -> list[str]:
    """What was typed behind the config, but for our own options, spelt out."""
    typed: list[str] = []
    for option in context.command.params:
        name = str(option.name)
        source = context.get_parameter_source(name)
        if option.param_type_name != "option" or name in _OWN or source is None or source.name != "COMMANDLINE":
            continue
        value = context.params[name]
        each_with_flag = ((option.opts[0], str(each)) for each in (value if isinstance(value, list) else [value]))
        typed += [option.opts[0]] if isinstance(value, bool) else chain.from_iterable(each_with_flag)
    return typed
