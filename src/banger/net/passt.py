"""User-mode networking: one passt process per VM (passt(1)), no privileges, no way to the host's own 127.0.0.1."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from banger.api.errors import BangerError, Code
from banger.api.models import PublishedPort
from banger.process import Watched, spawn
from banger.vmm.machine import Nic

GUEST_ADDRESS, PREFIX, GATEWAY, NAMESERVER = "10.0.2.15", 24, "10.0.2.2", "10.0.2.3"
_READY_SECONDS = 10.0


@dataclass(frozen=True)
class UserNetwork:
    """A running passt and the descriptor that the VMM's NIC is connected to (to be closed once it is handed over)."""

    process: Watched
    descriptor: int


def parse_publish(text: str) -> PublishedPort:
    """[ADDR:]HOST:GUEST, the address an IPv4 one and loopback unless given; BangerError(INVALID) otherwise."""
    parts = text.split(":")
    address = parts[0] if len(parts) == 3 else "127.0.0.1"
    numbers = parts[-2:]
    with contextlib.suppress(OSError, ValueError):
        socket.inet_aton(address)
        host, guest = (int(number) for number in numbers if number.isascii() and number.isdigit())
        if 1 <= host <= 65535 and 1 <= guest <= 65535 and len(parts) in (2, 3) and address.count(".") == 3:
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
                    hint=f"publish another one, such as -p {port.host_port + 10000}:{port.guest_port}",
                ) from error


async def start(nic: Nic, ports: Sequence[PublishedPort], log: Path, uid: int) -> UserNetwork:
    """Start passt for one NIC and wait until its published ports listen."""
    check_ports_free(ports)
    ours, theirs = socket.socketpair()
    ready, ready_writer = os.pipe()
    if uid >= 0:
        os.fchown(ready_writer, uid, uid)  # passt opens its pid file, this pipe, by name
    argv = [
        "passt",
        "--foreground",
        "--quiet",
        "--stderr",
        "--fd", str(theirs.fileno()),
        "--pid", f"/proc/self/fd/{ready_writer}",
        "--no-map-gw",
        "--address", GUEST_ADDRESS,
        "--netmask", str(PREFIX),
        "--gateway", GATEWAY,
        "--dns-forward", NAMESERVER,
    ]  # fmt: skip
    for port in ports:
        argv += ["--tcp-ports", f"{port.address}/{port.host_port}:{port.guest_port}"]
    try:
        with open(log, "wb") as messages:
            process = spawn(argv, [theirs.fileno(), ready_writer], messages.fileno(), uid)
        os.close(ready_writer)
        ready_writer = -1
        loop = asyncio.get_running_loop()
        started: asyncio.Future[bytes] = loop.create_future()
        loop.add_reader(ready, _set_once, started, ready)
        try:
            async with asyncio.timeout(_READY_SECONDS):
                if await started:
                    return UserNetwork(process, ours.detach())
        except TimeoutError:
            process.signal(9)
        finally:
            loop.remove_reader(ready)
        await process.ended.wait()
        messages_tail = [line for line in log.read_text(errors="replace").splitlines() if "syslog" not in line]
        raise BangerError(
            Code.UNSUPPORTED,
            f"passt did not start: {' / '.join(messages_tail[-2:]) or 'no message'}",
            hint="run the VM with --net none, or look at 'banger doctor'",
        )
    finally:
        ours.close()
        theirs.close()
        os.close(ready)
        if ready_writer >= 0:
            os.close(ready_writer)


def _set_once(started: asyncio.Future[bytes], descriptor: int) -> None:
    if not started.done():
        started.set_result(os.read(descriptor, 32))
