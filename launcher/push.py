"""Push: `python launcher/push.py RUN_OR_MODEL OWNER/NAME`: share a model on the Hugging Face hub, in private."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from launcher.imports import quick_imports
from launcher.outcome import person_errors, say
from seqaware.distributed.process_group import environment, prepare_environment

app = typer.Typer(add_completion=False)


@app.command()
def push(
    source: Annotated[
        Path, typer.Argument(metavar="RUN_OR_MODEL", help="The folder of a run, a checkpoint or a model.")
    ],
    repository: Annotated[str, typer.Argument(metavar="REPO", help="owner/name on the hub.")],
    public: Annotated[bool, typer.Option("--public", help="Let everybody see it; else it is private.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show what would be sent, and stop.")] = False,
) -> None:
    """Send a model to the Hugging Face hub, with a card and the record of its training, in one commit.
    The token is read from HF_TOKEN. Only the model, the card and the run's own records are sent.

    Examples:

        python launcher/push.py runs/demo someone/seqaware-demo --dry-run

        HF_TOKEN=… python launcher/push.py runs/demo someone/seqaware-demo
    """
    with person_errors():
        _push(source, repository, public=public, dry_run=dry_run)


def _push(source: Path, repository: str, *, public: bool, dry_run: bool) -> None:
    prepare_environment()
    with quick_imports():
        from seqaware.tools.push import check_repository, pack, token_in
        from seqaware.tools.push import push as push_parcel

    check_repository(repository)
    token = "" if dry_run else token_in(environment())
    parcel = pack(source, title=repository.partition("/")[2], say=say)
    for line in parcel.lines():
        say(line)
    visibility = "public" if public else "private"
    say(f"{parcel.bytes:>15,}  bytes in all, for {repository} ({visibility})")
    if dry_run:
        say(f"\n{parcel.card}\nnothing was sent (--dry-run)")
        return
    say(f"sent        {push_parcel(parcel, repository, token=token, public=public, say=say)}")


if __name__ == "__main__":
    app()
