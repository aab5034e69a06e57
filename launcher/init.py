"""Init: a first config from a few answers, `python launcher/init.py my.yaml`. Asks on a terminal, else takes the flags.

What it writes has been parsed and planned. It overwrites nothing.
"""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from launcher.options import bounded, bounded_ranks
from launcher.outcome import person_errors, say
from seqaware.errors import ConfigError

app = typer.Typer(add_completion=False)


@app.command()
def init(
    path: Annotated[Path, typer.Argument(help="The config to write; must not exist.")] = Path("my.yaml"),
    model: Annotated[str | None, typer.Option(help="Hub id or folder of a causal language model.")] = None,
    data: Annotated[str | None, typer.Option(help="File (jsonl, csv, parquet …), folder, hub id, or gsm8k.")] = None,
    held_out: Annotated[str | None, typer.Option(help="The same, of held-out rows.")] = None,
    gamma: Annotated[
        float | None, typer.Option(metavar="X", min=0, max=1, help="The discount γ; 0.98 if none is written.")
    ] = None,
    half_life: Annotated[
        float | None, typer.Option(metavar="X", help="γ in tokens: after so many the discount has halved.")
    ] = None,
    gpus: Annotated[
        int | None, typer.Option(metavar="N", min=0, callback=bounded_ranks, help="All GPUs of the run; 0: none.")
    ] = None,
    per_node: Annotated[int, typer.Option(metavar="N", min=1, callback=bounded_ranks, help="GPUs of one node.")] = 8,
    device: Annotated[str, typer.Option(help="h200, h100 or a100.")] = "h100",
    max_seq_length: Annotated[
        int, typer.Option(metavar="N", min=2, callback=bounded, help="Tokens of an example.")
    ] = 2048,
    batch: Annotated[
        int | None,
        typer.Option(metavar="N", min=1, callback=bounded, help="Sequences of an optimizer step; 16 or more."),
    ] = None,
    lora: Annotated[bool, typer.Option("--lora", help="Train adapters instead of the whole model.")] = False,
) -> None:
    """Write a commented config that parses, fits and can be planned.

    Examples:

        seqaware init my.yaml

        seqaware init my.yaml --model meta-llama/Llama-3.1-8B --data rows.jsonl --half-life 100 --gpus 8 --device h100
    """
    with person_errors():
        if not path.name.isprintable():
            raise ConfigError("a config's name must be printable", got=path.name)
        if path.exists():
            raise ConfigError(f"{path} is there already", do="name another file, or remove it")
        if path.suffix not in (".yaml", ".yml"):
            raise ConfigError("a config is a .yaml file", got=path, do=f"write {path}.yaml")
        if gamma is not None and half_life is not None:
            raise ConfigError("--gamma and --half-life are one number in two spellings", do="keep one of them")
        asked = _ask(model=model, data=data, gpus=gpus)
        discount = {"half_life": half_life} if half_life is not None else {"gamma": _gamma(gamma)}
        settings = {"device": device, "held_out": held_out, "max_seq_length": max_seq_length, "lora": lora}
        _write(path, {**asked, **settings, "discount": discount, "batch": batch, "per_node": per_node})


def _ask(*, model: str | None, data: str | None, gpus: int | None) -> dict[str, Any]:
    """What was not written: asked on a terminal, refused elsewhere."""
    if not sys.stdin.isatty():
        for name, value in (("--model", model), ("--data", data)):
            if not value:
                raise ConfigError(f"{name} is needed where nobody can be asked", do="see seqaware init --help")
    return {
        "model": model or typer.prompt("Model (hub id or folder)", default="gpt2"),
        "data": data or typer.prompt("Data (file, folder or hub id)", default="gsm8k"),
        "gpus": gpus if gpus is not None else typer.prompt("GPUs", default=1, type=int) if sys.stdin.isatty() else 1,
    }


def _gamma(written: float | None) -> float:
    if written is not None or not sys.stdin.isatty():
        return 0.98 if written is None else written
    question = "Discount γ, from 0 (plain cross-entropy) to 1"
    return float(typer.prompt(question, default=0.98, type=float))


def _write(path: Path, asked: dict[str, Any]) -> None:
    from seqaware.config.loading import load_config
    from seqaware.estimate.hardware import device_named
    from seqaware.estimate.render_plan import render_plan
    from seqaware.tools.dry_run import plan_without_torch
    from seqaware.tools.init_config import Answers, starter
    from seqaware.tools.plan_estimate import Gpus

    gpus = Gpus(asked["gpus"], asked.pop("per_node"))
    batch = asked["batch"] or max(16, 2 * gpus.all)
    answers = Answers(
        **{**asked, "gpus": gpus, "batch": batch, "device": device_named(asked["device"]), "name": path.stem}
    )
    text = starter(answers)
    try:
        with path.open("x", encoding="utf-8") as file:
            file.write(text)
    except OSError as error:
        raise ConfigError(f"{path} cannot be written", got=error.strerror) from error
    try:
        plan = plan_without_torch(load_config(path), deepspeed_path=None, ranks=max(1, gpus.all), gpu=gpus.all > 0)
    except BaseException:
        path.unlink()  # what does not plan is of no use
        raise
    say(render_plan(plan, settings=False))
    name = shlex.quote(str(path))
    say(f"\nwritten     {path}")
    say(f"next        seqaware plan {name} --gpus {max(1, gpus.all)}; seqaware preview {name}")
    say(f"then        {_start(name, gpus.all, gpus.of_node)}")


def _start(name: str, gpus: int, of_node: int) -> str:
    if gpus <= 1:
        return f"seqaware train {name}"
    if gpus <= of_node:
        return f"deepspeed --num_gpus {gpus} launcher/train.py {name}"
    nodes = f"--nodes {gpus // of_node} --gpus-per-node {of_node}"
    return f"seqaware train {name} --print-sbatch {nodes} | sbatch"


if __name__ == "__main__":
    app()
