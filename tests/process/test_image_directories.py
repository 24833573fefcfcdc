"""Directories of any size, and any number of hard links: packed in parts, they come out as tar2sqfs has them whole."""

from __future__ import annotations

import io
import random
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from banger.api.errors import BangerError, Code
from banger.disk import merge, parts, squashfs, tar
from banger.disk.squashfs import Files
from banger.disk.tar import Member
from banger.disk.tar2sqfs import packing
from banger.job import Job

ZSTD = ["--compressor", "zstd", "--comp-extra", "level=1"]
Entry = tuple[Member, bytes]


def regular(path: str | bytes, data: bytes = b"", **fields: int) -> Entry:
    name = path if isinstance(path, bytes) else path.encode()
    return Member(name, tar.REGULAR, fields.get("mode", 0o644), fields.get("uid", 0), 0, 7, size=len(data)), data


def link(path: str, target: str) -> Entry:
    return Member(path.encode(), tar.HARD_LINK, 0, 0, 0, 0, link=target.encode()), b""


def directory(path: str, mode: int = 0o755) -> Entry:
    return Member(path.encode(), tar.DIRECTORY, mode, 0, 0, 7), b""


def pack(entries: list[Entry], target: Path, options: list[str] = ZSTD) -> bool:
    """Pack entries; whether it took parts."""
    with packing(target, options, Job()) as packer:
        for member, data in entries:
            packer.add(member)
            packer.write(data + bytes(-len(data) % tar.BLOCK))
    return packer.is_in_parts


def tree_of(image: Path) -> dict[bytes, tuple[object, ...]]:
    """All that can be told of a squashfs, by path; hard links by the first of their names."""
    packed = subprocess.run(["sqfs2tar", "--root-becomes", ".", image], check=True, capture_output=True).stdout
    reader = tar.TarReader(io.BytesIO(packed), "image", len(packed))
    found: dict[bytes, tuple[object, ...]] = {}
    for member in reader:
        data = b"".join(reader.data())
        assert member.path not in found
        fields = member.kind, member.mode, member.uid, member.gid, member.mtime, member.link, member.device
        found[member.path] = (*fields, sorted(member.xattrs), data)
    return found


def listing_of(image: Path) -> list[bytes]:
    """What another implementation says, which checks the tables more strictly; without the sizes of directories."""
    listed = subprocess.run(["unsquashfs", "-lln", image], check=True, capture_output=True).stdout
    return [re.sub(rb"^(d\S+ +\S+) +\d+", rb"\1", line) for line in listed.splitlines()]


@pytest.fixture
def in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Even small directories are packed in parts, and all but a few links are put in later."""
    monkeypatch.setattr(parts, "SMALL", 3)
    monkeypatch.setattr(parts, "LOOKS", 0)
    monkeypatch.setattr(parts, "LOOKS_EACH", 0)
    monkeypatch.setattr(parts, "LINKS_MAX", 2)


def random_entries(chance: random.Random) -> list[Entry]:
    directories, taken = [b""], {b""}
    files: list[bytes] = []
    entries: list[Entry] = []
    shared = chance.randbytes(300_000)
    for _ in range(chance.randrange(1, 400)):
        parent = chance.choice(directories)
        length = chance.choice([1, 2, 3, 20, 255])
        name = bytes(chance.choice(b"abcXYZ019._-\x02\xc3\xff") for _ in range(length))
        path = parent + b"/" + name if parent else name
        if path in taken or name in (b".", b"..") or len(path) > 4000:
            continue
        taken.add(path)
        kind = chance.choice([tar.DIRECTORY, tar.REGULAR, tar.REGULAR, tar.HARD_LINK, tar.SYMLINK, tar.CHARACTER,
                              tar.BLOCK_DEVICE, tar.FIFO])  # fmt: skip
        member = Member(path, kind, chance.randrange(0o10000), chance.choice([0, 5, 70_000]), chance.randrange(9), 9)
        member.mtime = chance.randrange(2**32)
        if chance.random() < 0.2 and kind != tar.HARD_LINK:
            member.xattrs = [(b"user.k%d" % chance.randrange(3), chance.randbytes(chance.choice([1, 10, 5000])))]
        data = b""
        if kind == tar.DIRECTORY:
            if chance.random() < 0.2:
                directories.append(path)  # implied by what is in it, perhaps
                continue
            directories.append(path)
        elif kind == tar.HARD_LINK:
            if not files:
                continue
            member.link = chance.choice(files)
        else:
            files.append(path)
            member.link = chance.choice([b"x", b"y" * 500]) if kind == tar.SYMLINK else b""
            member.device = (8, 300) if kind in (tar.CHARACTER, tar.BLOCK_DEVICE) else (0, 0)
            if kind == tar.REGULAR:
                size = chance.choice([0, 5, 131_072, 131_073, 262_144, 300_000])
                data = chance.choice([shared[:size], bytes(size), chance.randbytes(size)])
                member.size = size
        entries.append((member, data))
    return entries


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("options", [ZSTD, ["--compressor", "lz4"]], ids=["zstd", "lz4"])
def test_random_trees_are_the_same_in_parts_and_whole(
    tmp_path: Path, seed: int, options: list[str], request: pytest.FixtureRequest
) -> None:
    entries = random_entries(random.Random(seed))
    assert not pack(entries, tmp_path / "whole", options)
    request.getfixturevalue("in_parts")
    took_parts = pack(entries, tmp_path / "parts", options)
    assert took_parts or len(entries) < 20
    assert tree_of(tmp_path / "parts") == tree_of(tmp_path / "whole")
    if options is ZSTD:  # unsquashfs refuses what tar2sqfs 1.2 packs with lz4
        assert listing_of(tmp_path / "parts") == listing_of(tmp_path / "whole")
        assert describe(tmp_path / "parts") == describe(tmp_path / "whole")
    pack(entries, tmp_path / "again", options)
    assert (tmp_path / "again").read_bytes() == (tmp_path / "parts").read_bytes()


def describe(image: Path) -> set[bytes]:
    """The superblock as unsquashfs prints it, without what the sizes of the tables decide."""
    lines = subprocess.run(["unsquashfs", "-s", image], check=True, capture_output=True).stdout.splitlines()
    return {line for line in lines if b" on " not in line and not line.startswith(b"Filesystem size")}


def stat_of(image: Path, path: str) -> dict[str, str]:
    out = subprocess.run(["rdsquashfs", "--stat", path, image], check=True, capture_output=True, text=True).stdout
    return {key: value.strip() for key, _, value in (line.partition(":") for line in out.splitlines())}


@pytest.mark.usefixtures("in_parts")
def test_links_parents_and_numbers_are_right(tmp_path: Path) -> None:
    entries = [directory("d"), *(regular(f"d/f{number}") for number in range(20)), directory("d/sub", 0o700)]
    entries += [regular("d/sub/x", b"x"), *(link(f"d/sub/l{number}", "d/f19") for number in range(5))]
    assert pack(entries, tmp_path / "image")
    image = tmp_path / "image"
    root, top, sub, file = (stat_of(image, path) for path in ("/", "d", "d/sub", "d/f19"))
    assert (top["Parent inode"], sub["Parent inode"]) == (root["Inode number"], top["Inode number"])
    assert (file["Hard link count"], stat_of(image, "d/sub/l4")["Inode number"]) == ("6", file["Inode number"])
    assert (top["Hard link count"], sub["Hard link count"]) == ("23", "8")  # as tar2sqfs counts: all that is in it
    assert sub["Access"] == "0700"
    assert b"Number of inodes 24\n" in subprocess.run(["unsquashfs", "-s", image], capture_output=True).stdout


@pytest.mark.usefixtures("in_parts")
def test_a_link_to_a_link_and_to_a_file_in_another_part(tmp_path: Path) -> None:
    entries = [regular(f"f{number:02}", b"%d" % number) for number in range(12)]
    entries += [link(f"g{number:02}", f"f{number:02}") for number in range(12)]
    entries += [link(f"h{number:02}", f"g{number:02}") for number in range(12)]
    pack(entries, tmp_path / "image")
    found = tree_of(tmp_path / "image")
    assert [found[b"g%02d" % number][5] for number in range(12)] == [b"f%02d" % number for number in range(12)]
    assert [found[b"h%02d" % number][5] for number in range(12)] == [b"f%02d" % number for number in range(12)]


def test_a_directory_that_needs_an_index(tmp_path: Path) -> None:
    """100,000 files with names of every length, in no order, in a directory within a large one."""
    numbers = list(range(100_000))
    random.Random(1).shuffle(numbers)
    names = [b"big/%06d" % number + b"n" * (number % 250) for number in numbers]
    entries = [*(directory(f"d{number}") for number in range(300)), *(regular(name) for name in names)]
    assert pack(entries, tmp_path / "image")
    listed = listing_of(tmp_path / "image")
    assert [line.rpartition(b"squashfs-root/")[2] for line in listed if b"/big/" in line] == sorted(names)
    assert stat_of(tmp_path / "image", "big")["Inode type"] == "extended directory"
    for name in (min(names), max(names), names[0], names[1]):
        assert stat_of(tmp_path / "image", name.decode())["Inode type"] == "file"


def test_a_name_that_parts_use_is_refused(tmp_path: Path) -> None:
    for kind in (tar.REGULAR, tar.DIRECTORY):
        with pytest.raises(BangerError, match="a name that banger uses itself") as error:
            pack([(Member(parts.ROOT, kind, 0o755, 0, 0, 0), b"")], tmp_path / "image")
        assert error.value.code is Code.CORRUPT
    pack([regular(b"d/" + parts.ROOT, b"x")], tmp_path / "image")
    assert tree_of(tmp_path / "image")[b"d/" + parts.ROOT][-1] == b"x"


@pytest.mark.usefixtures("in_parts")
def test_what_is_no_squashfs_any_more_is_one_clear_error(tmp_path: Path) -> None:
    pack([regular("a")], tmp_path / "image")
    whole = (tmp_path / "image").read_bytes()
    for damaged in (b"", whole[:96], b"x" + whole[1:], whole[:120], whole[:96] + bytes(200)):
        assert merged(tmp_path / "damaged", damaged, b"")
    for records, message in (
        (b"b\0missing\0", "no b'missing'"),
        (b"b\0\0", "which is a directory"),
        (b"a/b\0a\0", "is no directory"),
    ):
        assert message in merged(tmp_path / "damaged", whole, records)
        assert (tmp_path / "damaged").read_bytes() == whole


def merged(image: Path, content: bytes, records: bytes) -> str:
    """What the program says, in a line, when it fails."""
    image.write_bytes(content)
    argv: list[str | Path] = [sys.executable, "-m", merge.__name__, image]
    ended = subprocess.run(argv, input=records, capture_output=True)
    assert ended.returncode == 1
    assert ended.stderr.count(b"\n") == 1
    return ended.stderr.decode()


@pytest.mark.usefixtures("in_parts")
def test_deep_trees_of_large_directories(tmp_path: Path) -> None:
    entries = [regular("/".join(["d"] * depth + [f"f{number}"])) for depth in range(0, 1500, 50) for number in range(9)]
    assert pack(entries, tmp_path / "image")
    found = tree_of(tmp_path / "image")
    assert {member.path for member, _ in entries} == {path for path, fields in found.items() if fields[0] == b"0"}


def test_the_whole_way_of_an_archive_with_a_large_directory(tmp_path: Path) -> None:
    """Through `write_squashfs`, which sees each path twice and packs it once."""

    def files() -> Iterator[tuple[Member, Iterator[bytes]]]:
        for number in range(30_000):
            member, data = regular(f"d/{number * 7919 % 30_000:05}", b"x" * (number % 3))
            yield member, iter((data,))

    def made() -> Files:
        yield from files()

    contents = squashfs.pack(made(), tmp_path / "image", Job())
    assert contents.members == 30_000
    found = tree_of(tmp_path / "image")
    assert len(found) == 30_002
    assert found[b"d/%05d" % 7919][-1] == b"x"
