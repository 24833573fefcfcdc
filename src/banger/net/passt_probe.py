"""Finds out whether a passt lets guests reach the host's own loopback addresses, by being such a guest for a moment.

Its version does not tell: some print none, some only to a terminal.
"""

from __future__ import annotations

import contextlib
import ipaddress
import os
import select
import socket
import struct
import subprocess
import time
from collections.abc import Iterator, Sequence

_SECONDS = 3.0  # of all of it; it takes some milliseconds
_NOBODY = 65534
_ADDRESSES = b"\x9a\x55\x9a\x55\x9a\x55" + b"\x52\x54\0\0\0\1"  # Ethernet's; passt looks at neither
_ETHERTYPES = {4: 0x0800, 6: 0x86DD}
_PROTOCOLS = {socket.SOCK_STREAM: socket.IPPROTO_TCP, socket.SOCK_DGRAM: socket.IPPROTO_UDP}
# Where nothing may arrive, and what a guest could send it to. The passt of Debian 13 drops packets for 127.0.0.1 and
# ::1, and unless it is told to use IPv4 only sends on those for ::ffff:127.0.0.1.
_LOOPBACK = ("127.0.0.1", "127.77.0.1", "::1")
_FORBIDDEN = ("127.0.0.1", "127.77.0.1", "0.0.0.0", "::1", "::", "::127.0.0.1", "::ffff:127.0.0.1", "::ffff:127.77.0.1")
_GUEST_6 = "fd00::15"


class Undecided(Exception):
    """What kept the trial from showing anything, half a sentence."""


def spares_the_host(argv: Sequence[str], guest: str, gateway: str) -> bool:
    """Whether no packet of a guest reaches a loopback address of the host through this passt. Blocks: milliseconds.

    `argv` starts it for a guest with the IPv4 address `guest`, and lets `gateway` stand for the host's 127.0.0.1: what
    is sent there must arrive, else nothing is proven and this raises Undecided.
    """
    with contextlib.ExitStack() as stack:
        closed = [listener for kind in _PROTOCOLS for listener in _listen_where_possible(stack, kind)]
        opened = [stack.enter_context(_listen(kind, "127.0.0.1")) for kind in _PROTOCOLS]
        end = stack.enter_context(_running(argv))
        ports = iter(range(20000, 60000))
        deadline = time.monotonic() + _SECONDS
        # What arrives at the gateway shows that passt has dealt with all that was sent before. The last round has
        # nothing forbidden: it gives connections of the one before it time to arrive.
        for address in (*_FORBIDDEN, ""):
            for listener in closed if address else []:
                end.sendall(_frame(guest, next(ports), address, listener))
            for listener in opened:
                end.sendall(_frame(guest, next(ports), gateway, listener))
                if not _arrives(listener, closed, end, deadline):
                    return False
        return True


def _listen_where_possible(stack: contextlib.ExitStack, kind: socket.SocketKind) -> Iterator[socket.socket]:
    for address in _LOOPBACK:
        with contextlib.suppress(OSError):  # a host without IPv6 has no ::1
            yield stack.enter_context(_listen(kind, address))


def _listen(kind: socket.SocketKind, address: str) -> socket.socket:
    listener = socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET, kind)
    try:
        listener.setblocking(False)
        listener.bind((address, 0))
        if kind == socket.SOCK_STREAM:
            listener.listen()
    except OSError:
        listener.close()
        raise
    return listener


@contextlib.contextmanager
def _running(argv: Sequence[str]) -> Iterator[socket.socket]:
    """The guest's end of a passt."""
    ours, theirs = socket.socketpair()
    root = os.geteuid() == 0
    with ours:
        with theirs:
            child = subprocess.Popen(
                [*argv, "--fd", str(theirs.fileno())],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
                user=_NOBODY if root else None,
                group=_NOBODY if root else None,
                extra_groups=[] if root else None,
            )
        try:
            ours.settimeout(_SECONDS)
            yield ours
        except OSError as error:
            raise Undecided(f"it takes no packets: {error}") from error
        finally:
            child.kill()
            child.wait()


def _arrives(listener: socket.socket, closed: list[socket.socket], end: socket.socket, deadline: float) -> bool:
    """Whether something comes to this listener before it does to one of the others. Raises Undecided if to none."""
    while True:
        ready, _, _ = select.select([*closed, listener, end], [], [], max(0.0, deadline - time.monotonic()))
        if not ready:
            raise Undecided("it does not carry packets to the host's network")
        if any(other in ready for other in closed):
            return False
        if listener in ready:
            break
        if not end.recv(1 << 16):
            raise Undecided("it has ended")
    if listener.type == socket.SOCK_STREAM:
        listener.accept()[0].close()
    else:
        listener.recv(1)
    return True


def _frame(guest: str, source: int, address: str, listener: socket.socket) -> bytes:
    """A TCP SYN or a datagram from the guest to that address and the listener's port: Ethernet, after its length."""
    target = ipaddress.ip_address(address)
    own = ipaddress.ip_address(guest if target.version == 4 else _GUEST_6)
    protocol, port = _PROTOCOLS[socket.SocketKind(listener.type)], listener.getsockname()[1]
    if protocol == socket.IPPROTO_TCP:
        head, tail = struct.pack("!HHIIBBH", source, port, 1, 0, 0x50, 0x02, 65535), bytes(2)  # RFC 9293: a SYN
    else:
        head, tail = struct.pack("!HHH", source, port, 9), b"x"  # RFC 768
    length = len(head) + 2 + len(tail)
    # RFC 9293 3.1 and RFC 8200 8.1: addresses, length and protocol count too
    summed = own.packed + target.packed + struct.pack("!IHH", length, 0, protocol) + head + bytes(2) + tail
    segment = head + _checksum(summed) + tail
    if target.version == 4:
        header = struct.pack("!BBHHHBBH", 0x45, 0, 20 + length, 1, 0, 64, protocol, 0) + own.packed + target.packed
        header = header[:10] + _checksum(header) + header[12:]
    else:
        header = struct.pack("!IHBB", 6 << 28, length, protocol, 64) + own.packed + target.packed
    frame = _ADDRESSES + struct.pack("!H", _ETHERTYPES[target.version]) + header + segment
    return struct.pack("!I", len(frame)) + frame


def _checksum(data: bytes) -> bytes:
    """RFC 1071."""
    data += bytes(len(data) % 2)
    total = sum(struct.unpack(f"!{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return struct.pack("!H", ~total & 0xFFFF)
