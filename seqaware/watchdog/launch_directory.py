"""The folder in which the ranks of one launch on one host meet: named after the process that started them all.

    <temporary files>/seqaware-<uid>/<host>-<pid namespace>-<parent's pid>-<its start>-<port>/
        rank-0003.json   who it is and how it stands     rank-0003.dial   where it is, to the moment
        rank-0003.log    until the run's folder is known     told             the first word about the end of the launch
        starting         locked by the rank that takes its place

Siblings share their parent whatever launched them: deepspeed's launch.py, torchrun's agent, slurmstepd, mpirun's proxy.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from seqaware.distributed.launch_environment import LaunchEnvironment
from seqaware.errors import ConfigError
from seqaware.watchdog.host_process import HostProcess, Life, above_own_group, host_name
from seqaware.watchdog.rank_card import RankCard, read_card

TOLD = "told"
_SECONDS_KEPT = 24 * 3600.0
# A sibling writes its files in milliseconds. One that is stopped meanwhile is no reason to stand still, unseen.
_LONGEST_WAIT = 10.0


@dataclass(frozen=True)
class LaunchDirectory:
    """Paths, and what may be asked about them."""

    path: Path

    def card(self, rank: int) -> Path:
        return self.path / f"rank-{rank:04d}.json"

    def dial(self, rank: int) -> Path:
        return self.path / f"rank-{rank:04d}.dial"

    def log(self, rank: int) -> Path:
        return self.path / f"rank-{rank:04d}.log"

    def cards(self) -> list[RankCard]:
        """Of all ranks of this host that have come so far, by rank."""
        found = (read_card(path) for path in sorted(self.path.glob("rank-*.json")))
        return [card for card in found if card is not None]

    def claim(self, text: str) -> bool:
        """Take the word for the launch; False if somebody has it."""
        return claim(self.path, text)

    def told(self) -> bool:
        return (self.path / TOLD).exists()

    @contextmanager
    def take_place(self, rank: int, *, size: int) -> Iterator[None]:
        """Forget ranks that were here before and are gone, and let `rank` write its own files; one rank at a time.

        torchrun starts its ranks again, and perhaps more or fewer of them. A card of this very rank, or of a launch of
        another size, is an earlier launch's, and so is what was told. A sibling that is gone while others live, or
        whose launch has seen none of this rank before, is of this launch, and what it has told holds.

        Raises:
            ConfigError: another launch is running in this folder.
        """
        with (self.path / "starting").open("a") as lock:
            _lock(lock.fileno())
            cards = self.cards()
            mine = [card for card in cards if card.rank == rank]
            earlier = [card for card in cards if card.rank == rank or card.size != size]
            lively = [card for card in cards if card.process.life() is not Life.GONE]
            for card in earlier:
                if card in lively and card.process != HostProcess.of_myself():
                    what = "another launch of the same parent process has the same port and is running on this host"
                    raise ConfigError(what, got=f"{card.name()}, in {self.path}", do="give one another master port")
            if earlier:
                (self.path / TOLD).unlink(missing_ok=True)
            alone = all(card.rank == rank for card in lively)
            self._forget(cards if mine and alone else earlier)
            yield

    def _forget(self, cards: list[RankCard]) -> None:
        for card in cards:
            # Where a file system has no locks, a sibling that starts with us may just have put its own card there.
            if read_card(self.card(card.rank)) == card:
                for path in (self.card(card.rank), self.dial(card.rank), self.log(card.rank)):
                    path.unlink(missing_ok=True)

    def keep(self, rank: int) -> None:
        """Show whoever clears old temporary files away that these are in use."""
        for path in (self.path.parent, self.path, self.card(rank), self.dial(rank), self.log(rank)):
            with suppress(FileNotFoundError):
                os.utime(path)

    def remove_if_all_ended(self, count: int) -> None:
        """The last of `count` ranks that ends as it should leaves nothing behind."""
        cards = self.cards()
        if len(cards) == count and all(card.status == "ended" for card in cards):
            shutil.rmtree(self.path, ignore_errors=True)


def claim(folder: Path, text: str) -> bool:
    """Write `told` into `folder`, if nobody has: exactly one caller gets True, on whatever host."""
    try:
        descriptor = os.open(folder / TOLD, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
    except FileExistsError:
        return False
    except OSError:
        return True  # the folder is gone or cannot be written: told twice is better than not at all
    with suppress(OSError):  # a full disk
        os.write(descriptor, text.encode(errors="replace"))
    os.close(descriptor)
    return True


def host_file(shared: Path, lowest_rank: int) -> Path:
    """The file in the attempt's folder that shows one host's ranks to the other hosts.

    Args:
        lowest_rank: of that host.
    """
    return shared / f"host-{lowest_rank:04d}.json"


def host_files(shared: Path) -> list[Path]:
    """The files of all hosts that have shown themselves so far."""
    return sorted(shared.glob("host-*.json"))


def open_launch_directory(address: LaunchEnvironment, base: Path | None = None) -> LaunchDirectory:
    """Make or find the folder of this launch. An earlier one may have left something there: see `take_place`.

    Args:
        base: instead of the folder for temporary files.

    Raises:
        ConfigError: it cannot be written, or belongs to somebody else.
    """
    starter = _starter(address)
    namespace = Path("/proc/self/ns/pid").stat().st_ino
    try:
        users = (base or Path(tempfile.gettempdir())) / f"seqaware-{os.getuid()}"
        users.mkdir(mode=0o700, exist_ok=True)
        if users.is_symlink() or users.stat().st_uid != os.getuid():
            raise PermissionError(f"{users} belongs to somebody else")
        _sweep(users, prefix=f"{host_name()}-{namespace}-")
        name = f"{host_name()}-{namespace}-{starter.pid}-{starter.started}-{address.master_port}"
        (users / name).mkdir(exist_ok=True)
    except OSError as error:
        raise unusable(error) from error
    return LaunchDirectory(users / name)


def unusable(error: OSError) -> ConfigError:
    """What is told where ranks cannot meet in the folder for temporary files."""
    do = "point TMPDIR at a folder of this host that you may write"
    return ConfigError("the folder for temporary files cannot be used", got=error, do=do)


def _lock(descriptor: int) -> None:
    """Be alone until the file is closed, where the file system has locks."""
    until = time.monotonic() + _LONGEST_WAIT
    while time.monotonic() < until:
        try:
            return fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            time.sleep(0.01)
        except OSError:
            return


def _starter(address: LaunchEnvironment) -> HostProcess:
    if address.size == 1:
        return HostProcess.of_myself()  # it has no siblings, and a person may start several from one shell
    # srun's tasks on a host are one process group; between slurmstepd and each may stand a script, or a container.
    return above_own_group() if address.launcher == "srun" else HostProcess.of(os.getppid())


def _sweep(users: Path, prefix: str) -> None:
    """Remove the folders of launches of this host that are long over."""
    for folder in users.glob(f"{prefix}*"):
        pid, started, *_ = folder.name.removeprefix(prefix).split("-")
        over = HostProcess(int(pid), int(started)).life() is Life.GONE
        with suppress(OSError):
            if over and time.time() - folder.stat().st_mtime > _SECONDS_KEPT:
                shutil.rmtree(folder, ignore_errors=True)
