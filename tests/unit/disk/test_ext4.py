"""Ext4 disks, empty and cloned, made and checked by the real tools."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from banger import system
from banger.api.errors import BangerError, Code
from banger.disk.ext4 import MIN_SIZE, clone_ext4, make_ext4
from banger.job import Job


@pytest.mark.parametrize("size", [MIN_SIZE, 1 << 30, 8 << 30, 64 << 30])
def test_a_disk_is_whole_and_costs_next_to_nothing(tmp_path: Path, size: int) -> None:
    disk = tmp_path / "overlay.ext4"
    make_ext4(disk, size, "overlay", Job())
    assert disk.stat().st_size == size
    assert system.allocated_bytes(disk) < 1 << 20
    subprocess.run(["e2fsck", "-fn", disk], check=True, capture_output=True)
    assert subprocess.run(["e2label", disk], check=True, capture_output=True).stdout == b"overlay\n"


def test_a_disk_does_not_depend_on_the_hosts_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A guest's kernel may be older than the host's mke2fs: orphan_file needs Linux 5.15, and takes 2 MB."""
    settings = tmp_path / "mke2fs.conf"  # as in Debian 13
    settings.write_text(
        "[defaults]\nbase_features = sparse_super,large_file,filetype,resize_inode,dir_index,ext_attr\n"
        "[fs_types]\next4 = {\nfeatures = has_journal,extent,huge_file,flex_bg,metadata_csum,metadata_csum_seed,64bit,"
        "dir_nlink,extra_isize,orphan_file\n}\n"
    )
    monkeypatch.setenv("MKE2FS_CONFIG", str(settings))
    disk = tmp_path / "overlay.ext4"
    make_ext4(disk, 8 << 30, "overlay", Job())
    assert system.allocated_bytes(disk) < 1 << 20
    listed = subprocess.run(["dumpe2fs", "-h", disk], check=True, capture_output=True, text=True).stdout
    (features,) = (line for line in listed.splitlines() if line.startswith("Filesystem features:"))
    assert sorted(features.split()[2:]) == [
        *("64bit", "dir_index", "dir_nlink", "ext_attr", "extent", "extra_isize", "filetype", "flex_bg"),
        *("has_journal", "huge_file", "large_file", "metadata_csum", "sparse_super"),
    ]


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


def prepared_disk(path: Path, size: int) -> Path:
    """An ext4 filesystem with the file /notes in it."""
    content = path.parent / "content"
    content.mkdir()
    (content / "notes").write_text("mine\n")
    path.touch()
    path.chmod(0o644)
    os.truncate(path, size)
    subprocess.run(["mke2fs", "-q", "-F", "-t", "ext4", "-d", content, path], check=True, capture_output=True)
    return path


@pytest.mark.parametrize("size", [MIN_SIZE, 2 << 30, 20 << 30])
def test_a_clone_has_the_content_of_its_seed_and_grows(tmp_path: Path, size: int) -> None:
    seed = prepared_disk(tmp_path / "seed", 100 << 20)
    before = seed.read_bytes()
    clone_ext4(seed, tmp_path / "home", size, Job())
    assert seed.read_bytes() == before
    assert (tmp_path / "home").stat().st_size == max(size, 100 << 20)
    assert (tmp_path / "home").stat().st_mode & 0o777 == 0o600
    assert system.allocated_bytes(tmp_path / "home") < 40 << 20
    subprocess.run(["e2fsck", "-fn", tmp_path / "home"], check=True, capture_output=True)
    notes = subprocess.run(["debugfs", "-R", "cat /notes", tmp_path / "home"], check=True, capture_output=True)
    assert notes.stdout == b"mine\n"
    listed = subprocess.run(["dumpe2fs", "-h", tmp_path / "home"], check=True, capture_output=True).stdout.decode()
    fields = dict(line.split(":", 1) for line in listed.splitlines() if ":" in line)
    assert int(fields["Block count"]) * int(fields["Block size"]) == max(size, 100 << 20)


def test_a_failed_clone_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "home").write_bytes(b"precious")
    (tmp_path / "damaged").write_bytes(b"no filesystem")
    with pytest.raises(BangerError, match="already exists"):
        clone_ext4(tmp_path / "damaged", tmp_path / "home", MIN_SIZE, Job())
    assert (tmp_path / "home").read_bytes() == b"precious"
    with pytest.raises(BangerError, match="resize2fs"):
        clone_ext4(tmp_path / "damaged", tmp_path / "new", MIN_SIZE, Job())
    with pytest.raises(FileNotFoundError):
        clone_ext4(tmp_path / "missing", tmp_path / "new", MIN_SIZE, Job())
    assert not (tmp_path / "new").exists()
