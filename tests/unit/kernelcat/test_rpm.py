"""RPM packages: real ones from rpmbuild in every compression, stripped payloads, and what damage ends in."""

import contextlib
import gzip
import hashlib
import io
import os
import shutil
import struct
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from banger.api.errors import BangerError, Code
from banger.disk import tar
from banger.disk.tar import Member
from banger.job import Job
from banger.kernelcat.packages import unpack
from banger.kernelcat.rpm import CpioReader, Header, read_rpm
from tests.unit.kernelcat import builders
from tests.unit.kernelcat import builders_packages as packages

RELEASE = "6.12.4-1.fc99.x86_64"


def read(payload: bytes, limit: int = 1 << 20) -> list[tuple[Member, bytes]]:
    reader = CpioReader(io.BytesIO(payload), "the payload", limit)
    return [(member, b"".join(reader.data())) for member in reader]


def content(directory: Path) -> dict[str, bytes]:
    """Path to content of all files."""
    files = (path for path in sorted(directory.rglob("*")) if path.is_file())
    return {path.relative_to(directory).as_posix(): path.read_bytes() for path in files}


def unpacked(tmp_path: Path, data: bytes) -> dict[str, bytes]:
    (tmp_path / "kernel.rpm").write_bytes(data)
    shutil.rmtree(tmp_path / "packages", ignore_errors=True)
    assert unpack(tmp_path / "kernel.rpm", tmp_path / "packages", tmp_path / "archive", Job()) is not None
    return content(tmp_path / "packages")


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """What Fedora's kernel-core holds, with a hard link and a symlink."""
    tree = builders.module_tree(tmp_path / "tree/lib/modules" / RELEASE, builders.VIRTIO, builders.BUILTIN)
    (tree / "vmlinuz").write_bytes(builders.elf(RELEASE))
    (tree / "config").write_text("CONFIG_SMP=y\n")
    os.link(tree / "kernel/fs/overlay.ko", tree / "kernel/fs/again.ko")
    os.link(tree / "kernel/fs/overlay.ko", tree / "kernel/aardvark.ko")
    (tree / "link.ko").symlink_to("kernel/fs/overlay.ko")
    return tmp_path / "tree"


@pytest.mark.skipif(shutil.which("rpmbuild") is None, reason="rpmbuild is not installed")
@pytest.mark.parametrize(
    "payload", ["w9.gzdio", "w6.xzdio", "w6T2.xzdio", "w3.zstdio", "w9.bzdio", "w6.lzdio", "w.ufdio"]
)
def test_real_packages_give_their_files(tmp_path: Path, tree: Path, payload: str) -> None:
    package = packages.build_rpm(tmp_path, tree, payload)
    told = unpack(package, tmp_path / "packages", tmp_path / "archive", Job())
    assert told is not None
    assert (told.distro, told.arch) == ("fedora", "amd64")
    assert content(tmp_path / "packages") == content(tree)
    assert content(tree)[f"lib/modules/{RELEASE}/kernel/aardvark.ko"] != b""


@pytest.mark.skipif(shutil.which("rpmbuild") is None, reason="rpmbuild is not installed")
def test_real_packages_fail_at_every_cut_and_changed_byte(tmp_path: Path, tree: Path) -> None:
    data = packages.build_rpm(tmp_path, tree, "w9.gzdio").read_bytes()
    signature = 96 + 16
    (entries, size) = struct.unpack_from(">II", data, 96 + 8)
    header = (signature + entries * 16 + size + 7) // 8 * 8
    for cut in [*range(0, len(data), 97), len(data) - 1]:
        (tmp_path / "cut.rpm").write_bytes(data[:cut])
        if cut >= 4:
            with pytest.raises(BangerError) as caught:
                unpack(tmp_path / "cut.rpm", tmp_path / f"cut-{cut}", tmp_path / "archive", Job())
            assert caught.value.code is Code.CORRUPT
            assert caught.value.message.startswith("cut.rpm cannot be used: ")
    for position in range(header, len(data), 101):
        changed = bytearray(data)
        changed[position] ^= 0x10
        (tmp_path / "changed.rpm").write_bytes(changed)
        with pytest.raises(BangerError) as caught:
            read_rpm(tmp_path / "changed.rpm", Job())
        assert caught.value.code is Code.CORRUPT, position


@pytest.mark.parametrize(
    ("vendor", "distribution", "distro"),
    [
        ("Fedora Project", "Fedora Project", "fedora"),
        ("Red Hat, Inc.", "", "rhel"),
        ("CentOS", "CentOS Stream", "centos"),
        ("Rocky Enterprise Software Foundation", "", "rocky"),
        ("AlmaLinux", "AlmaLinux 9", "almalinux"),
        ("openSUSE", "openSUSE Tumbleweed", "opensuse-tumbleweed"),
        ("SUSE LLC <https://www.suse.com/>", "SUSE Linux Enterprise 15", "sles"),
        ("Amazon Linux", "", "amzn"),
        ("Somebody", "", ""),
    ],
)
def test_distribution_is_told_by_vendor(tmp_path: Path, vendor: str, distribution: str, distro: str) -> None:
    (tmp_path / "kernel.rpm").write_bytes(packages.rpm(packages.CPIO_END, {1010: distribution, 1011: vendor}))
    told = unpack(tmp_path / "kernel.rpm", tmp_path / "packages", tmp_path / "archive", Job())
    assert told is not None
    assert told.distro == distro


def test_foreign_architecture_source_package_and_delta_are_refused(tmp_path: Path) -> None:
    good = packages.rpm(packages.CPIO_END)
    source = good[:6] + b"\0\1" + good[8:]
    for data, word in (
        (packages.rpm(packages.CPIO_END, {1022: "ppc64le"}), "'ppc64le'"),
        (packages.rpm(packages.CPIO_END, {1124: "drpm"}), "'drpm'"),
        (source, "source package"),
    ):
        with pytest.raises(BangerError) as caught:
            unpacked(tmp_path, data)
        assert caught.value.code is Code.UNSUPPORTED
        assert word in caught.value.message


def test_digests_of_old_and_new_packages_are_checked(tmp_path: Path) -> None:
    payload = gzip.compress(packages.newc("./boot/vmlinuz-1", b"kernel") + packages.CPIO_END)
    tags: dict[int, packages.RpmValue] = {5092: [""], 5093: [8]}
    header = packages.rpm_header(
        {1000: "kernel-core", 1010: "", 1011: "Fedora Project", 1022: "x86_64", 1124: "cpio", **tags}
    )
    sha1 = hashlib.sha1(header, usedforsecurity=False).hexdigest()
    md5 = hashlib.md5(header + payload, usedforsecurity=False).digest()
    # as RPM wrote them before 4.14
    assert unpacked(tmp_path, packages.rpm(payload, tags, {269: sha1, 1004: md5})) == {"boot/vmlinuz-1": b"kernel"}
    for wrong, word in (
        (packages.rpm(payload, tags, {269: sha1, 1004: bytes(16)}), "MD5 of its payload"),
        (packages.rpm(payload, tags, {269: "0" * 40, 1004: md5}), "sha1 of its header"),
        (packages.rpm(payload, {5092: ["0" * 64]}), "sha256 of its payload"),
        (packages.rpm(payload, None, {273: "0" * 64}), "sha256 of its header"),
    ):
        with pytest.raises(BangerError, match=word) as caught:
            unpacked(tmp_path, wrong)
        assert caught.value.code is Code.CORRUPT


def stripped_tags() -> dict[int, packages.RpmValue]:
    """Four files: hard links, of which the last has the data, a ghost that is not in the payload, and a symlink."""
    names = ["a.ko", "b.ko", "ghost", "link"]
    return {
        1117: names,
        1118: ["/lib/modules/6.12.4/"],
        1116: [0, 0, 0, 0],
        1030: [0o100644, 0o100644, 0o100644, 0o120777],
        1037: [0, 0, 1 << 6, 0],
        5008: [6, 6, 6, 4],
        1095: [1, 1, 1, 1],
        1096: [7, 7, 7, 8],
    }


def test_stripped_payload_takes_names_from_the_header(tmp_path: Path) -> None:
    """Of packages with files of more than 4 GB (RPM's manual, "Payload")."""
    payload = packages.stripped(0) + packages.stripped(1, b"module") + packages.stripped(3, b"a.ko") + packages.CPIO_END
    assert unpacked(tmp_path, packages.rpm(payload, stripped_tags())) == {
        f"lib/modules/6.12.4/{name}": b"module" for name in ("a.ko", "b.ko", "link")
    }


@pytest.mark.parametrize(
    "change",
    [
        {1117: ["a.ko"]},
        {1116: [0, 0, 0, 9]},
        {1118: []},
        {5008: [6]},
        {1118: ["/lib/modules/../../etc/"]},
        {1030: "text"},
        {1117: [1, 2, 3, 4]},
    ],
)
def test_stripped_payload_with_a_wrong_header_is_refused(tmp_path: Path, change: dict[int, packages.RpmValue]) -> None:
    payload = packages.stripped(0) + packages.stripped(1, b"module") + packages.CPIO_END
    with pytest.raises(BangerError) as caught:
        unpacked(tmp_path, packages.rpm(payload, {**stripped_tags(), **change}))
    assert caught.value.code is Code.CORRUPT


def test_members_of_every_kind() -> None:
    payload = (
        packages.newc("./boot", mode=0o040755)
        + packages.newc("./boot/file", b"12345")
        + packages.newc("./boot/link", b"file", mode=0o120777)
        + packages.newc("./dev/null", mode=0o020666)
        + packages.newc("./run/fifo", mode=0o010600)
        + packages.newc("./first", inode=5, links=2)
        + packages.newc("./last", b"data", inode=5, links=2)
        + packages.newc("./empty-1", inode=6, links=2)
        + packages.newc("./empty-2", inode=6, links=2)
        + packages.CPIO_END
    )
    assert [(member.path, member.kind, member.link, data) for member, data in read(payload)] == [
        (b"boot", tar.DIRECTORY, b"", b""),
        (b"boot/file", tar.REGULAR, b"", b"12345"),
        (b"boot/link", tar.SYMLINK, b"file", b""),
        (b"dev/null", tar.CHARACTER, b"", b""),
        (b"run/fifo", tar.FIFO, b"", b""),
        (b"last", tar.REGULAR, b"", b"data"),
        (b"first", tar.HARD_LINK, b"last", b""),
        (b"empty-1", tar.REGULAR, b"", b""),
        (b"empty-2", tar.HARD_LINK, b"empty-1", b""),
    ]


@pytest.mark.parametrize(
    ("payload", "word"),
    [
        (packages.newc("../etc/passwd", b"x"), "unusable"),
        (packages.newc("/etc/passwd", b"x"), "unusable"),
        (packages.newc(b"a\0b", b"x"), "unusable"),
        (packages.newc("x" * 300, b"x"), "longer"),
        (packages.newc("x/" * 3000, b"x"), "name of"),
        (packages.newc("file", size=0xFFFFFFFF), "unpacks to more"),
        (packages.newc("file", size=1000), "cut off"),
        (packages.newc("link", mode=0o120777), "unusable target"),
        (packages.newc("link", b"a\0b", mode=0o120777), "unusable target"),
        (packages.newc("link", b"x" * 5000, mode=0o120777), "unusable target"),
        (packages.newc("directory", b"x", mode=0o040755), "not a file"),
        (packages.newc("socket", mode=0o140755), "unsupported type"),
        (packages.newc("file").replace(b"070701", b"070702"), "does not begin"),
        (packages.newc("file").replace(b"000081a4", b"-00081a4"), "not a number"),
        (packages.newc("file").replace(b"000081a4", b"0x0081a4"), "not a number"),
        (packages.stripped(0), "number 0 of 0"),
        (b"", "cut off"),
    ],
)
def test_malformed_archives_are_refused(payload: bytes, word: str) -> None:
    with pytest.raises(BangerError, match=word) as caught:
        read(payload)
    assert caught.value.code is Code.CORRUPT


def test_waiting_hard_links_and_lists_are_bounded() -> None:
    names = (packages.newc(f"{number:05}/" + "x/" * 2000, inode=1, links=2) for number in range(5000))
    with pytest.raises(BangerError, match="too many hard links"):
        read(b"".join(names), limit=1 << 30)
    header = Header(io.BytesIO(image := packages.rpm_header({1: [0] * 200_001, 2: [""] * 200_001, 3: [7]})), len(image))
    assert header.numbers(3) == (7,)
    for read_tag in (lambda: header.numbers(1), lambda: header.texts(2)):
        with pytest.raises(BangerError, match="damaged"):
            read_tag()


def oversized(entries: int, size: int) -> bytes:
    return packages.RPM_LEAD + b"\x8e\xad\xe8\x01" + bytes(4) + struct.pack(">II", entries, size) + bytes(1000)


def entry(tag: int, kind: int, offset: int, count: int) -> bytes:
    """A package whose header has one entry, which promises what is not there."""
    header = (
        b"\x8e\xad\xe8\x01"
        + bytes(4)
        + struct.pack(">II", 1, 4)
        + struct.pack(">IIII", tag, kind, offset, count)
        + b"abcd"
    )
    return packages.RPM_LEAD + packages.rpm_header({}) + header


@pytest.mark.parametrize(
    "data",
    [
        oversized(0xFFFFFFFF, 0),
        oversized(0, 0xFFFFFFFF),
        oversized(0x10000, 16),
        oversized(10, 10_000),
        entry(1022, 6, 0, 1),
        entry(1022, 6, 0xFFFFFFFF, 1),
        entry(1022, 8, 0, 0xFFFFFFFF),
        entry(1022, 99, 0, 1),
        entry(1022, 4, 0, 1),
        entry(5093, 4, 1, 1),
        entry(5093, 4, 0xFFFFFFFC, 1),
        entry(5093, 5, 0, 0x20000000),
        entry(5093, 6, 0, 1),
        packages.RPM_LEAD,
        packages.RPM_LEAD + bytes(200),
    ],
)
def test_headers_that_promise_what_is_not_there_are_refused(tmp_path: Path, data: bytes) -> None:
    with pytest.raises(BangerError) as caught:
        unpacked(tmp_path, data)
    assert caught.value.code is Code.CORRUPT


Mutation = Callable[[bytearray], None]


@st.composite
def mutations(draw: st.DrawFn, size: int) -> Sequence[tuple[int, bytes]]:
    places = st.tuples(
        st.integers(0, size - 1),
        st.sampled_from([b"\0", b"\xff", b"\xff\xff\xff\xff", b"\x7f", b"0", b"/", b"\x80\0\0\0"]),
    )
    return draw(st.lists(places, min_size=1, max_size=5))


WHOLE = packages.rpm(
    packages.newc("./boot/vmlinuz-1", b"kernel", inode=1, links=2)
    + packages.newc("./boot/same", inode=1, links=2)
    + packages.newc("./boot/link", b"same", mode=0o120777)
    + packages.stripped(1, b"module")
    + packages.CPIO_END,
    {**stripped_tags(), 5092: [""]},
    {},
)


@given(mutations(len(WHOLE)), st.integers(0, len(WHOLE)))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=300)
def test_damaged_packages_end_in_one_kind_of_error(
    tmp_path: Path, changes: Sequence[tuple[int, bytes]], cut: int
) -> None:
    """Without digests, so that the damage gets as far as it can."""
    data = bytearray(WHOLE)
    for position, value in changes:
        data[position : position + len(value)] = value
    data = data[:cut] if cut % 3 == 0 else data
    data[:8] = WHOLE[:8]
    with contextlib.suppress(BangerError):
        unpacked(tmp_path, bytes(data))
    assert {path.name for path in tmp_path.iterdir()} <= {"kernel.rpm", "packages"}


def test_the_package_that_is_damaged_above_is_good(tmp_path: Path) -> None:
    assert unpacked(tmp_path, WHOLE)["boot/vmlinuz-1"] == b"kernel"
