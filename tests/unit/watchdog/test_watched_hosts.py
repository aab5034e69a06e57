"""The watchdog across hosts: one rank of a host reads and writes the shared folder, whoever that is at the moment."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.worlds import counted, watchdog
from seqaware.distributed.launch_environment import LaunchEnvironment
from seqaware.watchdog.host_process import HostProcess
from seqaware.watchdog.launch_directory import claim, host_file, open_launch_directory
from seqaware.watchdog.monitor import Monitor
from seqaware.watchdog.own_rank import OwnRank
from seqaware.watchdog.peers import MUTE_SECONDS
from seqaware.watchdog.rank_card import read_cards

RANKS_OF_HOST = 3
_GONE = HostProcess(pid=2**22 + 1, started=1)


def _host(base: Path, shared: Path, *, first: int) -> list[Monitor]:
    """The monitors of a host's ranks first … first + 2 in a launch of two hosts, settled in the attempt's folder."""
    base.mkdir()
    owns = []
    for rank in range(first, first + RANKS_OF_HOST):
        address = LaunchEnvironment(
            rank, 2 * RANKS_OF_HOST, rank - first, RANKS_OF_HOST, 2, "test", "127.0.0.1", master_port=1
        )
        owns.append(OwnRank(address, open_launch_directory(address, base)))
    for own in owns:
        own.settle(shared)
    return [Monitor(own) for own in owns]


def _leaders(monitors: list[Monitor]) -> list[int]:
    for monitor in monitors:
        monitor._peers.look_around(1.0)
    return [monitor._own.address.rank for monitor in monitors if monitor.leads()]


def test_the_lowest_rank_that_answers_works_for_its_host(tmp_path: Path) -> None:
    monitors = _host(tmp_path / "h1", tmp_path / "shared", first=3)
    assert _leaders(monitors) == [3]
    own = monitors[0]._own
    replace(own.card, status="ended", code=0).write(own.folder.card(3))
    assert _leaders(monitors[1:]) == [4]
    replace(own.card, process=_GONE).write(own.folder.card(3))
    assert _leaders(monitors[1:]) == [4]


def test_a_rank_whose_monitor_does_not_move_does_not_work_for_its_host(tmp_path: Path) -> None:
    monitors = _host(tmp_path / "h0", tmp_path / "shared", first=0)
    assert _leaders(monitors) == [0]
    for _ in range(2):
        monitors[1]._own.dial.beat()
        monitors[1]._peers.look_around(MUTE_SECONDS)
        monitors[2]._peers.look_around(MUTE_SECONDS)
    assert [monitor.leads() for monitor in monitors[1:]] == [True, False]


def test_one_file_shows_all_ranks_of_a_host_and_where_they_are(tmp_path: Path) -> None:
    shared = tmp_path / "shared"
    here, there = _host(tmp_path / "h0", shared, first=0), _host(tmp_path / "h1", shared, first=3)
    there[2]._own.dial.turn_to("forward", 17)
    for monitor in there:
        monitor._look(60.0, woken=True)
    assert [path.name for path in shared.glob("*.json")] == ["host-0003.json"]
    cards = read_cards(host_file(shared, 3))
    assert [card.rank for card in cards] == [3, 4, 5] and cards[2].place.step == 17
    here[0]._peers.look_afar(1.0, shared=shared, own=here[0]._own.host_file)
    assert [(peer.card.rank, peer.here, peer.place.step) for peer in here[0]._peers.all()][-1] == (5, False, 17)


def test_a_failure_on_another_host_reaches_ranks_that_never_touch_the_shared_folder(tmp_path: Path) -> None:
    shared = tmp_path / "shared"
    monitors = _host(tmp_path / "h0", shared, first=0)
    _leaders(monitors)
    claim(shared, "rank 5 was killed")
    with counted(shared) as counts:
        for monitor in monitors[1:]:
            monitor._share(60.0)
    assert not counts and not monitors[1]._own.told()
    monitors[0]._share(60.0)
    assert all(monitor._own.told() for monitor in monitors)


@pytest.mark.parametrize("ranks", [64, 512])
def test_what_a_host_asks_of_the_shared_folder_does_not_grow_with_its_ranks(ranks: int) -> None:
    moving, stuck = watchdog(ranks, stuck=False), watchdog(ranks, stuck=True)
    # One look for the report of another host, one file written (opened and renamed); when nothing moves, a file a host.
    assert {name: moving.get(name, 0) for name in ("stats", "writes", "opens", "listings")} == {
        "stats": 1,
        "writes": 2,
        "opens": 0,
        "listings": 0,
    }
    assert (stuck["opens"], stuck["listings"], stuck["writes"]) == (ranks // 8 - 1, 1, 2)


def test_what_is_counted_is_what_is_done(tmp_path: Path) -> None:
    with counted(tmp_path) as counts:
        (tmp_path / "a").write_text("x")
        (tmp_path / "a").read_text()
        (tmp_path / "a").stat()
        (tmp_path / "a").replace(tmp_path / "b")
        sorted(tmp_path.iterdir())
        Path("/proc/self/stat").read_text()
    assert counts == {"writes": 2, "opens": 1, "stats": 1, "listings": 1}
