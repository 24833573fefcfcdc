"""Writes cpio archives in the newc format, which the kernel unpacks as initramfs."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO

_NAME_LIMIT = 4096  # PATH_MAX: init/initramfs.c skips longer names
_SIZE_LIMIT = 0xFFFFFFFF
_TRAILER = "TRAILER!!!"


class CpioWriter:
    """A deterministic archive: owner root, time 0, inodes numbered in order.

    Format: Documentation/driver-api/early-userspace/buffer-format.rst. Every member, and so the whole archive, is
    padded to 4 bytes: archives can be concatenated, and the kernel unpacks one after the other.
    """

    def __init__(self, output: IO[bytes]) -> None:
        self._output = output
        self._inode = 0

    def directory(self, name: str, mode: int = 0o755) -> None:
        """Add an empty directory; its parents must have been added before."""
        self._member(name, stat.S_IFDIR | mode)

    def file(self, name: str, data: bytes, mode: int = 0o644) -> None:
        """Add a regular file."""
        self._member(name, stat.S_IFREG | mode, data)

    def symlink(self, name: str, target: str) -> None:
        """Add a symbolic link."""
        self._member(name, stat.S_IFLNK | 0o777, target.encode())

    def character_device(self, name: str, major: int, minor: int, mode: int = 0o600) -> None:
        """Add a character device node; no privilege is needed to write one into an archive."""
        self._member(name, stat.S_IFCHR | mode, device=os.makedev(major, minor))

    def close(self) -> None:
        """Write the trailer."""
        self._inode = -1
        self._member(_TRAILER, 0)

    def _member(self, name: str, mode: int, data: bytes = b"", device: int = 0) -> None:
        raw = name.encode()
        if not raw or raw.startswith(b"/") or b"\0" in raw or ".." in name.split("/") or len(raw) >= _NAME_LIMIT:
            raise ValueError(f"not a name for an archive member: {name!r}")
        if len(data) > _SIZE_LIMIT:
            raise ValueError(f"{name!r} is too large for the newc format")
        self._inode += 1
        links = 2 if stat.S_ISDIR(mode) else 1
        numbers = (
            *(self._inode, mode, 0, 0, links, 0, len(data), 0, 0),
            *(os.major(device), os.minor(device), len(raw) + 1, 0),
        )
        header = b"070701" + b"".join(b"%08X" % number for number in numbers)
        self._output.write(_padded(header + raw + b"\0"))
        self._output.write(_padded(data))


@contextmanager
def cpio(output: IO[bytes]) -> Iterator[CpioWriter]:
    """A writer whose archive is complete when the block ends without an error."""
    writer = CpioWriter(output)
    yield writer
    writer.close()


def _padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % 4)
