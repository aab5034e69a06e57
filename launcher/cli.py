"""`seqaware COMMAND`: all commands under one name. Each is one file here, which also runs by itself.

A command's module is imported when the command is asked for: `seqaware --help` and a shell's completion are quick.
"""

from __future__ import annotations

import importlib
import importlib.metadata
from typing import Annotated, Any, NamedTuple

import typer
from typer.core import TyperCommand, TyperGroup


class Command(NamedTuple):
    """Where a command is, under which heading of the help, and what it does, in a line."""

    module: str
    heading: str
    help: str


BEFORE, RUN, AFTER, TOOLS = "Before a run", "A run", "After a run", "Tools"
# A new command is one line here. Its module has an `app`.
COMMANDS = {
    "init": Command("launcher.init", BEFORE, "Write a first config from a few answers."),
    "prepare": Command("launcher.prepare", BEFORE, "Tokenise the data ahead of time."),
    "plan": Command("launcher.plan", BEFORE, "Steps, memory, hours and disk of a run, on GPUs that need not be here."),
    "preview": Command("launcher.preview", BEFORE, "The packed rows of a step: text, positions, weights, borders."),
    "weights": Command("launcher.weights", BEFORE, "Where the objective puts its weight, on this data."),
    "verify": Command("launcher.verify", BEFORE, "Hold loss and gradients of the first steps to a float64 oracle."),
    "doctor": Command("launcher.doctor", BEFORE, "Look for what would stop a run on this machine, and what to do."),
    "train": Command("launcher.train", RUN, "Train; on several GPUs started by deepspeed, torchrun, srun or mpirun."),
    "sweep": Command("launcher.sweep", RUN, "Train every γ with every seed, and compare them in one report."),
    "watch": Command("launcher.watch", RUN, "A live view of a run, from its files."),
    "report": Command("launcher.report", AFTER, "Runs as one HTML page, with figures, intervals and tables."),
    "export": Command("launcher.export", AFTER, "A Hugging Face folder of any checkpoint, on one CPU."),
    "convert": Command("launcher.convert", AFTER, "DeepSpeed's universal checkpoint of any checkpoint."),
    "evaluate": Command("launcher.evaluate", AFTER, "Answer held-out questions with a model, and judge the answers."),
    "analyse": Command("launcher.analyse", AFTER, "How sure a model is of what it writes, step by step."),
    "push": Command("launcher.push", AFTER, "Share a model on the Hugging Face hub, private by default."),
    "fetch-smollm2": Command("launcher.fetch_smollm2", TOOLS, "Fetch a small pretrained model, without a hub."),
}


class LazyCommands(TyperGroup):
    """The commands of the table: listed from it, imported when one of them is meant."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        for name, command in COMMANDS.items():
            listed = TyperCommand(name, callback=None, help=command.help, rich_help_panel=command.heading)
            self.add_command(listed)

    def resolve_command(self, ctx: Any, args: list[str]) -> tuple[str | None, Any, list[str]]:
        name, listed, rest = super().resolve_command(ctx, args)
        if name is None or listed is None:
            return name, listed, rest
        module = importlib.import_module(COMMANDS[name].module)
        return name, typer.main.get_command(module.app), rest


app = typer.Typer(cls=LazyCommands, no_args_is_help=True, context_settings={"help_option_names": ["-h", "--help"]})


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"seqaware {importlib.metadata.version('seqaware')}")
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version and stop.")
    ] = False,
) -> None:
    """Train language models whose loss knows where in its sequence a token stands.

    Examples:

        seqaware plan train_configs/demo.yaml

        seqaware train train_configs/demo.yaml --dry-run

        deepspeed launcher/train.py train_configs/demo.yaml --deepspeed ds_configs/zero3.json

        seqaware plan --help
    """
    del version  # dealt with by its callback


if __name__ == "__main__":
    app()
