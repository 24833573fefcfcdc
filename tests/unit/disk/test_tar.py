"""The tar reader and writer: every dialect that common tools write, and everything a hostile archive may hold."""

from __future__ import annotations

import contextlib
import io
import itertools
import posixpath
import tarfile

import pytest
from hypothesis import given
from hypothesis import strategies as st

from banger.api.errors import BangerError, Code
from banger.disk import tar

Entry = tuple[tarfile.TarInfo, bytes]


def entry(name: str, data: bytes = b"", **fields: object) -> Entry:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    for key, value in fields.items():
        setattr(info, key, value)
    return info, data


def archive(*entries: Entry, dialect: int = tarfile.PAX_FORMAT) -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", format=dialect, errors="surrogateescape") as writer:
        for info, data in entries:
            writer.addfile(info, io.BytesIO(data))
    return stream.getvalue()


def read(data: bytes, limit: int = 1 << 30) -> list[tuple[tar.Member, bytes]]:
    reader = tar.TarReader(io.BytesIO(data), "test.tar", limit)
    return [(member, b"".join(reader.data())) for member in reader]


def rewritten(data: bytes) -> bytes:
    output = bytearray()
    for member, content in read(data):
        output += tar.encode_header(member) + content + bytes(-len(content) % tar.BLOCK)
    return bytes(output + tar.encode_end())


def refusal(data: bytes, limit: int = 1 << 30) -> BangerError:
    with pytest.raises(BangerError) as caught:
        read(data, limit)
    return caught.value


@pytest.mark.parametrize("dialect", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_reads_and_rewrites_every_dialect(dialect: int) -> None:
    long = "d" * 90 + "/" + "f" * 60
    data = archive(
        entry("./", type=tarfile.DIRTYPE, mode=0o711),
        entry("bin/sh", b"x" * 1000, mode=0o4755, uid=12, gid=34, mtime=1_700_000_000),
        entry(long, b"long"),
        entry("link", type=tarfile.SYMTYPE, linkname="../anywhere"),
        entry("hard", type=tarfile.LNKTYPE, linkname="./bin/sh"),
        entry("null", type=tarfile.CHRTYPE, devmajor=1, devminor=3),
        entry("disk", type=tarfile.BLKTYPE, devmajor=8, devminor=300),
        entry("pipe", type=tarfile.FIFOTYPE),
        dialect=dialect,
    )
    members = read(data)
    assert [member.path for member, _ in members] == [
        b"",
        b"bin/sh",
        long.encode(),
        b"link",
        b"hard",
        b"null",
        b"disk",
        b"pipe",
    ]
    shell = members[1][0]
    assert (shell.mode, shell.uid, shell.gid, shell.mtime) == (0o4755, 12, 34, 1_700_000_000)
    assert members[1][1] == b"x" * 1000
    assert members[4][0].link == b"bin/sh"
    assert members[6][0].device == (8, 300)
    again = rewritten(data)
    assert read(again) == members
    with tarfile.open(fileobj=io.BytesIO(again)) as python:
        assert [info.name for info in python][1:] == [member.path.decode() for member, _ in members][1:]


@pytest.mark.parametrize("dialect", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_large_numbers_survive(dialect: int) -> None:
    data = archive(entry("f", uid=3_000_000_000, gid=2**21, mtime=2**33), dialect=dialect)
    ((member, _),) = read(rewritten(data))
    assert (member.uid, member.gid, member.mtime) == (3_000_000_000, 2**21, 2**32 - 1)


def test_a_time_before_1970_becomes_1970() -> None:
    ((member, _),) = read(archive(entry("f", mtime=-5), dialect=tarfile.GNU_FORMAT))
    assert member.mtime == 0


def test_keeps_only_the_extended_attributes_that_an_image_may_have() -> None:
    capability = "\x01\0\0\2\0 \0\0\0\0\0\0\0\0\0\0\0\0\0\0"
    headers = {
        "SCHILY.xattr.security.capability": capability,
        "SCHILY.xattr.user.note": "a\nb",
        "SCHILY.xattr.trusted.overlay.opaque": "y",
        "SCHILY.xattr.system.posix_acl_access": "x",
        "SCHILY.acl.access": "user::rwx",
    }
    data = archive(entry("ping", b"x", pax_headers=headers))
    ((member, _),) = read(rewritten(data))
    assert member.xattrs == [(b"security.capability", capability.encode()), (b"user.note", b"a\nb")]


def test_global_headers_are_defaults() -> None:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", format=tarfile.PAX_FORMAT, pax_headers={"comment": "x"}) as writer:
        writer.addfile(tarfile.TarInfo("a"))
    assert [member.path for member, _ in read(stream.getvalue())] == [b"a"]


@given(st.lists(st.sampled_from(["", ".", "a", "b c", "\udcff", "ä", "\n", "\\"]), min_size=1, max_size=8))
def test_names_are_normalised(parts: list[str]) -> None:
    name = "/".join(parts)
    wanted = "/".join(part for part in parts if part not in ("", ".")).encode(errors="surrogateescape")
    if not name:
        return
    ((member, _),) = read(archive(entry(name, type=tarfile.DIRTYPE), dialect=tarfile.GNU_FORMAT))
    assert member.path == wanted


@given(
    st.lists(st.sampled_from(["..", "..", "a", "b", ".", ""]), min_size=1, max_size=8).filter(
        lambda parts: ".." in parts
    )
)
def test_names_that_climb_are_refused_when_they_lead_out(parts: list[str]) -> None:
    steps = [-1 if part == ".." else 1 for part in parts if part not in ("", ".")]
    if min(itertools.accumulate(steps)) >= 0:
        clean = posixpath.normpath("/" + "/".join(parts)).strip("/")
        ((member, _),) = read(archive(entry("/".join(parts), type=tarfile.DIRTYPE), dialect=tarfile.GNU_FORMAT))
        assert member.path.decode() == clean
        return
    for made in (
        entry("/".join(parts), b"x"),
        entry("hard", type=tarfile.LNKTYPE, linkname="/".join(parts)),
    ):
        error = refusal(archive(made, dialect=tarfile.GNU_FORMAT))
        assert error.code == Code.CORRUPT
        assert "test.tar" in error.message
        assert "'..'" in error.message


@given(
    path=st.binary(min_size=1, max_size=300).filter(
        lambda path: b"\0" not in path and all(part not in (b"", b".", b"..") for part in path.split(b"/"))
        and max(map(len, path.split(b"/"))) <= 255
    ),
    content=st.binary(max_size=2000),
    mode=st.integers(0, 0o7777),
    uid=st.integers(0, 2**32 - 1),
    mtime=st.integers(0, 2**32 - 1),
    xattrs=st.lists(st.tuples(st.sampled_from([b"user.a", b"security.b"]), st.binary(max_size=200)), max_size=2),
)  # fmt: skip
def test_what_is_written_reads_back(
    path: bytes, content: bytes, mode: int, uid: int, mtime: int, xattrs: list[tuple[bytes, bytes]]
) -> None:
    member = tar.Member(path, tar.REGULAR, mode, uid, 7, mtime, len(content), xattrs=xattrs)
    data = tar.encode_header(member) + content + bytes(-len(content) % tar.BLOCK) + tar.encode_end()
    assert read(data) == [(member, content)]


def read_or_corrupt(data: bytes) -> list[tuple[tar.Member, bytes]]:
    """What an archive holds, nothing when it is refused as corrupt; any other failure is a bug."""
    with contextlib.suppress(BangerError):
        return read(data)
    assert refusal(data).code == Code.CORRUPT
    return []


@given(st.binary(max_size=4096))
def test_garbage_is_no_archive(data: bytes) -> None:
    assert read_or_corrupt(data) == []


@given(st.integers(0, 8 * 512 - 1), st.integers(0, 255))
def test_a_changed_byte_never_escapes(position: int, value: int) -> None:
    data = bytearray(archive(entry("a" * 120, b"x", uid=3_000_000), entry("b", b"y" * 600)))
    data[position] = value
    assert all(b".." not in member.path.split(b"/") for member, _ in read_or_corrupt(bytes(data)))


@pytest.mark.parametrize("cut", [1, 511, 512, 513, 1024, 1500])
def test_truncation_is_noticed(cut: int) -> None:
    data = archive(entry("a", b"x" * 700)).rstrip(b"\0")
    error = refusal(data[:cut])
    assert error.code == Code.CORRUPT
    assert "cut off" in error.message


@pytest.mark.parametrize(
    ("made", "word"),
    [
        (entry("x" * 256, b""), "longer than Linux allows"),
        (entry("/".join(["d" * 200] * 21), b""), "longer than Linux allows"),
        (entry("volume", type=b"M"), "unsupported type"),
        (entry("link", type=tarfile.SYMTYPE), "unusable target"),
        (entry("disk", type=tarfile.BLKTYPE, devmajor=5000), "impossible numbers"),
        (entry("f", pax_headers={"size": "1e9"}), "not a number"),
        (entry("f", pax_headers={"uid": "-1"}), "impossible owner"),
        (entry("f", pax_headers={"path": "a\0b"}), "unusable member name"),
        (entry("f", pax_headers={"GNU.sparse.realsize": str(1 << 50)}), "limit is 1 TiB"),
    ],
)
def test_impossible_members_are_refused(made: Entry, word: str) -> None:
    error = refusal(archive(made))
    assert error.code == Code.CORRUPT
    assert word in error.message


def test_an_archive_beyond_the_limit_is_refused() -> None:
    error = refusal(archive(entry("a", bytes(100_000))), limit=50_000)
    assert error.code == Code.EXHAUSTED


def test_an_enormous_extended_header_is_refused_without_reading_it() -> None:
    header = tarfile.TarInfo("x")
    header.type, header.size = b"x", 1 << 40
    assert "extended header" in refusal(header.tobuf(tarfile.GNU_FORMAT)).message
