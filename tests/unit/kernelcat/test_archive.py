"""What is taken of a hostile archive: every known trick by name, and arbitrary archives against a plain model."""

from __future__ import annotations

import contextlib
import io
import os
import posixpath
import shutil
import stat
import tarfile
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from banger.api.errors import BangerError, Code
from banger.disk import tar
from banger.disk.tar import Member, TarReader
from banger.job import Job
from banger.kernelcat import archive
from banger.kernelcat.archive import Extraction

REGULAR, LINK, SYMLINK, DIRECTORY = tarfile.REGTYPE, tarfile.LNKTYPE, tarfile.SYMTYPE, tarfile.DIRTYPE
CHARACTER, BLOCK, FIFO = tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE


@dataclass(frozen=True)
class Entry:
    name: str
    data: bytes = b""
    kind: bytes = REGULAR
    link: str = ""
    mode: int = 0o644


def pack(*entries: Entry, dialect: int = tarfile.GNU_FORMAT) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=dialect, encoding="utf-8", errors="surrogateescape") as writer:
        for entry in entries:
            info = tarfile.TarInfo(entry.name)
            info.type, info.linkname, info.mode, info.size = entry.kind, entry.link, entry.mode, len(entry.data)
            writer.addfile(info, io.BytesIO(entry.data))
    return buffer.getvalue()


def reader(data: bytes) -> TarReader:
    return TarReader(io.BytesIO(data), "test.tar", archive.ARCHIVE_LIMIT)


def extract(target: Path, *archives: bytes, rooted: bool = True) -> dict[str, int]:
    extraction = Extraction(target, "test.tar", Job(), rooted=rooted)
    for data in archives:
        extraction.take(reader(data))
    return extraction.finish()


def tree(target: Path) -> dict[str, bytes]:
    """All files below a directory; fails for anything that is neither a file nor a directory of the right mode."""
    files = {}
    for directory, names, others in os.walk(target):
        for name in names + others:
            path = Path(directory, name)
            mode = path.lstat().st_mode
            if stat.S_ISREG(mode):
                assert stat.S_IMODE(mode) == 0o644
                files[path.relative_to(target).as_posix()] = path.read_bytes()
            else:
                assert stat.S_ISDIR(mode), path
                assert stat.S_IMODE(mode) == 0o755
    return files


def taken(target: Path, *entries: Entry, rooted: bool = True) -> dict[str, bytes]:
    extract(target, pack(*entries), rooted=rooted)
    return tree(target)


def refusal(target: Path, *entries: Entry, rooted: bool = True) -> BangerError:
    """The error of an archive that is refused; nothing but what is inside of the target has changed."""
    with pytest.raises(BangerError) as caught:
        extract(target, pack(*entries), rooted=rooted)
    assert not tree_of_finished(target)
    assert caught.value.message.isprintable()
    return caught.value


def tree_of_finished(target: Path) -> list[Path]:
    return [path for path in target.rglob("*") if path.is_symlink() or path.relative_to(target).parts[0][0] != "."]


@pytest.fixture
def target(tmp_path: Path) -> Iterator[Path]:
    outside = tmp_path / "outside"
    outside.write_bytes(b"sentinel")
    before = sorted(tmp_path.iterdir())
    target = tmp_path / "target"
    yield target
    assert outside.read_bytes() == b"sentinel"
    assert sorted(path for path in tmp_path.iterdir() if path != target) == before


def test_takes_the_files_of_a_kernel_and_nothing_else(target: Path) -> None:
    wanted = [
        *("vmlinux", "vmlinuz", "bzImage", "Image", "kernel", "initrd.img", "config", "metadata.json", "kernel.tar"),
        *("boot/vmlinuz-6.1", "boot/config-6.1", "lib/modules/6.1/modules.dep", "lib/modules/6.1/kernel/fs/ext4.ko"),
        *("modules/modules.dep", "modules/a/b/c.ko"),
    ]
    others = ["etc/passwd", "boot/grub/grub.cfg", "lib/modules/x", "lib/firmware/x", "usr/bin/sh", "foo", "Kernel"]
    assert set(taken(target, *(Entry(name) for name in wanted + others))) == set(wanted)


def test_usr_lib_modules_is_lib_modules(target: Path) -> None:
    files = taken(
        target,
        Entry("lib", kind=SYMLINK, link="usr/lib"),
        Entry("./usr/lib/modules/6.1/kernel/a.ko", b"a"),
        Entry("./usr/lib/modules/6.1/vmlinuz", b"k"),
        Entry("boot/vmlinuz", kind=SYMLINK, link="/lib/modules/6.1/vmlinuz"),
    )
    assert files == {"lib/modules/6.1/kernel/a.ko": b"a", "lib/modules/6.1/vmlinuz": b"k", "boot/vmlinuz": b"k"}


@pytest.mark.parametrize(
    "name", ["manifest.json", "boot-modules.cpio", "boot-agent.cpio", "modules.squashfs", "boot/boot-x.cpio"]
)
@pytest.mark.parametrize("rooted", [True, False])
def test_a_planted_manifest_or_boot_archive_is_not_taken(target: Path, name: str, rooted: bool) -> None:
    assert taken(target, Entry(name, b"evil"), Entry("vmlinux", b"k"), rooted=rooted) == {"vmlinux": b"k"}


@pytest.mark.parametrize("rooted", [True, False])
@pytest.mark.parametrize("name", ["/vmlinux", "//boot/vmlinuz", "/modules/a.ko", "/lib/modules/6.1/a.ko"])
def test_absolute_names_are_refused(target: Path, name: str, rooted: bool) -> None:
    assert "absolute" in refusal(target, Entry(name, b"x"), rooted=rooted).message


@pytest.mark.parametrize("rooted", [True, False])
@pytest.mark.parametrize("name", ["../outside", "boot/../../outside", "modules/a/../../../outside"])
def test_names_with_dotdot_are_refused(target: Path, name: str, rooted: bool) -> None:
    error = refusal(target, Entry(name, b"x"), rooted=rooted)
    assert error.code == Code.CORRUPT
    assert "'..'" in error.message


def test_names_with_dotdot_are_refused_of_any_reader(target: Path) -> None:
    for member in (regular("boot/../../outside"), Member(b"boot/a", tar.HARD_LINK, 0, 0, 0, 0, link=b"../outside")):
        with pytest.raises(BangerError) as caught:
            Extraction(target, "test.rpm", Job(), rooted=True).take(Listed(member))
        assert caught.value.code == Code.CORRUPT


@pytest.mark.parametrize(
    "name", ["modules/\udcff.ko", "boot/vmlinuz-\x1b[31m", "modules/a\nb", "boot/\u202egpj", "modules/\x85"]
)
@pytest.mark.parametrize("rooted", [True, False])
@pytest.mark.parametrize("kind", [REGULAR, SYMLINK, DIRECTORY, FIFO])
def test_names_that_are_not_printable_utf8_are_refused(target: Path, name: str, rooted: bool, kind: bytes) -> None:
    error = refusal(target, Entry(name, kind=kind, link="a"), rooted=rooted)
    assert error.code == Code.CORRUPT


def test_what_is_not_wanted_may_have_any_name_in_a_package_but_not_in_a_bundle(target: Path) -> None:
    odd = Entry("etc/a\x01\udcff", b"x")
    assert taken(target, odd, Entry("vmlinux")) == {"vmlinux": b""}
    assert "UTF-8" in refusal(target / "again", odd, rooted=False).message


def test_names_longer_than_allowed_are_refused(target: Path) -> None:
    deep = "modules/" + "/".join("d" * 40)
    assert "longer" in refusal(target, Entry(deep)).message
    assert "longer" in refusal(target, Entry("modules/" + "/".join(["x" * 200] * 6))).message
    assert "longer" in refusal(target, Entry("modules/" + "x" * 256)).message


@pytest.mark.parametrize("dialect", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_long_names_of_every_dialect_are_taken(target: Path, dialect: int) -> None:
    name = "modules/" + "/".join(["d" * 90] * 3) + "/" + "f" * 240
    extract(target, pack(Entry(name, b"x"), dialect=dialect), rooted=False)
    assert tree(target) == {name: b"x"}


@pytest.mark.parametrize("kind", [SYMLINK, LINK])
@pytest.mark.parametrize("rooted", [True, False])
def test_a_link_to_a_file_of_the_archive_becomes_that_file(target: Path, kind: bytes, rooted: bool) -> None:
    link = "vmlinuz-6.1" if kind == SYMLINK else "boot/vmlinuz-6.1"
    files = taken(target, Entry("boot/vmlinuz-6.1", b"k"), Entry("boot/vmlinuz", kind=kind, link=link), rooted=rooted)
    assert files == {"boot/vmlinuz-6.1": b"k", "boot/vmlinuz": b"k"}
    assert (target / "boot/vmlinuz").samefile(target / "boot/vmlinuz-6.1")


def test_links_are_followed_through_links_in_the_namespace_of_the_archive(target: Path) -> None:
    files = taken(
        target,
        Entry("vmlinux", kind=SYMLINK, link="boot/current"),
        Entry("boot/current", kind=SYMLINK, link="/lib/modules/./v//a"),
        Entry("lib", kind=SYMLINK, link="usr/lib"),
        Entry("usr/lib/modules/v/a", kind=SYMLINK, link="b"),
        Entry("usr/lib/modules/v/b", b"b"),
    )
    assert files == dict.fromkeys(("vmlinux", "boot/current", "lib/modules/v/a", "lib/modules/v/b"), b"b")


def test_links_to_anything_else_are_skipped_and_counted(target: Path) -> None:
    skipped = extract(
        target,
        pack(
            Entry("boot/a", kind=SYMLINK, link="missing"),
            Entry("boot/b", kind=SYMLINK, link="/etc/passwd"),
            Entry("boot/c", kind=LINK, link="etc/passwd"),
            Entry("boot/d", kind=SYMLINK, link="d"),
            Entry("boot/e", kind=SYMLINK, link="../modules"),
            Entry("modules/f", b"x"),
        ),
    )
    assert skipped == {"link": 5}
    assert tree(target) == {"modules/f": b"x"}


@pytest.mark.parametrize("link", ["../../outside", "../../etc/passwd", "../boot/../../x", "b/../../../x"])
@pytest.mark.parametrize("rooted", [True, False])
def test_links_that_leave_the_archive_are_refused(target: Path, link: str, rooted: bool) -> None:
    assert "outside of the archive" in refusal(target, Entry("boot/a", kind=SYMLINK, link=link), rooted=rooted).message


def test_hard_links_that_leave_the_archive_are_refused(target: Path) -> None:
    assert refusal(target, Entry("boot/a", kind=LINK, link="../outside")).code == Code.CORRUPT


@pytest.mark.parametrize("kind", [SYMLINK, LINK])
def test_absolute_targets_are_refused_in_a_bundle(target: Path, kind: bytes) -> None:
    assert "absolute" in refusal(target, Entry("modules/a", kind=kind, link="/etc/passwd"), rooted=False).message


@pytest.mark.parametrize("rooted", [True, False])
@pytest.mark.parametrize("above", ["modules", "modules/a", "modules/a/b"])
@pytest.mark.parametrize("to", ["/tmp", "../..", ".", "boot"])
def test_a_link_that_is_written_through_later_is_refused(target: Path, above: str, to: str, rooted: bool) -> None:
    error = refusal(target, Entry(above, kind=SYMLINK, link=to), Entry("modules/a/b/c.ko", b"x"), rooted=rooted)
    assert error.code == Code.CORRUPT
    assert "link" in error.message


@pytest.mark.parametrize("top", ["lib", "usr", "usr/lib", "usr/lib/modules", "usr/lib/modules/v"])
def test_a_link_above_the_modules_is_not_written_through(target: Path, top: str) -> None:
    name = "lib/modules/v/a" if top == "lib" else "usr/lib/modules/v/a"
    assert "link" in refusal(target, Entry(top, kind=SYMLINK, link="/tmp"), Entry(name, b"x")).message


def test_links_to_the_sources_are_passed_over_silently(target: Path) -> None:
    entries = [
        Entry(f"{directory}/{name}", kind=SYMLINK, link=link)
        for directory in ("modules", "lib/modules/v")
        for name, link in (("build", "/usr/src/linux"), ("source", "../../../../../etc"))
    ]
    assert extract(target, pack(*entries), rooted=False) == {}
    assert tree(target) == {}
    through = Entry("modules/build/x", b"x")
    assert "link" in refusal(target / "again", *entries, through, rooted=False).message


def test_devices_and_fifos_are_skipped_and_counted(target: Path) -> None:
    entries = [
        Entry("modules/null", kind=CHARACTER),
        Entry("boot/disk", kind=BLOCK),
        Entry("modules/pipe", kind=FIFO),
        Entry("dev/null", kind=CHARACTER),
        Entry("vmlinux", b"k"),
    ]
    assert extract(target / "bundle", pack(*entries), rooted=False) == {"device": 3, "fifo": 1}
    assert extract(target / "package", pack(*entries), rooted=True) == {"device": 2, "fifo": 1}
    assert tree(target / "bundle") == tree(target / "package") == {"vmlinux": b"k"}


def test_bits_and_owners_are_dropped(target: Path) -> None:
    assert taken(target, Entry("boot/vmlinuz", b"k", mode=0o6777)) == {"boot/vmlinuz": b"k"}
    assert (target / "boot/vmlinuz").stat().st_uid == os.geteuid()


def test_of_duplicates_the_last_wins_in_a_package(target: Path) -> None:
    link = Entry("boot/b", kind=LINK, link="boot/a")
    files = taken(target, Entry("boot/a", b"old, longer"), link, Entry("boot/a", b"new"))
    assert files == {"boot/a": b"new", "boot/b": b"old, longer"}  # a hard link keeps what it was made of


@pytest.mark.parametrize("kinds", [(REGULAR, REGULAR), (SYMLINK, REGULAR), (REGULAR, SYMLINK), (FIFO, REGULAR)])
def test_duplicates_are_refused_in_a_bundle(target: Path, kinds: tuple[bytes, bytes]) -> None:
    entries = [
        Entry(name, kind=kind, link="b") for name, kind in zip(("modules/a", "./modules//a"), kinds, strict=True)
    ]
    assert "twice" in refusal(target, *entries, rooted=False).message


@pytest.mark.parametrize("rooted", [True, False])
def test_a_file_where_a_directory_is_and_the_reverse_are_refused(target: Path, rooted: bool) -> None:
    file, below, directory = Entry("modules/a"), Entry("modules/a/b"), Entry("modules/a", kind=DIRECTORY)
    for entries in ((file, below), (below, file), (file, directory), (directory, file)):
        assert refusal(target, *entries, rooted=rooted).code == Code.CORRUPT


def test_names_that_meet_only_where_they_go_are_refused(target: Path) -> None:
    error = refusal(target, Entry("lib/modules/v/a"), Entry("usr/lib/modules/v/a/b"))
    assert "both as a file and as a directory" in error.message


def test_later_archives_replace_files_and_directories(target: Path) -> None:
    first = pack(Entry("boot/a", b"1"), Entry("modules/d/x", b"1"), Entry("modules/f", b"1"), Entry("modules/k", b"1"))
    second = pack(Entry("boot/a", b"2"), Entry("modules/d", b"2"), Entry("modules/f/x", b"2"))
    extract(target, first, second)
    assert tree(target) == {"boot/a": b"2", "modules/d": b"2", "modules/f/x": b"2", "modules/k": b"1"}


def test_whiteouts_remove_what_earlier_archives_put_there(target: Path) -> None:
    first = pack(
        *(Entry(name, b"1") for name in ("boot/a", "boot/b", "modules/d/x", "lib/modules/v/a", "lib/modules/w/a"))
    )
    second = pack(
        Entry("boot/.wh.a"),
        Entry("modules/d/y", b"2"),
        Entry("modules/d/.wh..wh..opq"),  # after what stays: order means nothing within a layer
        Entry("lib/modules/.wh.v"),
        Entry("boot/.wh..."),
        Entry("boot/.wh..wh.plnk/1"),
        Entry(".wh.missing/x"),
        Entry("boot/.wh.a"),
    )
    extract(target, first, second)
    assert tree(target) == {"boot/b": b"1", "modules/d/y": b"2", "lib/modules/w/a": b"1"}


def test_a_link_of_a_lower_layer_is_replaced_and_not_followed(target: Path) -> None:
    extract(target, pack(Entry("modules", kind=SYMLINK, link="/tmp")), pack(Entry("modules/a", b"x")))
    assert tree(target) == {"modules/a": b"x"}


def test_sparse_files_are_refused_where_they_are_wanted(target: Path) -> None:
    for name, wanted in (("vmlinux", True), ("etc/x", False)):
        info = tarfile.TarInfo(name)
        info.size = 4
        info.pax_headers = {"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.realsize": "1000000"}
        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT) as writer:
            writer.addfile(info, io.BytesIO(b"1\n0\n"))
        if wanted:
            with pytest.raises(BangerError, match="sparse"):
                extract(target, buffer.getvalue())
        else:
            extract(target / name, buffer.getvalue())


class Listed:
    """An archive without an encoding; its data is `data`, whatever the members say."""

    def __init__(self, *members: Member, data: bytes = b"") -> None:
        self._members = members
        self._data = data

    def __iter__(self) -> Iterator[Member]:
        return iter(self._members)

    def data(self) -> Iterator[bytes]:
        yield self._data


def regular(path: str, size: int = 0) -> Member:
    return Member(path.encode(), tar.REGULAR, 0o644, 0, 0, 0, size=size)


def exhaustion(target: Path, *members: Member) -> BangerError:
    with pytest.raises(BangerError) as caught:
        Extraction(target, "test.tar", Job(), rooted=True).take(Listed(*members))
    assert caught.value.code == Code.EXHAUSTED
    return caught.value


def test_bombs_of_size_and_number_are_refused(target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "4 GiB" in exhaustion(target, *(regular(f"x{number}", 1 << 30) for number in range(5))).message
    assert "1 GiB" in exhaustion(target, regular("vmlinux", (1 << 30) + 1)).message
    monkeypatch.setattr(archive, "MEMBERS_MAX", 100)
    assert "100 files" in exhaustion(target, *(regular(f"x{number}") for number in range(101))).message


def test_links_count_as_what_they_become(target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(archive, "ARCHIVE_LIMIT", 1000)
    names = [Entry(f"boot/{number}", kind=LINK, link="boot/a") for number in range(3)]
    with pytest.raises(BangerError) as caught:
        extract(target, pack(Entry("boot/a", b"x" * 300), *names))
    assert caught.value.code == Code.EXHAUSTED


@pytest.mark.parametrize("data", [b"", b"12", b"1234"])
def test_data_of_another_size_is_refused(target: Path, data: bytes) -> None:
    with pytest.raises(BangerError, match="not 3 bytes"):
        Extraction(target, "test.rpm", Job(), rooted=True).take(Listed(regular("vmlinux", 3), data=data))


def test_below_lib_and_usr_lib_the_last_wins_too(target: Path) -> None:
    lib, usr = "lib/modules/v/a", "usr/lib/modules/v/a"
    assert taken(target / "1", Entry("usr/lib/modules/v/b"), Entry(lib, b"1"), Entry(usr, b"2"))[lib] == b"2"
    assert taken(target / "2", Entry("lib/modules/v/b"), Entry(usr, b"1"), Entry(lib, b"2"))[lib] == b"2"
    assert "twice" in refusal(target / "3", Entry(lib), Entry(usr), rooted=False).message


def test_a_whiteout_leaves_what_its_own_layer_has(target: Path) -> None:
    extract(target, pack(Entry("boot/a", b"1")), pack(Entry("boot/a", b"2"), Entry("boot/.wh.a")))
    assert tree(target) == {"boot/a": b"2"}


def test_a_hard_link_to_a_link_is_that_link(target: Path) -> None:
    hard = Entry("modules/d/hard", kind=LINK, link="modules/soft")
    soft = Entry("modules/soft", kind=SYMLINK, link="a")
    files = taken(target, Entry("modules/a", b"1"), Entry("modules/d/a", b"2"), soft, hard)
    assert files == {"modules/a": b"1", "modules/soft": b"1", "modules/d/a": b"2", "modules/d/hard": b"2"}


def test_long_chains_of_links_end(target: Path) -> None:
    chain = [Entry(f"boot/{number}", kind=SYMLINK, link=f"{number + 1}") for number in range(100)]
    assert extract(target, pack(*chain, Entry("boot/100", b"x"))) == {"link": 91}
    assert len(tree(target)) == 10


@pytest.mark.parametrize("rooted", [True, False])
def test_truncated_at_every_offset(target: Path, rooted: bool) -> None:
    data = pack(Entry("modules/" + "l" * 120, b"x" * 700), Entry("vmlinux", b"k"))
    end = len(data.rstrip(b"\0"))
    for size in range(0, end, 37):
        with pytest.raises(BangerError) as caught:
            extract(target / str(size), data[:size], rooted=rooted)
        assert caught.value.code == Code.CORRUPT


def test_a_cancelled_job_ends_it(target: Path) -> None:
    job = Job()
    extraction = Extraction(target, "test.tar", job, rooted=True)
    job.cancel()
    with pytest.raises(BangerError) as caught:
        extraction.take(reader(pack(Entry("vmlinux"))))
    assert caught.value.code == Code.CANCELLED


def test_failures_of_the_system_pass_through(target: Path) -> None:
    extraction = Extraction(target, "test.tar", Job(), rooted=True)
    extraction.take(reader(pack(Entry("vmlinux"))))
    next(target.iterdir()).rename(target.parent / "outside-moved")
    try:
        with pytest.raises(FileNotFoundError):
            extraction.finish()
    finally:
        shutil.rmtree(target.parent / "outside-moved")


# The model: flat dictionaries instead of a tree, strings instead of bytes, no disk

LEAF = tuple[int, int, bytes | None, str | None]  # archive, order, data, target


class Refused(Exception):
    pass


def destination(name: str) -> str | None:
    parts = name.removeprefix("usr/").split("/") if name.startswith("usr/lib/modules/") else name.split("/")
    planted = parts[-1] == "manifest.json" or (parts[-1].startswith("boot-") and parts[-1].endswith(".cpio"))
    top = ["vmlinux", "vmlinuz", "bzImage", "Image", "kernel", "initrd.img", "config", "metadata.json", "kernel.tar"]
    match parts:
        case [one]:
            return one if one in top else None
        case ["boot", _] if not planted:
            return "/".join(parts)
        case ["lib", "modules", _, _, *_] | ["modules", _, *_]:
            return "/".join(parts)
    return None


def cleaned(name: str) -> list[str]:
    """The parts of a name that does not lead out."""
    parts: list[str] = []
    for part in name.split("/"):
        if part == ".." and not parts:
            raise Refused
        if part == "..":
            parts.pop()
        elif part not in ("", "."):
            parts.append(part)
    return parts


def model(archives: list[list[Entry]], rooted: bool) -> tuple[dict[str, bytes], dict[str, int]]:
    leaves: dict[str, LEAF] = {}
    directories: dict[str, int] = {}
    skipped: dict[str, int] = {}
    order = 0

    def skip(kind: str) -> None:
        skipped[kind] = skipped.get(kind, 0) + 1

    def below(path: str, name: str) -> bool:
        return name == path or name.startswith(path + "/")

    for number, entries in enumerate(archives):
        for entry in entries:
            order += 1
            parts = cleaned(entry.name)
            if entry.kind == LINK:
                cleaned(entry.link)
            name = "/".join(parts)
            if not name:
                continue
            if parts[-1].startswith(".wh."):
                gone = parts[-1].removeprefix(".wh.")
                path = "/".join(parts[:-1]) if gone == ".wh..opq" else "/".join([*parts[:-1], gone])
                if gone == ".wh..opq" or not gone.startswith(".wh."):
                    for other in list(leaves):
                        inside = not path or below(path, other)
                        if inside and leaves[other][0] != number and not (gone == ".wh..opq" and other == path):
                            del leaves[other]
                    for other in list(directories):
                        if (not path or below(path, other)) and directories[other] != number:
                            del directories[other]
                continue
            concerns = destination(name) or name in ("boot", "modules", "lib", "usr", "usr/lib")
            unusr = name.removeprefix("usr/") if below("usr/lib/modules", name) else name
            concerns = concerns or (below("lib/modules", unusr) and unusr.count("/") <= 2)
            if concerns or not rooted:
                if entry.name.startswith("/") or not name.isprintable():
                    raise Refused
                if entry.kind in (CHARACTER, BLOCK, FIFO):
                    skip("fifo" if entry.kind == FIFO else "device")
            if not concerns:
                continue
            depth = len(parts) + (entry.kind == DIRECTORY)
            for above in ("/".join(parts[:end]) for end in range(1, depth)):
                if above in leaves and leaves.pop(above)[0] == number:
                    raise Refused
                directories[above] = number
            if entry.kind == DIRECTORY:
                continue
            if name in directories:
                if directories[name] == number:
                    raise Refused
                leaves = {other: leaf for other, leaf in leaves.items() if not below(name, other)}
                directories = {other: last for other, last in directories.items() if not below(name, other)}
            if name in leaves and leaves[name][0] == number and not rooted:
                raise Refused
            data = entry.data if entry.kind == REGULAR and destination(name) else None
            to = None
            in_module_directory = posixpath.dirname(unusr) == "modules" or (
                unusr.startswith("lib/modules/") and unusr.count("/") == 3
            )
            if entry.kind == SYMLINK and not (parts[-1] in ("build", "source") and in_module_directory):
                if entry.link.startswith("/") and not rooted:
                    raise Refused
                to = entry.link
            if entry.kind == LINK:
                if entry.link.startswith("/") and not rooted:
                    raise Refused
                same = leaves.get("/".join(cleaned(entry.link)))
                data, to = (same[2], same[3]) if same else (None, None)
                if data is None and to is None and destination(name):
                    skip("link")
            leaves[name] = (number, order, data, to)

    files: dict[str, tuple[int, bytes]] = {}
    for name, (_, order, data, _) in leaves.items():
        goes = destination(name)
        if data is not None and goes:
            if goes in files and not rooted:
                raise Refused
            files[goes] = max(files.get(goes, (0, b"")), (order, data))

    def resolve(directory: list[str], target: str, left: int) -> str | None:
        position = [] if target.startswith("/") else list(directory)
        parts = target.split("/")
        for index, part in enumerate(parts):
            if part == "..":
                if not position:
                    raise Refused
                position.pop()
            elif part not in ("", "."):
                to = leaves.get("/".join([*position, part]), (0, 0, None, None))[3]
                if to is None:
                    position.append(part)
                elif left == 0:
                    return None
                else:
                    return resolve(position, to + "/" + "/".join(parts[index + 1 :]), left - 1)
        return destination("/".join(position)) if position else None

    links: dict[str, bytes] = {}
    for name, (_, _, _, to) in leaves.items():
        if to is not None:
            end = resolve(name.split("/")[:-1], to, 8)
            goes = destination(name)
            if goes and goes not in files and goes not in links:
                if end in files:
                    links[goes] = files[end][1]
                elif end in links:
                    links[goes] = links[end]
                else:
                    skip("link")
    result = {name: data for name, (_, data) in files.items()} | links
    if any(other.startswith(name + "/") for name in result for other in result):
        raise Refused
    return result, skipped


PARTS = ["boot", "modules", "lib", "usr", "v", "w", "a", "b", "vmlinux", "build", "manifest.json", ".", ""]
PLAIN = [
    *("vmlinux", "kernel", "./config", "boot/a", "boot/b", "modules/a", "modules/b", "modules/v/a", "modules/./v//b"),
    *("lib/modules/v/a", "usr/lib/modules/v/a", "lib/modules/v/b", "usr/lib/modules/v/b/a", "lib/modules/v/w/a"),
]
PREFIXES = ["", "", "boot/", "modules/", "lib/modules/v/", "usr/lib/modules/v/", "usr/lib/", "lib/", "./", "/"]
TAILS = st.lists(st.sampled_from([*PARTS, ".wh.a", ".wh.v", ".wh..wh..opq"]), min_size=1, max_size=3).map("/".join)
# what ends everything comes rarely, so that something is left to compare
NAMES = st.one_of(
    *[st.sampled_from(PLAIN)] * 40,
    *[st.builds(str.__add__, st.sampled_from(PREFIXES[:-1]), TAILS)] * 20,
    st.builds(str.__add__, st.sampled_from(PREFIXES), TAILS),
    st.sampled_from(
        [
            "../outside",
            "boot/../../outside",
            "/../x",
            "modules/..",
            "modules/x\x01",
            "modules/a/../b",
            "lib/modules/v/\x7f",
        ]
    ),
).filter(bool)
TARGETS = st.lists(st.sampled_from([*PARTS[:10], "..", "..", ".", "a"]), min_size=1, max_size=5).map("/".join)
KINDS = [REGULAR] * 5 + [SYMLINK] * 3 + [LINK] * 2 + [DIRECTORY, DIRECTORY, CHARACTER, BLOCK, FIFO]


@st.composite
def members(draw: st.DrawFn) -> Entry:
    kind, name = draw(st.sampled_from(KINDS)), draw(NAMES)
    data = draw(st.binary(min_size=1, max_size=3)) if kind == REGULAR else b""
    if kind == SYMLINK:
        return Entry(name, kind=kind, link=draw(st.one_of(TARGETS, NAMES)) or "a")
    if kind == LINK:
        return Entry(name, kind=kind, link=draw(NAMES))
    return Entry(name, data, kind, mode=draw(st.sampled_from([0o644, 0o4755, 0o2777, 0])))


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    archives=st.lists(st.lists(members(), max_size=8), min_size=1, max_size=3),
    rooted=st.booleans(),
    dialect=st.sampled_from([tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]),
)
def test_arbitrary_archives_give_what_the_model_says(archives: list[list[Entry]], rooted: bool, dialect: int) -> None:
    with tempfile.TemporaryDirectory() as directory:
        outside = Path(directory, "outside")
        outside.write_bytes(b"sentinel")
        target = Path(directory, "target")
        try:
            expected = model(archives, rooted)
        except Refused:
            with pytest.raises(BangerError) as caught:
                extract(target, *(pack(*entries, dialect=dialect) for entries in archives), rooted=rooted)
            assert caught.value.message.isprintable()
            assert caught.value.code == Code.CORRUPT
        else:
            skipped = extract(target, *(pack(*entries, dialect=dialect) for entries in archives), rooted=rooted)
            assert (tree(target), skipped) == expected
        assert outside.read_bytes() == b"sentinel"
        assert {path.name for path in Path(directory).iterdir()} <= {"outside", "target"}
        assert not any(path.is_symlink() for path in target.rglob("*"))


@settings(max_examples=100, deadline=None)
@given(data=st.binary(max_size=3000), at=st.integers(0, 3000), rooted=st.booleans())
def test_arbitrary_bytes_are_refused_or_harmless(data: bytes, at: int, rooted: bool) -> None:
    good = pack(Entry("modules/a", b"x" * 600), Entry("modules/b", kind=SYMLINK, link="a"), Entry("vmlinux", b"k"))
    for damaged in (data, good[:at] + data + good[at + len(data) :]):
        with tempfile.TemporaryDirectory() as directory:
            target = Path(directory, "target")
            with contextlib.suppress(BangerError):
                extract(target, damaged, rooted=rooted)
            assert [path.name for path in Path(directory).iterdir()] == ["target"]
            assert not any(path.is_symlink() for path in target.rglob("*"))
