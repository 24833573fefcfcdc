"""Which TCP ports of this host are in use by a connection right now: proc(5), /proc/net/tcp."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from pathlib import Path

# nobody is at the other end of these: waiting for clients, or left by one and not closed by the guest
_ALONE = ("0A", "08")  # LISTEN, CLOSE_WAIT


def connected_ports(tables: Iterable[Path] = (Path("/proc/net/tcp"), Path("/proc/net/tcp6"))) -> set[int]:
    """The local ports of all connections, those that were closed a moment ago included (TIME_WAIT)."""
    ports = set()
    for table in tables:
        with contextlib.suppress(OSError):
            for line in table.read_text().splitlines()[1:]:
                _, local, _, state = line.split(maxsplit=4)[:4]
                if state not in _ALONE:
                    ports.add(int(local.rpartition(":")[2], 16))
    return ports
