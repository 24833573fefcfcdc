"""Published ports: TCP ports of the host that lead into a guest.

They go through a second NIC, which carries these connections alone and lets the guest open none: on QEMU's user network
in its restricted mode, or with a helper of ours behind it (tap_helper.py). passt could forward ports itself, but the
version in Debian 12 acknowledges the guest's SYN,ACK only once the client has sent data, so every protocol in which the
server speaks first would hang.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import re
import socket
from collections.abc import Callable, Container, Sequence

from banger.api.errors import BangerError, Code
from banger.api.models import PublishedPort
from banger.vmm.machine import Forward

LOOPBACK = "127.0.0.1"
_PORTS = "[0-9]{1,5}(?:-[0-9]{1,5})?"
_ON_HOST = rf"(?:(?P<address>\[[^\[\]]*\]|[^:\[\]]*):)?(?P<host>{_PORTS}|):"
_PUBLISH = rf"(?:{_ON_HOST})?(?P<guest>{_PORTS})(?:/(?P<protocol>[A-Za-z]+))?"
NETWORK, GUEST_ADDRESS, PREFIX = "10.0.3.0/24", "10.0.3.15", 24


def parse_publish(text: str) -> list[PublishedPort]:
    """[[ADDR:]HOST:]GUEST[/tcp], HOST and GUEST a port or a range FIRST-LAST; BangerError(INVALID) otherwise.

    The address is an IPv4 one and loopback unless given. The host's port is 0 when it is to be any free one: without
    HOST, or where that is empty or 0.
    """
    match = re.fullmatch(_PUBLISH, text)
    if match is None:
        raise _no_port(f"{text!r} is not a port to publish")
    protocol = (match["protocol"] or "tcp").lower()
    if protocol != "tcp":
        raise _no_port(f"{text!r} cannot be published: TCP only, not {protocol!r}")
    guests, hosts = _range(text, match["guest"]), _range(text, match["host"] or "0")
    if 0 in guests or (0 in hosts and len(hosts) > 1):
        raise _no_port(f"0 in {text!r} is not a port: use 1 to 65535")
    if hosts == range(1):
        hosts = range(0)
    elif len(hosts) != len(guests):
        raise _no_port(f"{text!r} is not a port to publish: {len(hosts)} of the host for {len(guests)} of the guest")
    address = _address(text, match["address"] or LOOPBACK)
    return [PublishedPort(address, host, guest) for host, guest in itertools.zip_longest(hosts, guests, fillvalue=0)]


def _range(text: str, ports: str) -> range:
    first, last = (int(port) for port in (ports.split("-") * 2)[:2])
    if last > 65535:
        raise _no_port(f"{last} in {text!r} is not a port: use 1 to 65535")
    if first > last:
        raise _no_port(f"{ports} in {text!r} is not a range of ports: it ends before it begins")
    return range(first, last + 1)


def _address(text: str, address: str) -> str:
    bare = address.strip("[]")
    with contextlib.suppress(OSError):
        socket.inet_pton(socket.AF_INET, address)
        return address
    with contextlib.suppress(OSError):
        socket.inet_pton(socket.AF_INET6, bare)
        raise BangerError(
            Code.INVALID,
            f"{bare!r} in {text!r} is not an IPv4 address: ports cannot be published on IPv6 ones",
            hint="publish it on 127.0.0.1, or on 0.0.0.0 for all IPv4 addresses of the host",
        )
    raise _no_port(f"{address!r} in {text!r} is not an IPv4 address")


def _no_port(message: str) -> BangerError:
    return BangerError(
        Code.INVALID, message, hint="write [[ADDRESS:]HOST_PORT:]GUEST_PORT, such as 8080:80, 0.0.0.0:8080:80 or 80"
    )


def free_ports(count: int, taken: Container[int]) -> list[int]:
    """So many different TCP ports of loopback that nobody listens on and that are not in `taken`."""
    found: list[int] = []
    with contextlib.ExitStack() as held:
        while len(found) < count:
            probe = held.enter_context(socket.socket(socket.AF_INET, socket.SOCK_STREAM))
            probe.bind((LOOPBACK, 0))
            port: int = probe.getsockname()[1]
            if port not in taken:
                found.append(port)
    return found


class PortTaken(BangerError):
    """A port of the host cannot be published; `another` would lead to the guest's, too."""

    def __init__(self, port: PublishedPort, error: OSError) -> None:
        self.port = port
        self.another = f"{port.host_port % 50000 + 10000}:{port.guest_port}"
        why = "is in use" if error.errno == errno.EADDRINUSE else f"cannot be used: {error.strerror}"
        super().__init__(
            Code.EXHAUSTED,
            f"port {port.host_port} on {port.address} {why}",
            hint=f"publish another one, such as -p {self.another}",
        )


def check_ports_free(ports: Sequence[PublishedPort]) -> None:
    """Raise PortTaken naming the first published port that somebody else listens on."""
    for port in ports:
        with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((port.address, port.host_port))
            except OSError as error:
                raise PortTaken(port, error) from error


def reserve(forward: Forward) -> socket.socket:
    """A socket that keeps the host's side of a published port, at which connections are refused. Raises PortTaken.

    Who listens there with SO_REUSEADDR set, as QEMU does, can do so all the same.
    """
    return _bound(forward, lambda bound: None)


def listen(forward: Forward) -> socket.socket:
    """A socket that listens at the host's side of a published port. Raises PortTaken."""
    return _bound(forward, lambda bound: bound.listen(128))


def _bound(forward: Forward, begin: Callable[[socket.socket], None]) -> socket.socket:
    bound = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        bound.bind((forward.address, forward.host_port))
        begin(bound)
    except OSError as error:
        bound.close()
        raise PortTaken(PublishedPort(forward.address, forward.host_port, forward.guest_port), error) from error
    return bound
