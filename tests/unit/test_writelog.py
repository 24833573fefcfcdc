"""The reader of write logs that the durability test relies on."""

import struct
from pathlib import Path

import pytest

from tests import writelog

SECTOR = 512


def entry(sector: int, sectors: int, flags: int, data: bytes = b"") -> bytes:
    return struct.pack("<QQQQ", sector, sectors, flags, 0).ljust(SECTOR, b"\0") + data


def log_of(path: Path, *entries: bytes) -> Path:
    head = struct.pack("<QQQI", writelog.MAGIC, writelog.VERSION, len(entries), SECTOR).ljust(SECTOR, b"\0")
    path.write_bytes(head + b"".join(entries))
    return path


def test_requests_are_read_and_replayed(tmp_path: Path) -> None:
    log = log_of(
        tmp_path / "log",
        entry(1, 2, 0, b"a" * 1024),
        entry(0, 0, writelog.FLUSH),
        entry(2, 1, writelog.DISCARD),
        entry(3, 1, writelog.FUA, b"b" * 512),
    )
    requests = writelog.read_log(log)
    assert [(request.offset, request.length, request.flushes) for request in requests] == [
        (512, 1024, False), (0, 0, True), (1024, 512, False), (1536, 512, False),
    ]  # fmt: skip
    disk = tmp_path / "disk"
    disk.write_bytes(bytes(4096))
    with open(log, "rb") as file:
        writelog.replay(file.fileno(), requests[:2], disk)
        assert disk.read_bytes() == bytes(512) + b"a" * 1024 + bytes(2560)
        writelog.replay(file.fileno(), requests[2:], disk)
    assert disk.read_bytes() == bytes(512) + b"a" * 512 + bytes(512) + b"b" * 512 + bytes(2048)


def test_what_is_no_log_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "log"
    path.write_bytes(b"short")
    with pytest.raises(ValueError, match="too short"):
        writelog.read_log(path)
    path.write_bytes(bytes(4096))
    with pytest.raises(ValueError, match="no log of writes"):
        writelog.read_log(path)
    path.write_bytes(log_of(path, entry(0, 1, 0, bytes(SECTOR))).read_bytes()[:520])
    with pytest.raises(ValueError, match="ends at 512"):
        writelog.read_log(path)
