"""Empty ext4 disks, made and checked by the real tools."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from banger import system
from banger.api.errors import BangerError, Code
from banger.disk.ext4 import MIN_SIZE, make_ext4
from banger.job import Job


@pytest.mark.parametrize("size", [MIN_SIZE, 1 << 30, 8 << 30, 64 << 30])
def test_a_disk_is_whole_and_costs_next_to_nothing(tmp_path: Path, size: int) -> None:
    disk = tmp_path / "overlay.ext4"
    make_ext4(disk, size, "overlay", Job())
    assert disk.stat().st_size == size
    assert system.allocated_bytes(disk) < 1 << 20
    subprocess.run(["e2fsck", "-fn", disk], check=True, capture_output=True)
    assert subprocess.run(["e2label", disk], check=True, capture_output=True).stdout == b"overlay\n"


def test_two_disks_have_different_identities(tmp_path: Path) -> None:
    def uuid(disk: Path) -> bytes:
        with open(disk, "rb") as stream:
            return stream.read(1024 + 0x78)[-16:]  # s_uuid of the superblock, kernel documentation "ext4"

    for name in ("a", "b"):
        make_ext4(tmp_path / name, MIN_SIZE, name, Job())
    assert uuid(tmp_path / "a") != uuid(tmp_path / "b")


def test_an_existing_file_is_left_alone(tmp_path: Path) -> None:
    disk = tmp_path / "work.ext4"
    disk.write_bytes(b"precious")
    with pytest.raises(BangerError) as caught:
        make_ext4(disk, MIN_SIZE, "work", Job())
    assert caught.value.code == Code.EXISTS
    assert disk.read_bytes() == b"precious"


@pytest.mark.parametrize("size", [0, MIN_SIZE - 1, 1 << 60])
def test_impossible_sizes(tmp_path: Path, size: int) -> None:
    with pytest.raises(BangerError) as caught:
        make_ext4(tmp_path / "disk", size, "x", Job())
    assert caught.value.code == Code.INVALID
    assert not (tmp_path / "disk").exists()
