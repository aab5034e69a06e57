"""Which checkpoints a run keeps, and the held-out losses that decide about the best. Without torch.

Only steps and losses count: no clock and no file's time, which differ between hosts and change when a folder is copied.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from seqaware.checkpoint.manifest import (
    LATEST,
    is_passing,
    set_aside,
    set_aside_number,
    step_of,
    survey,
    write_durably,
)
from seqaware.files import read_json

EVALUATIONS = "evaluations.json"


@dataclass(frozen=True)
class Retention:
    """What is kept: the last ones, every so many steps for good, and those with the lowest held-out loss.

    Attributes:
        keep_last: newest checkpoints; also of those that were set aside so many are kept.
        keep_every: steps that are a multiple of it are kept for good; None: none.
        keep_best: as many of those that were evaluated at their own step. The run saves each step whose evaluation
            puts it among them.
    """

    keep_last: int
    keep_every: int | None = None
    keep_best: int = 0

    def kept(self, steps: Sequence[int], losses: Mapping[int, float]) -> set[int]:
        """Which of the checkpoints at `steps` stay.

        Args:
            losses: held-out loss by step; of equal ones the earlier step is the better.
        """
        last = sorted(steps)[-self.keep_last :]
        regular = [step for step in steps if self.keep_every and step % self.keep_every == 0]
        return {*last, *regular, *self.best(steps, losses)}

    def best(self, steps: Iterable[int], losses: Mapping[int, float]) -> set[int]:
        """Return the `keep_best` of `steps` with the lowest losses; steps without a loss do not count."""
        judged = sorted((losses[step], step) for step in steps if step in losses)
        return {step for _, step in judged[: self.keep_best]}


class Evaluations:
    """Held-out losses by step, in a file beside the checkpoints, so that a restart knows them.

    Attributes:
        losses: by step. problem: why those of earlier attempts could not be read, or None.
    """

    def __init__(self, folder: Path) -> None:
        self._path = folder / EVALUATIONS
        self.losses: dict[int, float] = {}
        self.problem: str | None = None
        try:
            written = read_json(self._path)
            self.losses = {int(step): float(loss) for step, loss in written.items()}
        except FileNotFoundError:
            pass
        except (OSError, ValueError, AttributeError, TypeError) as error:
            self.problem = f"{self._path} cannot be read, so the best checkpoints before it are not known: {error}"

    def note(self, step: int, loss: float) -> None:
        """Remember the loss of a step; one that is not finite makes no checkpoint a good one.

        Raises:
            OSError: it could not be written.
        """
        if math.isfinite(loss):
            self.losses[step] = loss
            self._write()

    def forget_later(self, step: int) -> None:
        """Drop what was measured after `step`, when a run goes back to it.

        Raises:
            OSError: it could not be written.
        """
        kept = {each: loss for each, loss in self.losses.items() if each <= step}
        if kept != self.losses:
            self.losses = kept
            self._write()

    def _write(self) -> None:
        self._path.parent.mkdir(exist_ok=True)
        write_durably(self._path, json.dumps(self.losses, indent=1))


def forget_old(folder: Path, keep: Retention, losses: Mapping[int, float], *, trusted: set[Path]) -> list[str]:
    """Delete the checkpoints that need not be kept, and what crashes have left of others.

    Args:
        trusted: checkpoints that are known to be valid, so that their files are not looked at; those found valid join.

    Returns:
        what could not be deleted, and why; nothing else depends on it.
    """
    whole = survey(folder, trusted).whole
    trusted.update(whole)
    stay = keep.kept([step_of(path) for path in whole], losses)
    going = [path for path in whole if step_of(path) not in stay]
    going += set_aside(folder)[keep.keep_last :]
    return [problem for path in going for problem in _delete(path)] + sweep(folder)


def set_aside_later(folder: Path, step: int) -> None:
    """Take the checkpoints of later steps out of the way of a run that goes on from `step`, and damaged ones as well.

    They are renamed, not deleted: going back may have been a mistake. `Retention` clears the older of them away.
    """
    found = survey(folder)
    going = [path for path in found.whole if step_of(path) > step] + [damage.path for damage in found.damaged]
    number = 1 + max((set_aside_number(path) for path in set_aside(folder)), default=0)
    for path in going:
        path.rename(folder / f"abandoned-{number:04d}-{path.name}")
    left = [path for path in found.whole if path not in going]
    if left:
        write_durably(folder / LATEST, left[0].name)
    elif going:
        (folder / LATEST).unlink(missing_ok=True)


def sweep(folder: Path) -> list[str]:
    """Delete the folders of checkpoints that were on their way in or out when a process ended."""
    children = list(folder.iterdir()) if folder.is_dir() else []
    left = [child for child in children if is_passing(child.name) and child.is_dir()]
    return [problem for path in left for problem in _remove(path)]


def _delete(path: Path) -> Iterator[str]:
    # Renamed first: what a crash leaves of it never looks like a damaged checkpoint.
    leaving = path.with_name(path.name + ".deleting")
    try:
        path.rename(leaving)
    except OSError as error:
        yield f"{path} could not be deleted: {error.strerror}"
        return
    yield from _remove(leaving)


def _remove(path: Path) -> Iterator[str]:
    try:
        if path.is_symlink():
            path.unlink()  # what somebody has put elsewhere is theirs
        else:
            shutil.rmtree(path)
    except OSError as error:
        yield f"{path} could not be deleted: {error.strerror} ({error.filename})"
