"""Archives from a hostile guest: nothing lands outside of the target; honest trees arrive whole."""

import contextlib
import io
import os
import stat
import tarfile
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from banger.api.errors import BangerError, Code
from banger.cli.archive import Archive
from banger.cli.extract import extract

Entry = tuple[str, bytes, str]  # name, type, link or content


def make_tar(*entries: Entry) -> io.BytesIO:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", format=tarfile.PAX_FORMAT) as archive:
        for name, kind, value in entries:
            info = tarfile.TarInfo(name)
            info.type = kind
            info.mode = 0o6777
            if kind == tarfile.REGTYPE:
                info.size = len(value.encode())
                archive.addfile(info, io.BytesIO(value.encode()))
            else:
                info.linkname = value
                archive.addfile(info)
    stream.seek(0)
    return stream


FILE, LINK, HARD, DIR = tarfile.REGTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.DIRTYPE


@pytest.fixture
def target(tmp_path: Path) -> Path:
    (tmp_path / "secret").write_text("secret")
    directory = tmp_path / "target"
    directory.mkdir()
    return directory


def assert_outside_untouched(target: Path) -> None:
    assert sorted(path.name for path in target.parent.iterdir()) == ["secret", "target"]
    assert (target.parent / "secret").read_text() == "secret"


@pytest.mark.parametrize("name", ["../x", "a/../../x", "..", "a/.."])
def test_names_that_lead_outside(target: Path, name: str) -> None:
    with pytest.raises(BangerError) as caught:
        extract(make_tar((name, FILE, "x")), str(target), "web:/x")
    assert caught.value.code is Code.CORRUPT
    assert_outside_untouched(target)


def test_absolute_names_stay_below_the_target(target: Path) -> None:
    assert extract(make_tar(("/etc/passwd", FILE, "x")), str(target), "web:/x") == []
    assert (target / "etc/passwd").read_text() == "x"
    assert_outside_untouched(target)


@pytest.mark.parametrize(
    ("name", "link", "kept"),
    [
        ("a", "b", True),
        ("d/a", "../b", True),
        ("d/e/a", "../../b/c", True),
        ("d/a", "./../b", True),
        ("a", ".", True),
        ("a", "/etc/passwd", False),
        ("a", "..", False),
        ("d/a", "../..", False),
        ("a", "b/..", False),
        ("d/a", "../x/../../y", False),
    ],
)
def test_symbolic_links_stay_inside(target: Path, name: str, link: str, kept: bool) -> None:
    skipped = extract(make_tar((name, LINK, link)), str(target), "web:/x")
    assert (target / name).is_symlink() == kept
    assert skipped == ([] if kept else [f"{name}: a link that leads outside, to {link}"])


def test_links_that_are_there_already_are_not_followed(target: Path) -> None:
    (target / "out").symlink_to("..")
    (target / "file").symlink_to("../secret")
    skipped = extract(
        make_tar(("out/secret", FILE, "x"), ("out", DIR, ""), ("file", FILE, "new"), ("h", HARD, "out/secret")),
        str(target),
        "web:/x",
    )
    assert [line.partition(":")[0] for line in skipped] == ["out/secret", "out", "h"]
    assert (target / "file").read_text() == "new"
    assert_outside_untouched(target)


def test_links_of_the_archive_are_not_followed(target: Path) -> None:
    skipped = extract(
        make_tar(("d", DIR, ""), ("l", LINK, "d"), ("l/x", FILE, "x"), ("l", FILE, "file"), ("d", FILE, "in the way")),
        str(target),
        "web:/x",
    )
    assert [line.partition(":")[0] for line in skipped] == ["l/x", "d"]
    assert (target / "l").read_text() == "file"
    assert (target / "d").is_dir()


def test_hard_links_lead_to_files_of_the_target_alone(target: Path) -> None:
    skipped = extract(
        make_tar(
            ("d/e/inside", LINK, "../../f"),
            ("outside", HARD, "d/e/inside"),
            ("directory", HARD, "d"),
            ("none", HARD, "nowhere/f"),
            ("f", FILE, "x"),
            ("good", HARD, "/f"),
        ),
        str(target),
        "web:/x",
    )
    assert [line.partition(":")[0] for line in skipped] == ["outside", "directory", "none"]
    assert sorted(path.name for path in target.iterdir()) == ["d", "f", "good"]
    assert (target / "good").samefile(target / "f")


def test_devices_and_pipes_are_skipped(target: Path) -> None:
    skipped = extract(
        make_tar(("c", tarfile.CHRTYPE, ""), ("b", tarfile.BLKTYPE, ""), ("p", tarfile.FIFOTYPE, ""), ("f", FILE, "x")),
        str(target),
        "web:/x",
    )
    assert skipped == ["c: a device", "b: a device", "p: a named pipe"]
    assert [path.name for path in target.iterdir()] == ["f"]


def test_set_id_bits_and_the_umask_are_taken_away(target: Path) -> None:
    extract(make_tar(("f", FILE, "x")), str(target), "web:/x")
    umask = os.umask(0)
    os.umask(umask)
    assert stat.S_IMODE((target / "f").stat().st_mode) == 0o777 & ~umask


def test_hostile_names_are_shown_escaped(target: Path) -> None:
    assert extract(make_tar(("a\x1b[2J", LINK, "/\x1b")), str(target), "web:/x") == [
        "a\\x1b[2J: a link that leads outside, to /\\x1b"
    ]


def test_a_single_file_gets_the_name_asked_for(target: Path) -> None:
    (target / "old").write_text("old")
    extract(make_tar(("whatever", FILE, "new")), str(target), "web:/x", rename="old")
    assert {path.name: path.read_text() for path in target.iterdir()} == {"old": "new"}


@pytest.mark.parametrize("entries", [[("a", FILE, "x"), ("b", FILE, "y")], [("a", DIR, "")]])
def test_more_than_the_one_file_is_refused(target: Path, entries: list[Entry]) -> None:
    with pytest.raises(BangerError, match="more than the one file"):
        extract(make_tar(*entries), str(target), "web:/x", rename="n")


def test_a_cut_archive_leaves_the_old_file(target: Path) -> None:
    (target / "f").write_text("old")
    data = make_tar(("f", FILE, "new" * 1000)).getvalue()[:1024]
    with pytest.raises(BangerError, match="cut off"):
        extract(io.BytesIO(data), str(target), "web:/x")
    assert {path.name: path.read_text() for path in target.iterdir()} == {"f": "old"}


def sparse_tar(stored_map: bytes, data: bytes, size: int) -> io.BytesIO:
    """One member in GNU's pax format 1.0."""
    info = tarfile.TarInfo("sparse")
    info.pax_headers = {
        "GNU.sparse.major": "1",
        "GNU.sparse.minor": "0",
        "GNU.sparse.name": "sparse",
        "GNU.sparse.realsize": str(size),
    }
    content = stored_map + bytes(-len(stored_map) % 512) + data
    info.size = len(content)
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", format=tarfile.PAX_FORMAT) as archive:
        archive.addfile(info, io.BytesIO(content))
    stream.seek(0)
    return stream


def test_holes_stay_holes(target: Path) -> None:
    size = 64 << 20
    extract(sparse_tar(b"2\n0\n3\n%d\n4\n" % (size - 4), b"abcWXYZ", size), str(target), "web:/x")
    with open(target / "sparse", "rb") as stream:
        assert stream.read(5) == b"abc\0\0"
        stream.seek(size - 5)
        assert stream.read() == b"\0WXYZ"
    assert (target / "sparse").stat().st_blocks * 512 < 1 << 20


@pytest.mark.parametrize(
    "stored_map", [b"", b"x\n", b"1\n0\n", b"1\n0\n9999\n", b"99999999999999999999\n", b"1\n-1\n3\n", b"1\n98\n3\n"]
)
def test_hostile_sparse_maps(target: Path, stored_map: bytes) -> None:
    with pytest.raises(BangerError) as caught:
        extract(sparse_tar(stored_map, b"abc", 100), str(target), "web:/x")
    assert caught.value.code is Code.CORRUPT
    assert list(target.iterdir()) == []


NAMES = st.sampled_from(["a", "b", "c", "..", ".", "a/b", "a/c", "b/a", "a/b/c", "/a", "../secret"])
KINDS = st.sampled_from([FILE, LINK, HARD, DIR])


@given(st.lists(st.tuples(NAMES, KINDS, NAMES | st.sampled_from(["/", "../..", "a/../..", "../target"]))))
def test_no_archive_reaches_outside(tmp_path_factory: pytest.TempPathFactory, entries: list[Entry]) -> None:
    parent = tmp_path_factory.mktemp("extract")
    target = parent / "target"
    target.mkdir()
    (parent / "secret").write_text("secret")
    with contextlib.suppress(BangerError):
        extract(make_tar(*entries), str(target), "web:/x")
    assert_outside_untouched(target)
    assert (parent / "secret").stat().st_nlink == 1
    for path in target.rglob("*"):
        assert not path.name.startswith(".banger-")
        if path.is_symlink() and path.exists():
            assert path.resolve().is_relative_to(target)


def test_a_tree_survives_the_round_trip(tmp_path: Path) -> None:
    source = tmp_path / "source"
    (source / "empty").mkdir(parents=True)
    (source / ("long" * 60)).mkdir()
    (source / ("long" * 60) / ("name" * 60)).write_bytes(os.urandom(200_001))
    (source / "one").write_text("1")
    (source / "two").hardlink_to(source / "one")
    (source / "script").write_text("#!")
    (source / "script").chmod(0o750)
    os.utime(source / "script", (1_000_000_000, 1_000_000_000))
    (source / "link").symlink_to("./one")
    (source / "\udcff\n").write_text("odd")
    os.mkfifo(source / "pipe")
    target = tmp_path / "target"
    target.mkdir()
    archive = Archive(str(source), "copy", owners=False)
    stream = io.BytesIO(b"".join(archive.chunks(4096)))
    assert archive.skipped == []
    assert extract(stream, str(target), "web:/x") == ["copy/pipe: a named pipe"]
    (source / "pipe").unlink()
    copy = target / "copy"
    originals = sorted(path.relative_to(source) for path in source.rglob("*"))
    assert originals == sorted(path.relative_to(copy) for path in copy.rglob("*"))
    for path in originals:
        if (source / path).is_file():
            assert (copy / path).read_bytes() == (source / path).read_bytes()
    assert (copy / "one").samefile(copy / "two")
    assert (copy / "link").readlink() == Path("one")
    assert stat.S_IMODE((copy / "script").stat().st_mode) == 0o750
    assert (copy / "script").stat().st_mtime == 1_000_000_000


def test_what_the_archive_holds(tmp_path: Path) -> None:
    source = tmp_path / "dir"
    source.mkdir()
    (source / "f").write_bytes(b"x" * 3000)
    (tmp_path / "link").symlink_to("dir")
    archive = Archive(str(tmp_path / "link"), "", owners=False)
    assert archive.size() == 3000
    pieces = list(archive.chunks(1000))
    assert max(map(len, pieces)) <= 1024
    with tarfile.open(fileobj=io.BytesIO(b"".join(pieces))) as opened:
        members = opened.getmembers()
    assert [(member.name, member.uid, member.gid, member.size) for member in members] == [("f", 0, 0, 3000)]


def test_a_source_that_is_missing(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        b"".join(Archive(str(tmp_path / "none"), "x", owners=False).chunks(1000))
