"""Rendezvous: rank 0 listens, the others connect to it, and each waits for all, with a deadline and a reason.

torch's own rendezvous listens on all interfaces, and waits without a word for as long as a collective may take. Here
rank 0 listens on MASTER_ADDR alone where that is possible, a rank that waits says for whom within ten seconds, and the
wait ends after `faults.connect_minutes` with the cause.

torchrun keeps one store for all its attempts. A rank of the second attempt that is quicker than the others finds there
what theirs of the first attempt have left, and waits for ranks that are dead. Nothing in the environment tells attempts
apart: TORCHELASTIC_RESTART_COUNT counts the failures of one host. So each rank asks in that store, under a key that
nobody has used before, where rank 0 of its own attempt listens, and only a living rank 0 answers.
"""

from __future__ import annotations

import errno
import ipaddress
import os
import secrets
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import Future, wait
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from types import TracebackType
from typing import Any, NoReturn, Protocol, Self, TypeVar

from seqaware.distributed.launch_environment import LaunchEnvironment
from seqaware.errors import ConfigError
from seqaware.masking import escaped_lines

# Between looks: short at first, as ranks of a host start together, then long, as thousands may ask one store.
_SHORTEST_PAUSE, _LONGEST_PAUSE = 0.02, 0.5
# Of one attempt to connect; packets to a host that is down vanish.
_CONNECT_SECONDS = 5.0
# The others wait a little longer than rank 0, which knows the ranks that are missing.
_AFTER_RANK_0 = 5.0
_MOST_RANKS_NAMED = 16
_BACKLOG = 4096
_ALL_HERE = "seqaware/all ranks are here"


T = TypeVar("T")
S = TypeVar("S")


class Store(Protocol):
    """The methods of torch's stores that are used here."""

    def set(self, key: str, value: str, /) -> object: ...

    def get(self, key: str, /) -> bytes: ...

    def check(self, keys: list[str], /) -> bool: ...

    def add(self, key: str, amount: int, /) -> int: ...


def _print(text: str) -> None:
    print(escaped_lines(text), file=sys.stderr, flush=True)


@dataclass(frozen=True)
class Patience:
    """How long ranks wait for each other, and how they report it.

    Attributes:
        minutes: `faults.connect_minutes`. tell: shows a line; only the first rank of each host calls it.
        first_seconds, every_seconds: of waiting, before the first line and between the others.
    """

    minutes: float = 5.0
    tell: Callable[[str], None] = _print
    first_seconds: float = 8.0
    every_seconds: float = 60.0

    @property
    def limit(self) -> timedelta:
        return timedelta(minutes=self.minutes)


class Waiting:
    """What this rank is waiting for: reported by a thread of its own, since the main thread may be inside a library.

    Attributes:
        cause: why the wait is not over yet.
    """

    def __init__(self, address: LaunchEnvironment, patience: Patience) -> None:
        self.address = address
        self.patience = patience
        self.cause = f"no answer yet about the address {address.master_address}"
        self._begun = time.monotonic()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._report, name="connecting", daemon=True)

    def __enter__(self) -> Self:
        if self.reports():
            self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._done.set()

    def reports(self) -> bool:
        """Whether this rank says what it waits for: the first of its host does, as the others wait for the same."""
        return self.address.local_rank == 0

    def until(self, look: Callable[[], T | None], what: str, *, do: str, extra: float = 0.0) -> T:
        """Look again and again, for as long as the patience and `extra` seconds last; returns what was found.

        Args:
            look: returns None for nothing yet, and sets `cause`. what, do: of the error at the end.

        Raises:
            ConfigError: the time is up.
        """
        pause = _SHORTEST_PAUSE
        while True:
            found = look()
            if found is not None:
                return found
            if self._seconds() > self.patience.minutes * 60.0 + extra:
                got = f"{self.cause}, after {self._seconds():.0f} s"
                raise ConfigError(what, got=got, do=f"{do}; raise faults.connect_minutes if ranks start further apart")
            time.sleep(pause)
            pause = min(2.0 * pause, _LONGEST_PAUSE)

    def _seconds(self) -> float:
        return time.monotonic() - self._begun

    def _report(self) -> None:
        due = self.patience.first_seconds
        who = f"rank {self.address.rank} on {socket.gethostname()}"
        while not self._done.wait(due):
            self.patience.tell(f"connecting  {who} has waited {self._seconds():.0f} s: {self.cause}")
            due = self.patience.every_seconds


def listen(address: LaunchEnvironment, port: int, waiting: Waiting) -> socket.socket:
    """The socket on which rank 0 listens: at the master address, if it is one at which the other ranks can reach it.

    On all interfaces where the address is none of this host's (NAT, a service of Kubernetes), or where ranks of other
    hosts cannot reach what the name stands for here: Debian's /etc/hosts gives a host's own name 127.0.1.1.

    Raises:
        ConfigError: the port is in use, or the master address cannot be resolved for as long as the patience lasts.
    """
    host = address.master_address
    for family, place in _resolve(host, port, waiting):
        if address.nodes > 1 and ipaddress.ip_address(place[0].partition("%")[0]).is_loopback:
            continue
        try:
            return socket.create_server(place, family=family, backlog=_BACKLOG)
        except OSError as error:
            if error.errno not in (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT):
                _cannot_listen(address, port, error)
    try:
        if socket.has_dualstack_ipv6():
            return socket.create_server(("", port), family=socket.AF_INET6, backlog=_BACKLOG, dualstack_ipv6=True)
        return socket.create_server(("", port), backlog=_BACKLOG)
    except OSError as error:
        _cannot_listen(address, port, error)


def _resolve(host: str, port: int, waiting: Waiting) -> list[tuple[int, Any]]:
    """Families and addresses of a name, IPv4 first: gloo and NCCL use it where there is a choice."""

    def look() -> list[tuple[int, Any]] | None:
        try:
            found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        except (OSError, UnicodeError) as error:  # UnicodeError: what cannot be a name
            waiting.cause = f"{host}: {_reason(error)}"
            return None
        return [(family, place) for family, _, _, _, place in found]

    places = waiting.until(look, "the master address cannot be resolved", do="check MASTER_ADDR")
    return sorted(places, key=lambda each: each[0] != socket.AF_INET)


def _cannot_listen(address: LaunchEnvironment, port: int, error: OSError) -> NoReturn:
    in_use = error.errno == errno.EADDRINUSE
    another = "choose another port: MASTER_PORT, deepspeed --master_port or torchrun --master-port"
    raise ConfigError(
        f"port {port} is in use" if in_use else f"rank 0 cannot listen on port {port}",
        got=f"{os.strerror(error.errno or 0)} at {address.master_address}:{port} on host {socket.gethostname()}",
        do=f"{another}, or end the process that listens there" if in_use else another,
    ) from error


def reach(address: LaunchEnvironment, join: Callable[[str, int], S], waiting: Waiting) -> S:
    """The store of rank 0, once rank 0 listens.

    Args:
        join: connects to the store at a numeric address and a port; raises a RuntimeError where there is none.

    Raises:
        ConfigError: rank 0 could not be reached for as long as the patience lasts.
    """
    host, port = address.master_address, address.master_port
    attempt: Future[S] | None = None

    def look() -> S | None:
        nonlocal attempt
        try:
            if attempt is None:
                with socket.create_connection((host, port), timeout=_CONNECT_SECONDS) as trial:
                    numeric = str(trial.getpeername()[0])
                waiting.cause = f"rank 0 at {host}:{port}: what listens there does not answer as torch's store does"
                attempt = _in_a_thread(partial(join, numeric, port))
            if wait([attempt], timeout=_LONGEST_PAUSE).done:
                return attempt.result()
        except RuntimeError:  # of torch
            attempt = None
        except (OSError, UnicodeError) as error:
            waiting.cause = f"rank 0 at {host}:{port}: {_reason(error)}"
        return None

    do = "check MASTER_ADDR, MASTER_PORT and the network between the hosts, and whether rank 0 has started"
    return waiting.until(look, "rank 0 cannot be reached", do=do)


def _in_a_thread(join: Callable[[], S]) -> Future[S]:
    """Join in a thread that nobody waits for at exit.

    torch 2.13 waits for the answer of whatever listens at the port without a timeout (TCPStore::ping).
    """
    joined: Future[S] = Future()

    def work() -> None:
        try:
            joined.set_result(join())
        except RuntimeError as error:
            joined.set_exception(error)

    threading.Thread(target=work, name="joining", daemon=True).start()
    return joined


def _reason(error: OSError | UnicodeError) -> str:
    return (error.strerror if isinstance(error, OSError) else None) or str(error) or type(error).__name__


def wait_for_all(store: Store, waiting: Waiting) -> None:
    """Wait until every rank has reached the store. Collective.

    Raises:
        ConfigError: ranks are missing when the patience ends, or two processes have the same rank.
    """
    address = waiting.address
    if store.add(_is_here(address.rank), 1) > 1:
        raise ConfigError(
            f"two processes are rank {address.rank}",
            got=f"RANK={address.rank} on {socket.gethostname()}",
            do="give each process another RANK, and each run on a host another MASTER_PORT",
        )
    place = f"{address.master_address}:{address.master_port}"
    missing = list(range(1, address.size))

    def look() -> bool | None:
        nonlocal missing
        if address.rank > 0:
            waiting.cause = f"not all {address.size} ranks have connected to {place}"
            return store.check([_ALL_HERE]) or None
        missing = [rank for rank in missing if not store.check([_is_here(rank)])]
        waiting.cause = f"no connection to {place} from {listed(missing)} of {address.size}"
        return None if missing else True

    extra = _AFTER_RANK_0 if address.rank > 0 else 0.0
    waiting.until(look, "ranks are missing", do="see their logs, and whether their hosts reach it", extra=extra)
    if address.rank == 0:
        store.set(_ALL_HERE, "")


def _is_here(rank: int) -> str:
    return f"seqaware/rank {rank} is here"


def listed(ranks: Iterable[int]) -> str:
    """Ranks as a person writes them: `rank 3`, `ranks 1, 4-7`; a long list is cut."""
    runs: list[list[int]] = []
    for rank in sorted(ranks):
        if runs and rank == runs[-1][-1] + 1:
            runs[-1].append(rank)
        else:
            runs.append([rank])
    words = [str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs]
    rest = len(words) - _MOST_RANKS_NAMED
    words = [*words[:_MOST_RANKS_NAMED], *([f"and {rest} more"] if rest > 0 else [])]
    return f"rank{'s' * (sum(map(len, runs)) != 1)} {', '.join(words)}"


def agree_on_port(store: Store, port: int, waiting: Waiting) -> int:
    """Rank 0's `port`, on all ranks of this attempt, whatever earlier ones have left in the store. Collective.

    Raises:
        ConfigError: not all ranks are there when the patience ends.
    """
    rank, mine = waiting.address.rank, secrets.token_hex(8)
    if rank == 0:
        _answer_all(store, f"{port} {mine}", waiting)
        return port
    store.set(_asks(rank), mine)
    waiting.cause = "no answer from rank 0 in torchrun's store"

    def look() -> str | None:
        return store.get(_answers(mine)).decode() if store.check([_answers(mine)]) else None

    answer = waiting.until(look, "rank 0 is missing", do="see the log of its host", extra=_AFTER_RANK_0)
    store.set(_heard(rank, answer), "")
    return int(answer.split()[0])


def _answer_all(store: Store, answer: str, waiting: Waiting) -> None:
    missing = list(range(1, waiting.address.size))

    def look() -> bool | None:
        nonlocal missing
        for rank in missing:
            # It may be the question of a dead rank: it is asked again until a living one has heard.
            if store.check([_asks(rank)]):
                store.set(_answers(store.get(_asks(rank)).decode()), answer)
        missing = [rank for rank in missing if not store.check([_heard(rank, answer)])]
        waiting.cause = f"no question in torchrun's store from {listed(missing)} of {waiting.address.size}"
        return None if missing else True

    waiting.until(look, "ranks are missing", do="see the logs of their hosts")


def _asks(rank: int) -> str:
    return f"seqaware/rank {rank} asks"


def _answers(word: str) -> str:
    return f"seqaware/answer to {word}"


def _heard(rank: int, answer: str) -> str:
    return f"seqaware/rank {rank} heard {answer}"
