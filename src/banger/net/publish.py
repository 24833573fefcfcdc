"""Published ports: TCP ports of the host that lead into a guest.

They go through a second NIC on QEMU's user network in its restricted mode, which carries these connections alone and
lets the guest open none. passt could forward ports itself, but the version in Debian 12 acknowledges the guest's
SYN,ACK only once the client has sent data, so every protocol in which the server speaks first would hang.
"""

from __future__ import annotations

import contextlib
import errno
import socket
from collections.abc import Sequence

from banger.api.errors import BangerError, Code
from banger.api.models import PublishedPort

NETWORK, GUEST_ADDRESS, PREFIX = "10.0.3.0/24", "10.0.3.15", 24


def parse_publish(text: str) -> PublishedPort:
    """[ADDR:]HOST:GUEST, the address an IPv4 one and loopback unless given; BangerError(INVALID) otherwise."""
    parts = text.split(":")
    address = parts[0] if len(parts) == 3 else "127.0.0.1"
    numbers = parts[-2:]
    with contextlib.suppress(OSError, ValueError):
        socket.inet_pton(socket.AF_INET, address)
        host, guest = (int(number) for number in numbers if number.isascii() and number.isdigit())
        if 1 <= host <= 65535 and 1 <= guest <= 65535 and len(parts) in (2, 3):
            return PublishedPort(address, host, guest)
    raise BangerError(
        Code.INVALID,
        f"{text!r} is not a port to publish",
        hint="write [ADDRESS:]HOST_PORT:GUEST_PORT, such as 8080:80 or 0.0.0.0:8080:80",
    )


def check_ports_free(ports: Sequence[PublishedPort]) -> None:
    """Raise BangerError(EXHAUSTED) naming the first published port that somebody else listens on."""
    for port in ports:
        with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((port.address, port.host_port))
            except OSError as error:
                why = "is in use" if error.errno == errno.EADDRINUSE else f"cannot be used: {error.strerror}"
                raise BangerError(
                    Code.EXHAUSTED,
                    f"port {port.host_port} on {port.address} {why}",
                    hint=f"publish another one, such as -p {port.host_port % 50000 + 10000}:{port.guest_port}",
                ) from error
