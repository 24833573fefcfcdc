"""The agent's tar extraction against streams that are damaged, lie, or try to leave their directory."""

from __future__ import annotations

import errno
import shutil
import stat
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.process.agent_tar import (
    BLOCK,
    SANITIZERS,
    as_root,
    compile_agent,
    create,
    extract,
    member,
    snapshot,
    stream_of,
)


@pytest.fixture(scope="module")
def agent(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return compile_agent(tmp_path_factory.mktemp("agent") / "test_tar", *SANITIZERS)


def patched(block: bytes, offset: int, value: bytes) -> bytes:
    """The header with other bytes and the right checksum."""
    header = bytearray(block[:BLOCK])
    header[offset : offset + len(value)] = value
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return bytes(header) + block[BLOCK:]


def extended(kind: bytes, records: bytes) -> bytes:
    return member("extended", kind, data=b"") if not records else patched(member("extended", data=records), 156, kind)


def record(key: str, value: bytes) -> bytes:
    body = b" " + key.encode() + b"=" + value + b"\n"
    length = len(body) + 1
    while len(str(length)) + len(body) != length:
        length = len(str(length)) + len(body)
    return str(length).encode() + body


@pytest.fixture
def outside(tmp_path: Path) -> Iterator[Path]:
    """A directory beside the target; nothing in it may change."""
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "file").write_bytes(b"precious")
    (tmp_path / "target").mkdir()
    before = snapshot(outside)
    yield outside
    assert snapshot(outside) == before
    assert (outside / "file").stat().st_nlink == 1
    assert set(tmp_path.iterdir()) == {outside, tmp_path / "target"}


ESCAPES = {
    "dots": [member("../outside/file", data=b"evil")],
    "dots inside": [member("a/../../outside/file", data=b"evil")],
    "pax dots": [member("a", data=b"evil", pax={"path": "../outside/file"})],
    "link to parent": [member("l", b"2", ".."), member("l/outside/file", data=b"evil")],
    "absolute link": [member("l", b"2", "OUTSIDE"), member("l/file", data=b"evil")],
    "directory over link": [member("l", b"2", "../outside"), member("l", b"5")],
    "link chain": [member("a/b", b"2", "../c"), member("c", b"2", ".."), member("a/b/outside/new", data=b"evil")],
    "link with dots": [member("a/b/c", b"5"), member("l", b"2", "a/b/../../../outside"), member("l/new", data=b"evil")],
    "hard link by dots": [member("h", b"1", "../outside/file")],
    "hard link by link": [member("l", b"2", "../outside"), member("h", b"1", "l/file")],
    "hard link, then write": [
        member("l", b"2", "../outside"),
        member("h", b"1", "l/file"),
        member("h", data=b"evil"),
    ],
    "fifo by link": [member("l", b"2", "../outside"), member("l/fifo", b"6")],
    "loop": [member("l", b"2", "l"), member("l/file", data=b"evil")],
}


@pytest.mark.parametrize("name", ESCAPES)
def test_nothing_leads_out(agent: Path, tmp_path: Path, outside: Path, name: str) -> None:
    stream = stream_of(*ESCAPES[name]).replace(b"OUTSIDE", b"/" * 7)  # an absolute link, whatever it leads to
    if name == "absolute link":
        stream = stream_of(member("l", b"2", str(outside)), member("l/file", data=b"evil"))
    failure = extract(agent, stream, tmp_path / "target")
    assert failure is not None
    assert failure.code in {errno.EXDEV, errno.ELOOP}


def test_files_are_replaced_not_written_through(agent: Path, tmp_path: Path, outside: Path) -> None:
    target = tmp_path / "target"
    (target / "link").symlink_to("../outside/file")
    (target / "a").write_bytes(b"shared")
    (target / "b").hardlink_to(target / "a")
    (target / "empty").mkdir()
    stream = stream_of(*(member(name, data=b"new") for name in ("link", "/a", "./empty", "made/on/the/way")))
    assert extract(agent, stream, target) is None
    assert [(target / name).read_bytes() for name in ("link", "a", "b", "empty", "made/on/the/way")] == [
        b"new", b"new", b"shared", b"new", b"new",
    ]  # fmt: skip
    assert not (target / "link").is_symlink()


def test_links_inside_are_followed(agent: Path, tmp_path: Path) -> None:
    (tmp_path / "usr/lib").mkdir(parents=True)
    (tmp_path / "lib").symlink_to("usr/lib")
    (tmp_path / "usr/up").symlink_to("./.././usr/../lib")
    stream = stream_of(member("lib", b"5"), member("lib/a", data=b"1"), member("usr/up/b", data=b"2"))
    assert extract(agent, stream, tmp_path) is None
    assert {path.name for path in (tmp_path / "usr/lib").iterdir()} == {"a", "b"}
    assert (tmp_path / "lib").is_symlink()


@as_root
def test_absolute_links_below_slash(tmp_path: Path) -> None:
    (tmp_path / "var").mkdir()
    (tmp_path / "var/run").symlink_to("/../run")
    compile_agent(tmp_path / "test_tar", "-static")
    stream = stream_of(member("var/run/file", data=b"1"))
    subprocess.run(["chroot", tmp_path, "/test_tar", "extract", "/"], input=stream, check=True)
    assert (tmp_path / "run/file").read_bytes() == b"1"


def test_directories(agent: Path, tmp_path: Path) -> None:
    target = tmp_path / "target"
    (target / "full/sub").mkdir(parents=True)
    (target / "file").touch()
    target.chmod(0o750)
    assert extract(agent, stream_of(member("./", b"5"), member("full", b"5")), target) is None
    assert stat.S_IMODE(target.stat().st_mode) == 0o750
    assert (target / "full/sub").is_dir()
    in_the_way = extract(agent, stream_of(member("file", b"5")), target)
    assert in_the_way is not None
    assert in_the_way.code == errno.ENOTDIR
    not_empty = extract(agent, stream_of(member("full")), target)
    assert not_empty is not None
    assert not_empty.code == errno.ENOTEMPTY
    assert extract(agent, stream_of(patched(member("./", b"5"), 100, b"0000700")), tmp_path / "new") is None
    assert stat.S_IMODE((tmp_path / "new").stat().st_mode) == 0o700


def test_hard_link_to_itself(agent: Path, tmp_path: Path) -> None:
    failure = extract(agent, stream_of(member("self", b"1", "self")), tmp_path)
    assert failure is not None
    assert failure.code == errno.ENOENT
    (tmp_path / "self").write_bytes(b"kept")
    assert extract(agent, stream_of(member("self", b"1", "self")), tmp_path) is None
    assert (tmp_path / "self").read_bytes() == b"kept"


def test_cut_anywhere(agent: Path, tmp_path: Path) -> None:
    (tmp_path / "tree" / ("d" * 120)).mkdir(parents=True)
    (tmp_path / "tree/file").write_bytes(b"x" * 1500)
    (tmp_path / "tree/link").symlink_to("l" * 120)
    with open(tmp_path / "tree/sparse", "wb") as file:
        file.seek(1 << 20)
        file.write(b"data")
    stream = create(agent, tmp_path / "tree")
    end = len(stream) - 2 * BLOCK
    for length in [*range(0, end + 1, BLOCK), BLOCK - 1, end - 1, end + 1]:
        failure = extract(agent, stream[:length], tmp_path / "copy")
        assert failure is not None
        assert failure.code == errno.EBADMSG
        assert "the tar stream ends" in failure.message
        assert ("tree" in failure.message) == (length >= 3 * BLOCK)
        shutil.rmtree(tmp_path / "copy")
    assert extract(agent, stream[: end + BLOCK], tmp_path / "copy") is None


DAMAGED = {
    "checksum": bytes([member("a")[0] ^ 1]) + member("a")[1:],
    "negative size": patched(member("a"), 124, b"\xff" * 12),
    "huge size": patched(member("a"), 124, b"\x80\0\0\0\x7f" + b"\xff" * 7),
    "size is no number": patched(member("a"), 124, b"9" * 11),
    "owner is no number": patched(member("a"), 108, b"-00001 "),
    "device number": patched(member("a", b"3"), 329, b"7777777"),
    "type": patched(member("a"), 156, b"M"),
    "huge pax header": patched(extended(b"x", record("a", b"b")), 124, b"77777777777"),
    "huge long name": patched(member("a", b"L"), 124, b"00000777777"),
    "long name is too long": patched(member("a", data=b"n" * 4096), 156, b"L"),
    "record without newline": extended(b"x", b"9 path=ab") + member("a"),
    "record longer than header": extended(b"x", b"99 path=ab\n") + member("a"),
    "record without length": extended(b"x", b"path=ab\n") + member("a"),
    "pax size lies": extended(b"x", record("size", b"1000000")) + member("a", data=b"abc"),
    "pax size is negative": extended(b"x", record("size", b"-1")) + member("a"),
    "pax uid is too large": extended(b"x", record("uid", b"4294967295")) + member("a"),
    "pax mtime": extended(b"x", record("mtime", b"now")) + member("a"),
    "NUL in path": extended(b"x", record("path", b"a\0b")) + member("a"),
    "path too long": extended(b"x", record("path", b"a/" * 2048)) + member("a"),
    "sparse map too short": extended(
        b"x", record("GNU.sparse.major", b"1") + record("GNU.sparse.minor", b"0") + record("GNU.sparse.realsize", b"9")
    )
    + member("a", data=b"5\n1\n"),
    "sparse map overlaps": extended(b"x", record("GNU.sparse.size", b"99") + record("GNU.sparse.map", b"10,5,12,5"))
    + member("a", data=b"x" * 10),
    "sparse map wraps": extended(
        b"x", record("GNU.sparse.size", b"99") + record("GNU.sparse.map", b"18446744073709551615,2")
    )
    + member("a", data=b"xx"),
    "sparse map beyond data": extended(b"x", record("GNU.sparse.size", b"99") + record("GNU.sparse.map", b"0,50"))
    + member("a", data=b"x" * 10),
    "sparse map odd": extended(b"x", record("GNU.sparse.map", b"0,1,2")) + member("a", data=b"x"),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_damaged_stream(agent: Path, tmp_path: Path, name: str) -> None:
    failure = extract(agent, stream_of(member("before"), DAMAGED[name]), tmp_path / "copy")
    assert failure is not None
    assert failure.code in {errno.EBADMSG, errno.ENOTSUP}
    assert "tar" in failure.message
    assert {path.name for path in (tmp_path / "copy").iterdir()} == {"before"}


def test_what_follows_the_end_is_read(agent: Path, tmp_path: Path) -> None:
    assert extract(agent, stream_of(member("a")) + b"trailing" * 1_000_000, tmp_path) is None


def test_global_records_and_unknown_types(agent: Path, tmp_path: Path) -> None:
    stream = stream_of(
        extended(b"g", record("mtime", b"1000.5") + record("comment", b"made by hand")),
        member("a"),
        extended(b"x", record("mtime", b"2000")),
        patched(member("b", data=b"data"), 156, b"z"),
        extended(b"x", record("mtime", b"")),
        patched(member("c"), 136, b"00000005670"),
    )
    assert extract(agent, stream, tmp_path) is None
    times = [(tmp_path / name).stat().st_mtime for name in "abc"]
    assert times == [1000.5, 2000, 0o5670]
    assert (tmp_path / "b").read_bytes() == b"data"
