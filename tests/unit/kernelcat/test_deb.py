"""Debian packages: what is found in them, and what damage ends in."""

import contextlib
import gzip
import lzma
import os
import tarfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from banger.api.errors import BangerError, Code
from banger.job import Job
from banger.kernelcat import streams
from banger.kernelcat.deb import read_deb
from banger.kernelcat.packages import Package, unpack
from tests.unit.kernelcat import builders

CONTROL = b"Package: linux-image-6.1\nArchitecture: arm64\nMaintainer: Debian Kernel Team\nDescription: a\n b: c\n"


def control(text: bytes = CONTROL) -> tuple[str, bytes]:
    return "control.tar.xz", lzma.compress(builders.tar([builders.tar_member("./control", text)]))


def data(suffix: str = ".xz") -> tuple[str, bytes]:
    members = [builders.tar_member("./boot/vmlinuz-6.1", b"kernel")]
    return f"data.tar{suffix}", lzma.compress(builders.tar(members))


DEBIAN = ("debian-binary", b"2.0\n")


def package(tmp_path: Path, *members: tuple[str, bytes]) -> Path:
    (tmp_path / "linux.deb").write_bytes(builders.ar(members))
    return tmp_path / "linux.deb"


def unpacked(file: Path, target: str = "packages") -> Package:
    told = unpack(file, file.parent / target, file.parent / "archive", Job())
    assert told is not None
    return told


def test_fields_and_data_are_found(tmp_path: Path) -> None:
    fields, section = read_deb(package(tmp_path, DEBIAN, control(), data()), Job())
    assert fields["Package"] == "linux-image-6.1"
    assert fields["Architecture"] == "arm64"
    assert " b" not in fields
    assert section.head(5) == lzma.compress(b"")[:5]


@pytest.mark.parametrize(
    ("maintainer", "architecture", "told"),
    [
        ("Debian Kernel Team <debian-kernel@lists.debian.org>", "amd64", Package("debian", "amd64")),
        ("Ubuntu Kernel Team <kernel-team@lists.ubuntu.com>", "arm64", Package("ubuntu", "arm64")),
        ("Somebody", "all", Package("debian", "")),
    ],
)
def test_distribution_and_architecture_are_told(
    tmp_path: Path, maintainer: str, architecture: str, told: Package
) -> None:
    text = f"Package: linux\nMaintainer: {maintainer}\nArchitecture: {architecture}\n".encode()
    assert unpacked(package(tmp_path, DEBIAN, control(text), data())) == told


def test_foreign_architecture_is_named(tmp_path: Path) -> None:
    with pytest.raises(BangerError, match="'riscv64'") as caught:
        unpacked(package(tmp_path, DEBIAN, control(b"Architecture: riscv64\n"), data()))
    assert caught.value.code is Code.UNSUPPORTED


def test_compression_is_told_by_content_and_members_may_follow(tmp_path: Path) -> None:
    """deb(5): further members after data.tar are ignored; then it is not the end of the file that ends it."""
    unpacked(package(tmp_path, DEBIAN, control(), data(".gz"), ("_gpgorigin", b"signature")))
    assert (tmp_path / "packages/boot/vmlinuz-6.1").read_bytes() == b"kernel"


@pytest.mark.parametrize("without", [True, False])
def test_the_xz_command_and_the_library_agree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, without: bool) -> None:
    """Over several blocks, as dpkg writes large packages."""
    content = os.urandom(3 << 20)
    (tmp_path / "data.tar").write_bytes(builders.tar([builders.tar_member("boot/vmlinuz-6.1", content)]))
    Job().run(["xz", "--block-size=1MiB", tmp_path / "data.tar"])
    file = package(tmp_path, DEBIAN, control(), ("data.tar.xz", (tmp_path / "data.tar.xz").read_bytes()))
    if without:
        monkeypatch.setenv("PATH", str(tmp_path))
        monkeypatch.setattr("banger.hostpackages._ADMIN_DIRECTORIES", str(tmp_path))
    unpacked(file)
    assert (tmp_path / "packages/boot/vmlinuz-6.1").read_bytes() == content


@pytest.mark.parametrize(
    "members",
    [
        [],
        [DEBIAN],
        [DEBIAN, control()],
        [DEBIAN, data()],
        [DEBIAN, control(), data(), data()],
        [DEBIAN, control(), data(".xz"), data(".gz")],
        [DEBIAN, control(), ("data.tar.xz", b"")],
        [DEBIAN, control(), ("data.tar.xz", lzma.compress(b"no tar" * 1000))],
        [DEBIAN, ("control.tar.gz", gzip.compress(b"no tar" * 1000)), data()],
        [DEBIAN, ("control.tar.gz", gzip.compress(builders.tar([]))[:-4]), data()],
        [DEBIAN, control(), ("data.tar", builders.tar([]) + b"something behind the end")],
        [(f"member-{number}", b"") for number in range(100)],
    ],
)
def test_what_is_no_whole_package_is_refused(tmp_path: Path, members: list[tuple[str, bytes]]) -> None:
    with pytest.raises(BangerError) as caught:
        unpacked(package(tmp_path, *members))
    assert caught.value.code is Code.CORRUPT
    assert caught.value.message.startswith("linux.deb cannot be used: ")


@pytest.mark.parametrize("size", [b"-1        ", b"1e3       ", b"          ", b"9999999999", b"\xb2         "])
def test_impossible_sizes_are_refused(tmp_path: Path, size: bytes) -> None:
    file = package(tmp_path, DEBIAN, control(), data())
    content = bytearray(file.read_bytes())
    content[8 + 48 : 8 + 58] = size
    file.write_bytes(content)
    with pytest.raises(BangerError) as caught:
        unpacked(file)
    assert caught.value.code is Code.CORRUPT


def test_bombs_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content = bytes(32 << 20)
    file = package(tmp_path, DEBIAN, control(), ("data.tar.xz", lzma.compress(content)))
    section = read_deb(file, Job())[1]
    with (
        pytest.raises(BangerError, match="unpacks to more") as caught,
        streams.open_stream(section, Job(), limit=8 << 20) as stream,
    ):
        stream.read(1)
    assert caught.value.code is Code.CORRUPT


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE])
def test_links_in_a_package_are_never_followed(tmp_path: Path, kind: bytes) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "file").write_text("untouched")
    file = tmp_path / "linux.deb"
    members = [
        builders.tar_member("lib/modules/6.1/way", kind=kind, link=str(outside)),
        builders.tar_member("lib/modules/6.1/way/file", b"overwritten"),
        builders.tar_member("boot/vmlinuz-6.1", kind=kind, link=str(outside / "file")),
        builders.tar_member("boot/vmlinuz-6.1", builders.elf("6.1")),
    ]
    file.write_bytes(builders.deb(members))
    with contextlib.suppress(BangerError):
        unpacked(file)
    assert (outside / "file").read_text() == "untouched"
    assert [path.name for path in outside.iterdir()] == ["file"]


PACKAGE = builders.deb(builders.kernel_deb_members(), ".gz")


@pytest.mark.parametrize("suffix", [".gz", ".xz", ".zst"])
def test_truncated_packages_are_refused(tmp_path: Path, suffix: str) -> None:
    whole = builders.deb(builders.kernel_deb_members(), suffix)
    file = tmp_path / "linux.deb"
    for number, cut in enumerate([*range(8, len(whole), max(1, len(whole) // 15)), len(whole) - 2]):
        file.write_bytes(whole[:cut])
        with pytest.raises(BangerError) as caught:
            unpacked(file, f"packages-{number}")
        assert caught.value.code is Code.CORRUPT, cut


@given(st.data())
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=100)
def test_damaged_packages_end_in_one_kind_of_error(tmp_path: Path, draw: st.DataObject) -> None:
    """Both the outer archive and, without a checksum in between, the inner one."""
    inner = draw.draw(st.booleans())
    content = bytearray(builders.tar(builders.kernel_deb_members()) if inner else PACKAGE)
    for _ in range(draw.draw(st.integers(1, 6))):
        content[draw.draw(st.integers(0 if inner else 8, len(content) - 1))] = draw.draw(st.integers(0, 255))
    file = tmp_path / "linux.deb"
    file.write_bytes(builders.ar([DEBIAN, control(), ("data.tar", bytes(content))]) if inner else content)
    with contextlib.suppress(BangerError):
        unpack(file, tmp_path / "target", tmp_path / "archive", Job())
    assert {path.name for path in tmp_path.iterdir()} <= {"linux.deb", "target"}
    if (tmp_path / "target").is_dir():
        Job().run(["rm", "-rf", tmp_path / "target"])
