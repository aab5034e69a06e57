"""What a rank tells the others of itself, apart from its place: a small JSON that is replaced, never torn."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from seqaware.files import read_json
from seqaware.watchdog.host_process import HostProcess
from seqaware.watchdog.shared_status import RankPosition

Status = Literal["running", "failed", "ended"]


@dataclass(frozen=True)
class Stuck:
    """A main thread that has not moved for long.

    Attributes:
        seconds: since it last moved. where: its innermost line. stack: all of them, outermost first.
        waits: whether it stands in a collective, waiting for others.
    """

    seconds: float
    where: str
    stack: list[str]
    waits: bool


@dataclass(frozen=True)
class RankCard:
    """One rank.

    Attributes:
        status: `failed`: by an error of its own, and it tells so itself. `ended`: as it should, with whatever code.
        code: its exit code, once it is known. message: why it failed.
        place: where it was when the card was written; its dial is newer, but readable on its own host only.
    """

    rank: int
    size: int
    host: str
    process: HostProcess
    log: str
    place: RankPosition
    status: Status = "running"
    code: int | None = None
    message: str | None = None
    stuck: Stuck | None = None

    def name(self) -> str:
        """`rank 1 of 8 on host h2 (pid 123)`."""
        return f"rank {self.rank} of {self.size} on host {self.host} (pid {self.process.pid})"

    def write(self, path: Path) -> None:
        _write(path, asdict(self))


def read_card(path: Path) -> RankCard | None:
    """The card of another rank; None where there is none."""
    try:
        return _card(read_json(path))
    except (OSError, ValueError, KeyError, TypeError):
        return None  # not yet written, or by another version


def write_cards(path: Path, cards: Iterable[RankCard]) -> None:
    """Write the cards of one host into one file, for the other hosts."""
    _write(path, [asdict(card) for card in cards])


def read_cards(path: Path) -> list[RankCard]:
    """Return the cards that another host has written; none where there is no such file."""
    try:
        return [_card(values) for values in read_json(path)]
    except (OSError, ValueError, KeyError, TypeError):
        return []  # not yet written, or by another version


def _write(path: Path, content: object) -> None:
    partial = path.with_name(f"{path.name}.{os.getpid()}-{threading.get_ident()}.partial")
    partial.write_text(json.dumps(content), encoding="utf-8")
    partial.replace(path)


def _card(values: dict[str, Any]) -> RankCard:
    values["process"] = HostProcess(**values["process"])
    values["place"] = RankPosition(*values["place"])
    values["stuck"] = Stuck(**values["stuck"]) if values["stuck"] else None
    return RankCard(**values)


def code_of(cards: Iterable[RankCard]) -> int | None:
    """Exit code of the lowest rank that has failed by an error of its own; None where none has."""
    failed = [card for card in cards if card.message is not None and card.code]
    return min(failed, key=lambda card: card.rank).code if failed else None
