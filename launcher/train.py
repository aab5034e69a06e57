"""Train: `deepspeed launcher/train.py CONFIG`, or `python launcher/train.py CONFIG` for one rank.

Also started as it is by torchrun, srun and mpirun. Exit codes: 0 trained, 2 something a person has to mend, 85
saved and left because it was asked to (the same command goes on), 1 anything else.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from launcher.imports import quick_imports
from launcher.options import DeepSpeedJson, LocalRank, Overrides, bounded_ranks
from launcher.outcome import Watched, person_errors, say
from seqaware.config.loading import load_config
from seqaware.distributed.launch_environment import LaunchEnvironment
from seqaware.distributed.process_group import disconnect, find_address, gpu_is_visible, prepare_environment
from seqaware.errors import ConfigError

app = typer.Typer(add_completion=False)


@app.command()
def train(
    context: typer.Context,
    config: Annotated[Path | None, typer.Argument(help="The run's YAML; default: train_configs/default.yaml.")] = None,
    deepspeed: DeepSpeedJson = None,
    overrides: Overrides = None,
    resume: Annotated[str, typer.Option(help="auto, never, or a checkpoint's folder.")] = "auto",
    resume_anyway: Annotated[
        list[str] | None,
        typer.Option(
            metavar="WHAT",
            help="Go on although this has changed: objective, data, batch, …; repeatable, or with commas.",
        ),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the resolved Plan and stop.")] = False,
    ranks: Annotated[
        int | None,
        typer.Option(metavar="N", min=1, callback=bounded_ranks, help="With --dry-run: plan for this many ranks."),
    ] = None,
    print_sbatch: Annotated[
        bool, typer.Option("--print-sbatch", help="Print this run's script for SLURM and stop.")
    ] = False,
    nodes: Annotated[
        int, typer.Option(metavar="N", min=1, callback=bounded_ranks, help="With --print-sbatch: nodes.")
    ] = 1,
    gpus_per_node: Annotated[
        int, typer.Option(metavar="N", min=0, max=1024, help="With --print-sbatch: GPUs of a node, one rank each.")
    ] = 8,
    time: Annotated[str, typer.Option(help="With --print-sbatch: the time limit.")] = "24:00:00",
    local_rank: LocalRank = -1,
) -> None:
    """Train a causal language model with discounted log-suffix weighting.

    Examples:

        deepspeed --num_gpus 2 launcher/train.py train_configs/demo.yaml --deepspeed ds_configs/zero3.json

        seqaware train train_configs/demo.yaml --set training.sft.gamma=0.9 --dry-run

        seqaware train train_configs/demo.yaml --print-sbatch --nodes 2 --time 2:00:00 | sbatch
    """
    del local_rank
    with person_errors():
        address = find_address(check=not (dry_run or print_sbatch))
    with person_errors(address.rank):
        if ranks is not None and not dry_run:
            raise ConfigError(
                "--ranks plans for ranks and starts none",
                got=f"--ranks {ranks} without --dry-run",
                do="write --nodes and --gpus-per-node"
                if print_sbatch
                else f"start {ranks} ranks by a launcher: deepspeed --num_gpus {ranks} launcher/train.py …",
            )
        if print_sbatch:
            from launcher.sbatch import print_script
            from seqaware.plan.slurm import SlurmJob

            print_script(context, job=SlurmJob(nodes, gpus_per_node, time))
        elif dry_run:
            _dry_run(config, deepspeed, overrides or [], ranks or address.size)
        else:
            anyway = tuple(name.strip() for each in resume_anyway or [] for name in each.split(","))
            settings = {"deepspeed_path": deepspeed, "resume": resume, "resume_anyway": anyway}
            _train(config, overrides or [], address=address, **settings)


def _dry_run(path: Path | None, deepspeed: Path | None, overrides: list[str], ranks: int) -> None:
    from seqaware.estimate.render_plan import render_plan
    from seqaware.tools.dry_run import plan_without_torch

    config = load_config(path, overrides)
    plan = plan_without_torch(config, deepspeed_path=deepspeed, ranks=ranks, gpu=gpu_is_visible())
    say(render_plan(plan))


def _train(path: Path | None, overrides: list[str], *, address: LaunchEnvironment, **settings: Any) -> None:
    """settings: those of a `RunRequest`, whose module is slow to import."""
    prepare_environment()
    from seqaware.training.preemption import LEFT, PreemptedExit, Signals
    from seqaware.watchdog.heartbeat import start_heartbeat

    with Watched(start_heartbeat(address)) as heartbeat, Signals(abandoned=heartbeat.sibling_is_dead) as signals:
        config = load_config(path, overrides)
        heartbeat.watch_hangs(config.faults.hang_minutes)
        # The slow imports of torch and DeepSpeed.
        with quick_imports():
            from seqaware.training.launch import RunRequest, run

        def note_and_say(text: str) -> None:
            heartbeat.note(text)
            if address.rank == 0:
                say(text)

        try:
            request = RunRequest(config, **settings)
            run(request, address=address, say=note_and_say, signals=signals, heartbeat=heartbeat)
        except PreemptedExit as left:
            if left.together:
                # Told before the ranks part: mpirun ends the others the moment that one of them has left.
                heartbeat.close(LEFT)
                disconnect()
            raise
        disconnect()


if __name__ == "__main__":
    app()
