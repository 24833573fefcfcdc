"""Tar streams packed by the real tar2sqfs, and the result read back with sqfs2tar."""

from __future__ import annotations

import contextlib
import io
import os
import subprocess
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO, cast

import pytest

from banger.api.errors import BangerError, Code
from banger.disk.squashfs import Contents, write_squashfs
from banger.job import Job

Entry = tuple[tarfile.TarInfo, bytes]


def entry(name: str, data: bytes = b"", **fields: object) -> Entry:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    for key, value in fields.items():
        setattr(info, key, value)
    return info, data


def directory(name: str, mode: int = 0o755, **fields: object) -> Entry:
    return entry(name, b"", type=tarfile.DIRTYPE, mode=mode, **fields)


def hard_link(name: str, target: str) -> Entry:
    return entry(name, type=tarfile.LNKTYPE, linkname=target)


def archive(*entries: Entry) -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", format=tarfile.PAX_FORMAT) as writer:
        for info, data in entries:
            writer.addfile(info, io.BytesIO(data))
    return stream.getvalue()


def pack(data: bytes, target: Path, job: Job | None = None) -> Contents:
    @contextlib.contextmanager
    def open_tar() -> Iterator[BinaryIO]:
        yield io.BytesIO(data)

    return write_squashfs(open_tar, target, job or Job(), "test.tar")


def unpack(image: Path) -> tarfile.TarFile:
    out = subprocess.run(["sqfs2tar", image], check=True, capture_output=True).stdout
    return tarfile.open(fileobj=io.BytesIO(out))


def content(image: tarfile.TarFile, name: str) -> bytes:
    stream = image.extractfile(name)
    assert stream is not None
    return stream.read()


def test_everything_about_a_file_is_kept(tmp_path: Path) -> None:
    capability = b"\x01\0\0\2\0\x20\0\0\0\0\0\0\0\0\0\0\0\0\0\0".decode()
    pack(
        archive(
            directory("./", mode=0o711, mtime=1_600_000_000),
            directory("bin"),
            entry("bin/ping", b"ping", mode=0o4755, uid=1000, gid=70_000, mtime=1_700_000_000,
                  pax_headers={"SCHILY.xattr.security.capability": capability, "SCHILY.xattr.user.k": "v"}),
            hard_link("bin/ping6", "/bin/ping"),
            entry("bin/sh", type=tarfile.SYMTYPE, linkname="/../dash"),
            entry("null", type=tarfile.CHRTYPE, devmajor=1, devminor=3, mode=0o666),
            entry("disk", type=tarfile.BLKTYPE, devmajor=8, devminor=300),
            entry("pipe", type=tarfile.FIFOTYPE),
            entry("big owner", uid=3_000_000_000, gid=3_000_000_001),
        ),
        tmp_path / "image",
    )  # fmt: skip
    image = unpack(tmp_path / "image")
    ping = image.getmember("bin/ping")
    assert (ping.mode, ping.uid, ping.gid, ping.mtime) == (0o4755, 1000, 70_000, 1_700_000_000)
    assert ping.pax_headers["SCHILY.xattr.security.capability"] == capability
    assert ping.pax_headers["SCHILY.xattr.user.k"] == "v"
    assert (image.getmember("bin/ping6").type, image.getmember("bin/ping6").linkname) == (tarfile.LNKTYPE, "bin/ping")
    assert image.getmember("bin/sh").linkname == "/../dash"
    assert (image.getmember("null").devmajor, image.getmember("null").devminor) == (1, 3)
    assert (image.getmember("disk").devmajor, image.getmember("disk").devminor) == (8, 300)
    assert image.getmember("pipe").isfifo()
    assert (image.getmember("big owner").uid, image.getmember("big owner").gid) == (3_000_000_000, 3_000_000_001)
    listing = subprocess.run(["unsquashfs", "-lln", tmp_path / "image"], check=True, capture_output=True).stdout
    assert b"drwx--x--x 0/0" in listing


def test_posix_acls_are_left_out_and_do_not_fail_the_image(tmp_path: Path) -> None:
    acl = {"SCHILY.acl.access": "user::rwx", "SCHILY.xattr.system.posix_acl_default": "\2\0\0\0"}
    pack(archive(directory("journal", pax_headers=acl)), tmp_path / "image")
    assert unpack(tmp_path / "image").getmember("journal").pax_headers == {}


@pytest.mark.parametrize("length", [100, 101, 2000])
def test_long_names_and_targets(tmp_path: Path, length: int) -> None:
    name = "/".join(["n" * 49] * (length // 50)) + "/" + "x" * (length % 50)
    name = name.rstrip("/")
    pack(archive(entry(name, b"x"), entry("l", type=tarfile.SYMTYPE, linkname=name)), tmp_path / "image")
    image = unpack(tmp_path / "image")
    assert content(image, name) == b"x"
    assert image.getmember("l").linkname == name


DUPLICATES: dict[str, tuple[list[Entry], dict[str, bytes | None]]] = {
    "the last file wins": ([entry("a", b"1"), entry("b", b"2"), entry("a", b"3")], {"a": b"3", "b": b"2"}),
    "a directory described twice": (
        [directory("d", mode=0o700), entry("d/x", b"1"), directory("d", mode=0o755)],
        {"d": None, "d/x": b"1"},
    ),
    "a hard link keeps what was replaced": (
        [entry("a", b"old"), hard_link("b", "a"), entry("a", b"new")],
        {"a": b"new", "b": b"old"},
    ),
    "a hard link replaces a file": (
        [entry("a", b"1"), entry("b", b"2"), hard_link("b", "a"), entry("b2", b"3")],
        {"a": b"1", "b": b"1", "b2": b"3"},
    ),
    "a file that only replaced names had is gone": (
        [entry("a", b"1"), hard_link("b", "a"), entry("a", b"2"), entry("b", b"3")],
        {"a": b"2", "b": b"3"},
    ),
    "a link to itself": ([entry("a", b"1"), hard_link("a", "a")], {"a": b"1"}),
    "a directory instead of a file": ([entry("a", b"1"), directory("a"), entry("a/b", b"2")], {"a": None, "a/b": b"2"}),
    "two roots": ([directory("."), entry("a", b"1"), directory("./")], {"a": b"1"}),
}


@pytest.mark.parametrize("case", DUPLICATES)
def test_names_given_twice(tmp_path: Path, case: str) -> None:
    entries, wanted = DUPLICATES[case]
    pack(archive(*entries), tmp_path / "image")
    image = unpack(tmp_path / "image")
    found = {info.name: content(image, info.name) if not info.isdir() else None for info in image}
    assert found == wanted


def test_the_last_description_of_a_directory_wins(tmp_path: Path) -> None:
    pack(archive(directory("d", mode=0o700), entry("d/x"), directory("d", mode=0o751, uid=5)), tmp_path / "image")
    found = unpack(tmp_path / "image").getmember("d")
    assert (found.mode, found.uid) == (0o751, 5)


@pytest.mark.parametrize(
    ("entries", "word"),
    [
        ([entry("../x", b"1")], "'..'"),
        ([entry("a/../../x", b"1")], "'..'"),
        ([hard_link("b", "../../etc/shadow")], "'..'"),
        ([hard_link("b", "/etc/shadow")], "no file before it"),
        ([directory("d"), hard_link("b", "d")], "no file before it"),
        ([entry("a", b"1"), entry("a/b", b"2")], "no directory"),
        ([entry("a", type=tarfile.SYMTYPE, linkname="/etc"), entry("a/passwd", b"x")], "no directory"),
        ([directory("a"), entry("a/b"), entry("a", b"2")], "replaces a directory"),
        ([entry("/", b"1")], "replaces a directory"),
    ],
)
def test_hostile_trees_are_refused(tmp_path: Path, entries: list[Entry], word: str) -> None:
    with pytest.raises(BangerError) as caught:
        pack(archive(*entries), tmp_path / "image")
    assert caught.value.code == Code.CORRUPT
    assert word in caught.value.message
    assert caught.value.message.startswith("test.tar ")


@pytest.mark.parametrize("dialect", ["gnu", "0.0", "0.1", "1.0"])
def test_sparse_files_of_every_dialect(tmp_path: Path, dialect: str) -> None:
    name = "s" * 120  # so that the name needs an extended header beside the sparse map
    with open(tmp_path / name, "wb") as stream:
        for number in range(60):  # more pieces than one old GNU header holds
            stream.seek(number * 100_000)
            stream.write(b"piece %d" % number)
        stream.truncate(20_000_000)
    style = ["--format=gnu"] if dialect == "gnu" else ["--format=pax", f"--sparse-version={dialect}"]
    command = ["tar", "--create", "--sparse", *style, f"--directory={tmp_path}", name]
    data = subprocess.run(command, check=True, capture_output=True).stdout
    assert len(data) < 500_000
    pack(data, tmp_path / "image")
    assert content(unpack(tmp_path / "image"), name) == (tmp_path / name).read_bytes()
    assert (tmp_path / "image").stat().st_size < 100_000


def test_what_the_tree_holds_is_noticed(tmp_path: Path) -> None:
    def elf(machine: int) -> bytes:
        return b"\x7fELF\2\1\1".ljust(16, b"\0") + b"\2\0" + machine.to_bytes(2, "little") + bytes(44)

    contents = pack(
        archive(
            entry("usr/lib/firmware/one", elf(62)),
            entry("usr/lib/firmware/two", elf(62)),
            entry("usr/bin/true", elf(183)),
            entry("etc/os-release", b"ID=test\n"),
        ),
        tmp_path / "image",
    )
    assert (contents.arch, contents.members, contents.os_release) == ("arm64", 4, b"ID=test\n")
    assert pack(archive(entry("app", elf(62))), tmp_path / "image").arch == "amd64"
    assert pack(archive(entry("app", elf(243))), tmp_path / "image").arch == "machine-243"
    assert pack(archive(entry("app", b"#!/bin/sh")), tmp_path / "image").arch == ""


def test_incompressible_data_survives(tmp_path: Path) -> None:
    data = os.urandom(3_000_001)
    pack(archive(entry("noise", data)), tmp_path / "image")
    assert content(unpack(tmp_path / "image"), "noise") == data


def test_cancelling_stops_the_packer(tmp_path: Path) -> None:
    job = Job()
    size = 1 << 40
    header = tarfile.TarInfo("endless")
    header.size = size

    class Endless(io.RawIOBase):
        """A member that never ends; the job is cancelled when a part of it has been read."""

        served = 0

        def readable(self) -> bool:
            return True

        def readinto(self, buffer: bytearray) -> int:  # type: ignore[override]
            data = header.tobuf(tarfile.GNU_FORMAT) if self.served == 0 else bytes(len(buffer))
            data = data[: len(buffer)]
            buffer[: len(data)] = data
            self.served += len(data)
            if self.served > 20 << 20:
                job.cancel()
            return len(data)

    @contextlib.contextmanager
    def open_tar() -> Iterator[BinaryIO]:
        yield cast(BinaryIO, io.BufferedReader(cast(io.BufferedIOBase, Endless())))

    with pytest.raises(BangerError) as caught:
        write_squashfs(open_tar, tmp_path / "image", job, "endless")
    assert caught.value.code == Code.CANCELLED


def test_a_full_disk_is_told_as_such(tmp_path: Path, on_small_disk: Callable[[], Path]) -> None:
    data = archive(entry("noise", os.urandom(40 << 20)))
    with pytest.raises(BangerError) as caught:
        pack(data, on_small_disk() / "image")
    assert caught.value.code == Code.EXHAUSTED


@pytest.fixture
def on_small_disk(tmp_path: Path) -> Iterator[Callable[[], Path]]:
    """A filesystem of 16 MB, below what is always left free."""
    if os.geteuid() != 0:
        pytest.skip("mounting a small filesystem needs root")
    mount = tmp_path / "small"
    mount.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", mount], check=True)
    yield lambda: mount
    subprocess.run(["umount", mount], check=True)
