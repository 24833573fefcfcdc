"""Published ports: TCP ports of the host that lead into a guest.

They go through a second NIC, which carries these connections alone and lets the guest open none: on QEMU's user network
in its restricted mode, or with a helper of ours behind it (tap_helper.py). passt could forward ports itself, but the
version in Debian 12 acknowledges the guest's SYN,ACK only once the client has sent data, so every protocol in which the
server speaks first would hang.
"""

from __future__ import annotations

import contextlib
import errno
import socket
from collections.abc import Callable, Container, Sequence

from banger.api.errors import BangerError, Code
from banger.api.models import PublishedPort
from banger.vmm.machine import Forward

LOOPBACK = "127.0.0.1"
NETWORK, GUEST_ADDRESS, PREFIX = "10.0.3.0/24", "10.0.3.15", 24


def parse_publish(text: str) -> PublishedPort:
    """[[ADDR:]HOST:]GUEST, the address an IPv4 one and loopback unless given; BangerError(INVALID) otherwise.

    The host's port is 0 when it is to be any free one.
    """
    parts = text.split(":")
    address = parts[0] if len(parts) == 3 else LOOPBACK
    numbers = parts[-2:]
    with contextlib.suppress(OSError, ValueError):
        socket.inet_pton(socket.AF_INET, address)
        *host, guest = (int(number) for number in numbers if number.isascii() and number.isdigit())
        if all(1 <= number <= 65535 for number in (*host, guest)) and len(host) == len(numbers) - 1 and len(parts) <= 3:
            return PublishedPort(address, host[0] if host else 0, guest)
    raise BangerError(
        Code.INVALID,
        f"{text!r} is not a port to publish",
        hint="write [[ADDRESS:]HOST_PORT:]GUEST_PORT, such as 8080:80, 0.0.0.0:8080:80 or 80",
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
