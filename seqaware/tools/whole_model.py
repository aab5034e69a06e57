"""The whole model that a name means, as a Hugging Face folder: a checkpoint's or an adapter's is made once, and kept.

    runs/NAME/exported/step-00000120/   of a checkpoint; exported/model/ of the adapter that a run has left
    ~/.cache/seqaware/models/           of what lies in no run, or in one that cannot be written

Any number of processes may ask at once: one makes it under a lock, the others wait. It is written aside and gets its
name when it is whole; a note in it tells what it was made of, so that it is made again when that has changed.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

from seqaware.checkpoint.manifest import MANIFEST, read_manifest, survey, told_if_removed, what_is_wrong
from seqaware.errors import CheckpointError, ConfigError
from seqaware.files import MalformedError, local_path, read_text
from seqaware.locks import held
from seqaware.models.model_source import ADAPTER_CONFIG
from seqaware.training.process import Say

_MADE_OF = ".made-of"
_PIECES = ("*_model_states.pt", "*_optim_states.pt")


def whole_model(name: str, *, say: Say) -> str:
    """A Hugging Face folder of a whole model, or the hub id that the name is.

    Args:
        name: a hub id, or the folder of a model, an adapter, a checkpoint or a run (its model, else its newest
            checkpoint).

    Raises:
        CheckpointError: the checkpoint is not whole, or of another version.
        ConfigError: the folder is none of these, or the model cannot be made of it.
    """
    folder = local_path(name)
    if not folder.is_dir():
        return name
    if not is_model(folder) and is_model(folder / "model"):
        folder, name = folder / "model", str(folder / "model")
    if is_adapter(folder):
        return str(_made_once(folder, _adapter_identity(folder), _merge_adapter, say=say))
    if is_model(folder):
        return name
    checkpoint = folder if is_checkpoint(folder) else _newest(folder)
    _check_whole(checkpoint)
    with told_if_removed(checkpoint):
        identity = read_manifest(checkpoint).checksum
    return str(_made_once(checkpoint, identity, _export, say=say))


def is_model(folder: Path) -> bool:
    """Whether this is a Hugging Face folder: of a whole model, or of an adapter."""
    return (folder / "config.json").is_file() or (folder / ADAPTER_CONFIG).is_file()


def is_checkpoint(folder: Path) -> bool:
    """Whether this is meant to be a checkpoint, whole or not."""
    lies_among_them = folder.absolute().parent.name == "checkpoints"
    return lies_among_them or (folder / MANIFEST).is_file() or any(next(folder.glob(each), None) for each in _PIECES)


def run_of(folder: Path) -> Path | None:
    """The run that the folder is, or lies in."""
    return next((each for each in (folder, *folder.parents) if (each / "manifest.json").is_file()), None)


def is_adapter(folder: Path) -> bool:
    """Whether this is the folder of an adapter alone."""
    return (folder / ADAPTER_CONFIG).is_file() and not any(folder.glob("model*.safetensors"))


def _newest(run: Path) -> Path:
    """The newest whole checkpoint of a run that has left no model.

    Raises:
        CheckpointError: it has none that is whole. ConfigError: it has none, or is no run.
    """
    found = survey(run if run.name == "checkpoints" else run / "checkpoints")
    if found.whole:
        return found.whole[0]
    if found.damaged:
        first = found.damaged[0]
        raise CheckpointError("no checkpoint of this run is whole", got=f"{first.path}, where {first.problem}")
    if (run / "manifest.json").is_file():
        raise ConfigError("this run has neither a model nor a checkpoint yet", got=run, do="train it first")
    do = "name a Hugging Face folder, an adapter's, a checkpoint, or a run that has been trained"
    raise ConfigError("this folder holds no model", got=run, do=do)


def _check_whole(checkpoint: Path) -> None:
    problem = what_is_wrong(checkpoint)
    if problem is None:
        return
    others = [path.name for path in survey(checkpoint.parent).whole]
    do = f"name another; whole ones beside it: {', '.join(others)}" if others else "name another"
    raise CheckpointError("not a complete checkpoint", got=f"{checkpoint}, where {problem}", do=do)


def _export(checkpoint: Path, folder: Path) -> None:
    from seqaware.tools.export_model import export_checkpoint

    run = checkpoint.absolute().parent.parent
    if not (run / "config.yaml").is_file():
        do = "put it back, or seqaware export CHECKPOINT FOLDER --run RUN, and name that folder"
        raise ConfigError("this checkpoint does not lie in its run's folder", got=checkpoint, do=do)
    export_checkpoint(checkpoint, folder, lora="merged")


def _merge_adapter(adapter: Path, folder: Path) -> None:
    from seqaware.tools.export_model import merge_adapter

    merge_adapter(adapter, folder)


def _adapter_identity(adapter: Path) -> str:
    digest = hashlib.sha256()
    for path in sorted(adapter.glob("adapter_*")):
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def _made_once(source: Path, identity: str, make: Callable[[Path, Path], None], *, say: Say) -> Path:
    """The folder that `make` writes of the source, made if it is not there, or was made of something else."""
    shelf, name = _shelf(source, identity)
    target = shelf / name
    with held(shelf / ".lock"):
        if not _is_made_of(target, identity):
            say(f"model       making a Hugging Face folder of {source}, once")
            _make(target, identity, lambda folder: make(source, folder))
    size = sum(path.stat().st_size for path in target.iterdir())
    shown = f"{size / 1e9:.2f} GB" if size >= 1e8 else f"{size / 1e6:.1f} MB"
    say(f"model       {target} ({shown}), of {source}; it stays for the next time, or remove it")
    return target


def _make(target: Path, identity: str, write: Callable[[Path], None]) -> None:
    scratch = Path(tempfile.mkdtemp(dir=target.parent, prefix=".making-"))
    made = scratch / "model"
    try:
        write(made)
        (made / _MADE_OF).write_text(identity)
        shutil.rmtree(target, ignore_errors=True)
        made.rename(target)
    except OSError as error:
        # Where the disk knows no locks, another host may have put it there meanwhile.
        if not _is_made_of(target, identity):
            do = "free some space, or seqaware export it to another disk and name that folder"
            raise ConfigError("the model's folder cannot be written", got=f"{target}: {error}", do=do) from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _is_made_of(target: Path, identity: str) -> bool:
    try:
        return read_text(target / _MADE_OF, limit=2**10) == identity
    except (OSError, MalformedError):
        return False


def _shelf(source: Path, identity: str) -> tuple[Path, str]:
    """Where the model made of `source` lies, and its name there."""
    run = run_of(source.absolute())
    if run is not None:
        shelf = run / "exported"
        try:
            shelf.mkdir(exist_ok=True)
        except OSError:
            pass
        else:
            if os.access(shelf, os.W_OK):
                return shelf, source.name
    shelf = Path("~/.cache/seqaware/models").expanduser()
    shelf.mkdir(parents=True, exist_ok=True)
    return shelf, f"{source.name}-{identity[:12]}"
