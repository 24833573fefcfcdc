"""The cpio writer's archives are what the kernel and cpio(1) read."""

import io
import shutil
import stat
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from banger.guest.cpio import CpioWriter, cpio


@dataclass
class Member:
    name: bytes
    mode: int
    data: bytes
    inode: int
    device: tuple[int, int]


def read_archives(data: bytes) -> list[list[Member]]:
    """Read concatenated newc archives by the kernel's rules (init/initramfs.c): zeros between archives are skipped."""
    archives: list[list[Member]] = []
    position = 0
    members: list[Member] = []
    while position < len(data):
        if data[position] == 0:
            position += 1
            continue
        assert position % 4 == 0
        assert data[position : position + 6] == b"070701"
        numbers = [int(data[position + 6 + 8 * i : position + 14 + 8 * i], 16) for i in range(13)]
        inode, mode, uid, gid, _, mtime, size, _, _, major, minor, name_size, check = numbers
        assert (uid, gid, mtime, check) == (0, 0, 0, 0)
        name_end = position + 110 + name_size
        assert data[name_end - 1] == 0
        start = name_end + (-name_end % 4)
        name = data[position + 110 : name_end - 1]
        position = start + size + (-size % 4)
        if name == b"TRAILER!!!":
            archives.append(members)
            members = []
        else:
            members.append(Member(name, mode, data[start : start + size], inode, (major, minor)))
    assert members == []
    return archives


names = st.text(st.characters(exclude_characters="/\0", exclude_categories=["Cs"]), min_size=1, max_size=20).filter(
    lambda name: name not in (".", "..", "TRAILER!!!")
)


@given(st.lists(st.dictionaries(names, st.binary(max_size=40), max_size=5), min_size=1, max_size=3))
def test_concatenated_archives_keep_every_file(archives: list[dict[str, bytes]]) -> None:
    output = io.BytesIO()
    for files in archives:
        with cpio(output) as writer:
            for name, content in files.items():
                writer.file(name, content, mode=0o640)
    read = read_archives(output.getvalue())
    assert [{member.name.decode(): member.data for member in members} for members in read] == archives
    for members in read:
        assert all(member.mode == stat.S_IFREG | 0o640 for member in members)
        # two members with one inode would become hard links
        assert len({member.inode for member in members}) == len(members)


def special_archive() -> bytes:
    output = io.BytesIO()
    with cpio(output) as writer:
        writer.directory("dev")
        writer.character_device("dev/console", 5, 1)
        writer.symlink("sh", "bin/busybox")
        writer.file("init", b"#!", mode=0o755)
    return output.getvalue()


def test_special_members() -> None:
    ((directory, console, link, init),) = read_archives(special_archive())
    assert directory.mode == stat.S_IFDIR | 0o755
    assert (console.mode, console.device) == (stat.S_IFCHR | 0o600, (5, 1))
    assert (link.mode, link.data) == (stat.S_IFLNK | 0o777, b"bin/busybox")
    assert (init.mode, init.data) == (stat.S_IFREG | 0o755, b"#!")


def test_archives_are_reproducible() -> None:
    assert special_archive() == special_archive()


@pytest.mark.skipif(shutil.which("cpio") is None, reason="cpio is not installed")
def test_cpio_lists_the_archive(tmp_path: Path) -> None:
    listing = subprocess.run(["cpio", "-itvn"], input=special_archive(), check=True, capture_output=True).stdout
    lines = [line.split() for line in listing.decode().splitlines()]
    assert [(line[0], line[2], line[3], line[-1]) for line in lines] == [
        ("drwxr-xr-x", "0", "0", "dev"),
        ("crw-------", "0", "0", "dev/console"),
        ("lrwxrwxrwx", "0", "0", "bin/busybox"),
        ("-rwxr-xr-x", "0", "0", "init"),
    ]


@pytest.mark.parametrize("name", ["", "/init", "../init", "a/../b", "nul\0", "x" * 4096])
def test_bad_names_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match="not a name"):
        CpioWriter(io.BytesIO()).file(name, b"")
