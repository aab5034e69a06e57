"""Names and ports of this host."""

from __future__ import annotations

import errno
import ipaddress
import socket
from collections.abc import Iterator

from seqaware.doctor.findings import Finding, error, ok, warning

DEFAULT_PORT = 29500


def host_name(*, hosts: int) -> Iterator[Finding]:
    """Whether this host's own name leads to it, by an address that others can use.

    Args:
        hosts: of the run.
    """
    name = socket.gethostname()
    try:
        address = socket.gethostbyname(name)
    except OSError as trouble:
        do = "write it into /etc/hosts with its address in the network, or export GLOO_SOCKET_IFNAME"
        yield (error if hosts > 1 else warning)("host name", f"{name} leads nowhere: {trouble.strerror}", do)
        return
    if hosts > 1 and ipaddress.ip_address(address).is_loopback:
        found = f"{name} is {address} here, which other hosts cannot reach; gloo listens there"
        do = "export GLOO_SOCKET_IFNAME=<the network's interface>, or correct /etc/hosts"
        yield warning("host name", found, do)
    else:
        yield ok("host name", f"{name} is {address}")


def master_port(port: int, *, chosen: bool) -> Iterator[Finding]:
    """Whether rank 0 could listen there.

    Args:
        chosen: a person has written this port, so that nothing else will be tried.
    """
    try:
        with socket.socket() as probe:
            # As torch's store binds it: what a run that has just ended leaves does not count.
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(("", port))
            probe.listen()
    except OSError as trouble:
        reason = "in use" if trouble.errno == errno.EADDRINUSE else str(trouble.strerror)
        do = "choose another: MASTER_PORT, deepspeed --master_port, torchrun --master-port"
        yield (error if chosen else warning)("master port", f"{port} is {reason} on this host", do)
    else:
        yield ok("master port", f"{port} is free on this host")


def address_towards(host: str) -> str:
    """This host's address as `host` sees it: of the interface that the way there begins with.

    Raises:
        OSError: the name leads nowhere.
    """
    family, kind, protocol, _, place = socket.getaddrinfo(host, 9, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind, protocol) as probe:
        probe.connect(place)  # sends nothing: it is a datagram's socket
        return str(probe.getsockname()[0])


class Listener:
    """A port of this host that answers while the block runs, so that others can try to reach it."""

    def __init__(self, port: int) -> None:
        self._socket = socket.create_server(("", port), backlog=64)
        self.port = int(self._socket.getsockname()[1])

    @classmethod
    def on(cls, port: int) -> Listener:
        """On this port, or on any where it is in use: then its owner answers nobody's question."""
        try:
            return cls(port)
        except OSError:
            return cls(0)

    def __enter__(self) -> Listener:
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.close()
