"""Ranks that wait for each other over real sockets: where rank 0 listens, what is reported, and how the wait ends."""

from __future__ import annotations

import errno
import os
import socket
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest
import torch.distributed as dist

from seqaware.distributed.launch_environment import LaunchEnvironment
from seqaware.distributed.process_group import _find_all, _name_interface
from seqaware.distributed.rendezvous import Patience, Waiting, agree_on_port, listed, listen, reach, wait_for_all
from seqaware.errors import ConfigError
from tests.launch import free_port
from tests.patience import LAUNCH_SECONDS

SIZE = 4
# Until the machine has hung. No test waits so long for anything that happens.
LONG = Patience(minutes=2.0, first_seconds=1000.0)
NO_TIME = Patience(minutes=0.0, first_seconds=1000.0)
# A documentation address (RFC 5737), which no host has.
NOBODYS = "192.0.2.1"


def _address(
    rank: int = 0, *, size: int = 2, nodes: int = 1, host: str = "127.0.0.1", port: int = 0
) -> LaunchEnvironment:
    return LaunchEnvironment(rank, size, rank, size, nodes, "variables", host, port)


def _waiting(rank: int = 0, patience: Patience = LONG, **settings: object) -> Waiting:
    return Waiting(_address(rank, **settings), patience)  # type: ignore[arg-type]


def _join(host: str, port: int) -> dist.Store:
    return dist.TCPStore(host, port, is_master=False, timeout=timedelta(seconds=LAUNCH_SECONDS))


@pytest.fixture
def store() -> Iterator[dist.TCPStore]:
    with listen(_address(), 0, _waiting()) as listener:
        port = listener.getsockname()[1]
        fd = listener.detach()
        yield dist.TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False, master_listen_fd=fd)


def test_rank_0_listens_at_the_master_address_alone() -> None:
    with listen(_address(), 0, _waiting()) as listener:
        host, port = listener.getsockname()
        assert host == "127.0.0.1"
        socket.create_connection(("127.0.0.1", port)).close()
        with pytest.raises(ConnectionRefusedError):  # another address of this host
            socket.create_connection(("127.0.0.2", port))


@pytest.mark.parametrize(
    ("host", "nodes"),
    [
        ("127.0.1.1", 2),  # what Debian's /etc/hosts makes of a host's own name; the other host cannot reach it
        (NOBODYS, 2),  # an address that is translated, or of a service before this host
        (NOBODYS, 1),
    ],
)
def test_rank_0_listens_everywhere_where_others_could_not_reach_it(host: str, nodes: int) -> None:
    with listen(_address(nodes=nodes, host=host), 0, _waiting()) as listener:
        socket.create_connection(("127.0.0.2", listener.getsockname()[1])).close()


def test_a_port_in_use_is_named_with_the_options_that_change_it() -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        with pytest.raises(ConfigError, match=f"port {port} is in use") as error:
            listen(_address(), port, _waiting())
        assert "--master_port" in str(error.value) and "MASTER_PORT" in str(error.value)


def test_a_port_of_the_system_is_no_port_in_use(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> socket.socket:
        raise OSError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(socket, "create_server", refuse)
    with pytest.raises(ConfigError, match="cannot listen on port 80; got Permission denied"):
        listen(_address(), 80, _waiting())


@pytest.mark.parametrize("host", ["no-such-host.invalid", "a" * 70 + ".example"])
def test_a_master_address_that_is_no_name_ends_the_wait_by_name(host: str) -> None:
    with pytest.raises(ConfigError, match=f"{host}: .*MASTER_ADDR.*faults.connect_minutes"):
        listen(_address(host=host), 0, _waiting(patience=NO_TIME))
    with pytest.raises(ConfigError, match=f"rank 0 at {host}:29501: .*MASTER_ADDR.*faults.connect_minutes"):
        reach(_address(1, host=host, port=29501), _join, _waiting(1, NO_TIME))


def test_a_port_where_nobody_listens_ends_the_wait_with_the_reason() -> None:
    port = free_port()
    with pytest.raises(ConfigError, match=f"127.0.0.1:{port}: Connection refused, after 0 s"):
        reach(_address(1, port=port), _join, _waiting(1, NO_TIME))


def test_a_port_where_something_else_listens_ends_the_wait_with_the_reason() -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        address = _address(1, port=other.getsockname()[1])
        answered = threading.Event()
        with pytest.raises(ConfigError, match="what listens there does not answer as torch's store does"):
            reach(address, lambda host, port: answered.wait() or None, _waiting(1, NO_TIME))
        answered.set()


def test_a_rank_that_waits_reports_the_address_and_the_cause_and_goes_on_once_rank_0_is_there() -> None:
    told: list[str] = []
    heard = threading.Event()

    def tell(text: str) -> None:
        told.append(text)
        heard.set()

    port = free_port()
    address = LaunchEnvironment(1, 2, 0, 1, 2, "variables", "127.0.0.1", port)  # the first rank of its host
    with ThreadPoolExecutor(1) as pool, Waiting(address, Patience(2.0, tell, first_seconds=0.05)) as waiting:
        joined = pool.submit(reach, address, lambda host, port: (host, port), waiting)
        assert heard.wait(60)
        with socket.create_server(("127.0.0.1", port)):
            assert joined.result(60) == ("127.0.0.1", port)
    assert f"rank 0 at 127.0.0.1:{port}: Connection refused" in told[0]
    assert f"rank 1 on {socket.gethostname()} has waited" in told[0]


def test_only_the_first_rank_of_a_host_reports() -> None:
    told: list[str] = []
    with _waiting(1, Patience(0.0, told.append, first_seconds=0.0)) as waiting:
        waiting.cause = "nothing"
        assert not waiting.reports()
    with _waiting(0, Patience(0.0, told.append, first_seconds=1000.0)) as waiting:
        assert waiting.reports()
    assert told == []


def test_all_ranks_wait_for_the_last(store: dist.TCPStore) -> None:
    with ThreadPoolExecutor(SIZE) as pool:
        waits = [_waiting(rank, size=SIZE) for rank in range(SIZE)]
        done = [pool.submit(wait_for_all, _join("127.0.0.1", store.port), each) for each in waits[:-1]]
        threading.Event().wait(0.1)
        assert not any(each.done() for each in done)
        wait_for_all(_join("127.0.0.1", store.port), waits[-1])
        assert [each.result(60) for each in done] == [None] * (SIZE - 1)


def test_missing_ranks_are_named(store: dist.TCPStore) -> None:
    store.add("seqaware/rank 2 is here", 1)
    with pytest.raises(ConfigError, match=r"ranks are missing; got no connection to .* from ranks 1, 3-4 of 5"):
        wait_for_all(store, _waiting(0, NO_TIME, size=5))


def test_two_processes_of_one_rank_are_refused(store: dist.TCPStore) -> None:
    store.add("seqaware/rank 1 is here", 1)
    with pytest.raises(ConfigError, match="two processes are rank 1"):
        wait_for_all(store, _waiting(1))


@pytest.mark.parametrize(
    ("ranks", "words"),
    [
        ([3], "rank 3"),
        ([5, 4, 1, 7, 6], "ranks 1, 4-7"),
        (range(0, 80, 2), "ranks 0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30, and 24 more"),
    ],
)
def test_a_list_of_ranks(ranks: list[int], words: str) -> None:
    assert listed(ranks) == words


def test_the_ranks_of_a_host_meet_at_the_master_address_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """The way that `connect` takes, but for the group."""
    monkeypatch.delenv("TORCHELASTIC_USE_AGENT_STORE", raising=False)
    port = free_port()
    with ThreadPoolExecutor(2) as pool:
        stores = list(pool.map(lambda rank: _find_all(_waiting(rank, port=port)), range(2)))
    stores[1].set("from rank", "1")
    assert stores[0].get("from rank") == b"1"
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.2", port))


@pytest.mark.parametrize(("nodes", "given", "taken"), [(1, None, "lo"), (1, "eth7", "eth7"), (2, "eth7", "eth7")])
def test_gloo_listens_on_the_loopback_among_the_ranks_of_one_host(
    monkeypatch: pytest.MonkeyPatch, nodes: int, given: str | None, taken: str
) -> None:
    # Set first, so that what is set in the test is undone.
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", given or "")
    if given is None:
        del os.environ["GLOO_SOCKET_IFNAME"]
    _name_interface(_address(nodes=nodes))
    assert os.environ["GLOO_SOCKET_IFNAME"] == taken


def test_one_rank_listens_nowhere() -> None:
    store = _find_all(_waiting(size=1, host="no-such-host.invalid", port=29500))
    assert isinstance(store, dist.HashStore)


class SharedStore:
    """torch's store, in one process."""

    def __init__(self) -> None:
        self._values: dict[str, bytes] = {}
        self._changed = threading.Condition()

    def set(self, key: str, value: str) -> None:
        with self._changed:
            self._values[key] = value.encode()
            self._changed.notify_all()

    def get(self, key: str) -> bytes:
        with self._changed:
            assert self._changed.wait_for(lambda: key in self._values, timeout=LAUNCH_SECONDS)
            return self._values[key]

    def check(self, keys: list[str]) -> bool:
        with self._changed:
            return all(key in self._values for key in keys)

    def add(self, key: str, amount: int) -> int:
        with self._changed:
            self._values[key] = str(int(self._values.get(key, b"0")) + amount).encode()
            return int(self._values[key])


def _attempt(store: SharedStore, port: int, *, ranks: range) -> list[int]:
    """What the ranks agree on when they come in this order, each once the one before it has had its time to look."""
    with ThreadPoolExecutor(SIZE) as pool:
        agreed = []
        for rank in ranks:
            agreed.append(pool.submit(agree_on_port, store, port if rank == 0 else -1, _waiting(rank, size=SIZE)))
            threading.Event().wait(0.05)
        return [each.result(timeout=LAUNCH_SECONDS) for each in agreed]


def test_every_attempt_agrees_on_the_port_of_its_own_rank_0() -> None:
    store = SharedStore()
    assert _attempt(store, 4001, ranks=range(SIZE)) == [4001] * SIZE
    # Rank 0 comes last, and every other rank could have taken the earlier answer for its own; then first again.
    assert _attempt(store, 4002, ranks=range(SIZE - 1, -1, -1)) == [4002] * SIZE
    assert _attempt(store, 4003, ranks=range(SIZE)) == [4003] * SIZE


def test_an_attempt_that_died_while_it_met_disturbs_nobody() -> None:
    """Rank 2 asked and was killed before rank 0 was there; rank 0 answers it in vain, and waits for the living one."""
    store = SharedStore()
    store.set("seqaware/rank 2 asks", "a word of the dead")
    assert _attempt(store, 4004, ranks=range(SIZE)) == [4004] * SIZE


def test_a_rank_that_torchrun_has_not_started_ends_the_wait_by_name() -> None:
    with pytest.raises(ConfigError, match=r"torchrun's store from ranks 1-3 of 4"):
        agree_on_port(SharedStore(), 4005, _waiting(0, NO_TIME, size=SIZE))
