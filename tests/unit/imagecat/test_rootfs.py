"""Filesystems are told by their superblocks, and what is none, or a damaged one, is refused."""

from __future__ import annotations

import os
import struct
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from banger.api.errors import BangerError, Code
from banger.disk import EXT4, SQUASHFS
from banger.imagecat.rootfs import filesystem_type


def squashfs(size: int, version: int = 4) -> bytes:
    """A squashfs superblock: magic at 0, major version at 28, bytes used at 40."""
    return b"hsqs" + bytes(24) + struct.pack("<HHQQ", version, 0, 0, size) + bytes(48)


def ext4(blocks: int, incompatible: int = 0x2C2, log_block_size: int = 2) -> bytes:
    """An ext4 superblock at 1024: blocks at 4, block size at 0x18, magic at 0x38, incompatible features at 0x60."""
    superblock = bytearray(1024)
    superblock[0x4:0x8] = struct.pack("<I", blocks & 0xFFFFFFFF)
    superblock[0x18:0x1C] = struct.pack("<I", log_block_size)
    superblock[0x38:0x3A] = b"\x53\xef"
    superblock[0x60:0x64] = struct.pack("<I", incompatible)
    superblock[0x150:0x154] = struct.pack("<I", blocks >> 32)
    return bytes(1024) + bytes(superblock)


def file(path: Path, head: bytes, size: int) -> Path:
    path.write_bytes(head)
    os.truncate(path, size)
    return path


def refused(path: Path) -> BangerError:
    with pytest.raises(BangerError) as caught:
        filesystem_type(path)
    return caught.value


def test_the_content_tells_not_the_name(tmp_path: Path) -> None:
    assert filesystem_type(file(tmp_path / "a.ext4", squashfs(4000), 4096)) == SQUASHFS
    assert filesystem_type(file(tmp_path / "b.squashfs", ext4(16), 65536)) == EXT4
    (tmp_path / "link").symlink_to("b.squashfs")
    assert filesystem_type(tmp_path / "link") == EXT4


def test_what_is_cut_off(tmp_path: Path) -> None:
    error = refused(file(tmp_path / "a", squashfs(4097), 4096))
    assert (error.code, error.message) == (
        Code.CORRUPT, f"{tmp_path / 'a'} is cut off: it has 4,096 bytes, its filesystem 4,097",
    )  # fmt: skip
    assert refused(file(tmp_path / "b", ext4(17), 65536)).code is Code.CORRUPT
    assert "17,592,186,060,800" in refused(file(tmp_path / "c", ext4((1 << 32) + 4), 65536)).message
    # without the 64bit feature those bytes mean something else
    assert filesystem_type(file(tmp_path / "d", ext4((1 << 32) + 4, 0x242), 65536)) == EXT4


def test_a_journal_that_must_be_replayed(tmp_path: Path) -> None:
    error = refused(file(tmp_path / "a", ext4(16, 0x2C6), 65536))
    assert error.code is Code.CORRUPT
    assert error.hint == f"run 'e2fsck -f {tmp_path / 'a'}'"


def test_what_is_no_filesystem(tmp_path: Path) -> None:
    for head in (b"", b"hsqs", squashfs(10, version=3), b"\x1f\x8b", b"ustar"):
        error = refused(file(tmp_path / "x", head, 4096))
        assert (error.code, "banger image import" in error.hint) == (Code.INVALID, True)
    (tmp_path / "directory").mkdir()
    os.mkfifo(tmp_path / "pipe")
    for name in ("directory", "pipe"):
        assert refused(tmp_path / name).message == f"{tmp_path / name} is not a regular file"
    assert refused(tmp_path / "missing").code is Code.NOT_FOUND
    assert refused(tmp_path / "directory/missing/\0").code is Code.NOT_FOUND


@given(st.binary(max_size=100), st.integers(0, 2047), st.booleans())
def test_any_superblock_is_read_or_refused(
    tmp_path_factory: pytest.TempPathFactory, patch: bytes, at: int, squash: bool
) -> None:
    head = bytearray(squashfs(96).ljust(2048, b"\0") if squash else ext4(16))
    head[at : at + len(patch)] = patch
    path = file(tmp_path_factory.getbasetemp() / "any", bytes(head), 65536)
    try:
        outcome = filesystem_type(path)
    except BangerError as error:
        outcome = error.code
    assert outcome in (SQUASHFS, EXT4, Code.INVALID, Code.CORRUPT)
