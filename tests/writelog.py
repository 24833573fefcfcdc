"""The log of a disk's writes that QEMU's `blklogwrites` keeps: read, and replayed into a copy of the disk.

The format is that of the kernel's dm-log-writes (Documentation/admin-guide/device-mapper/log-writes.rst and
drivers/md/dm-log-writes.c): a sector with the superblock, then for each request a sector that describes it, and its
data. All numbers are little-endian.
"""

from __future__ import annotations

import ctypes
import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

MAGIC, VERSION = 0x6A736677736872, 1
FLUSH, FUA, DISCARD = 1, 2, 4
_SUPERBLOCK = struct.Struct("<QQQI")  # magic, version, number of entries, size of a sector
_ENTRY = struct.Struct("<QQQQ")  # sector, number of sectors, flags, length of the data of a mark
_PUNCH_HOLE = 0x03  # <linux/falloc.h>, with KEEP_SIZE


@dataclass(frozen=True)
class Request:
    """One request of the guest, in bytes; its data lie at `place` of the log, -1 when it has none."""

    offset: int
    length: int
    flags: int
    place: int

    @property
    def flushes(self) -> bool:
        """All requests that ended before this one are on the disk once it has ended."""
        return bool(self.flags & FLUSH)


def read_log(path: Path) -> list[Request]:
    """All requests of a log, in their order. Raises ValueError for what is no log."""
    with open(path, "rb") as log:
        head = log.read(_SUPERBLOCK.size)
        if len(head) < _SUPERBLOCK.size:
            raise ValueError(f"{path} is too short for a log of writes")
        magic, version, entries, sector = _SUPERBLOCK.unpack(head)
        if (magic, version) != (MAGIC, VERSION) or sector < 512:
            raise ValueError(f"{path} is no log of writes: {magic:x}, version {version}, sectors of {sector} bytes")
        return list(_entries(log.fileno(), entries, sector))


def _entries(log: int, count: int, sector: int) -> Iterator[Request]:
    place = sector
    for _ in range(count):
        head = os.pread(log, _ENTRY.size, place)
        if len(head) < _ENTRY.size:
            raise ValueError(f"the log of writes ends at {place}, before the entries that it tells of")
        start, sectors, flags, marked = _ENTRY.unpack(head)
        place += sector
        has_data = sectors > 0 and not flags & DISCARD
        yield Request(start * sector, sectors * sector, flags, place if has_data else -1)
        place += (sectors * sector if has_data else 0) + marked


def data(log: int, request: Request) -> bytes:
    """What a request writes."""
    return b"" if request.place < 0 else os.pread(log, request.length, request.place)


def replay(log: int, requests: list[Request], disk: Path) -> None:
    """Do requests again on a disk."""
    with open(disk, "r+b") as file:
        for request in requests:
            if request.place >= 0:
                written = os.pwrite(file.fileno(), data(log, request), request.offset)
                assert written == request.length
            elif request.flags & DISCARD:
                _punch(file.fileno(), request.offset, request.length)


def _punch(file: int, offset: int, length: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.fallocate64(file, _PUNCH_HOLE, ctypes.c_int64(offset), ctypes.c_int64(length)) != 0:
        raise OSError(ctypes.get_errno(), "cannot punch a hole")
