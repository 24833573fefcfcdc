"""Packages of Alpine, Arch and Void and plain archives: told by their content, taken whole or refused."""

import bz2
import contextlib
import gzip
import lzma
import random
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path

import lz4.frame
import pytest
import zstandard
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from banger.api.errors import BangerError, Code
from banger.job import Job
from banger.kernelcat.packages import Package, unpack
from tests.unit.kernelcat import builders
from tests.unit.kernelcat import builders_packages as packages

COMPRESSORS: dict[str, Callable[[bytes], bytes]] = {
    "plain": bytes,
    "gzip": gzip.compress,
    "xz": lzma.compress,
    "zstd": zstandard.ZstdCompressor().compress,
    "bzip2": bz2.compress,
    "lz4": lz4.frame.compress,
}
FILES = [
    builders.tar_member("boot/vmlinuz-virt", b"kernel"),
    builders.tar_member("lib/modules/6.6.9-0-virt/kernel/overlay.ko.gz", b"module"),
    builders.tar_member("usr/share/kernel/virt/kernel.release", b"6.6.9-0-virt"),
]
TAKEN = {"boot/vmlinuz-virt": b"kernel", "lib/modules/6.6.9-0-virt/kernel/overlay.ko.gz": b"module"}


def content(directory: Path) -> dict[str, bytes]:
    """Path to content of all files."""
    files = (path for path in sorted(directory.rglob("*")) if path.is_file())
    return {path.relative_to(directory).as_posix(): path.read_bytes() for path in files}


def unpacked(tmp_path: Path, data: bytes) -> Package | None:
    (tmp_path / "file").write_bytes(data)
    return unpack(tmp_path / "file", tmp_path / "packages", tmp_path / "archive", Job())


def refused(tmp_path: Path, data: bytes) -> BangerError:
    with pytest.raises(BangerError) as caught:
        unpacked(tmp_path, data)
    return caught.value


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("datahash", [None, ""])
def test_alpine_package(tmp_path: Path, signed: bool, datahash: str | None) -> None:
    told = unpacked(tmp_path, packages.apk(FILES, "aarch64", signed, datahash))
    assert told == Package("alpine", "arm64")
    assert content(tmp_path / "packages") == TAKEN
    assert not (tmp_path / "archive").exists()


@pytest.mark.skipif(shutil.which("openssl") is None, reason="openssl is not installed")
def test_alpine_package_made_by_tar_and_openssl(tmp_path: Path) -> None:
    """As abuild makes them: real tar segments, a real signature, extended headers in the data."""
    job, root, control = Job(), tmp_path / "root", tmp_path / "control"
    for path, data in TAKEN.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_bytes(data)
    files = gzip.compress(job.run(["tar", "--format=pax", "-C", root, "-c", "boot", "lib"]))
    (tmp_path / "data.tar.gz").write_bytes(files)
    digest = job.run(["sha256sum", tmp_path / "data.tar.gz"]).decode().split()[0]
    control.mkdir()
    (control / ".PKGINFO").write_text(f"pkgname = linux-virt\narch = x86_64\ndatahash = {digest}\n")
    info = job.run(["tar", "--format=ustar", "--blocking-factor=1", "-C", control, "-c", ".PKGINFO"])
    (tmp_path / "control.tar.gz").write_bytes(gzip.compress(info[: -2 * 512]))
    job.run(["openssl", "genrsa", "-out", tmp_path / "key", "2048"])
    signed = control / ".SIGN.RSA.key.rsa.pub"
    job.run(["openssl", "dgst", "-sha1", "-sign", tmp_path / "key", "-out", signed, tmp_path / "control.tar.gz"])
    signature = job.run(["tar", "--format=ustar", "--blocking-factor=1", "-C", control, "-c", signed.name])
    package = gzip.compress(signature[: -2 * 512]) + (tmp_path / "control.tar.gz").read_bytes() + files
    assert unpacked(tmp_path, package) == Package("alpine", "amd64")
    assert content(tmp_path / "packages") == TAKEN


def test_alpine_package_with_other_files_than_it_says_is_refused(tmp_path: Path) -> None:
    error = refused(tmp_path, packages.apk(FILES, datahash="0" * 64))
    assert error.code is Code.CORRUPT
    assert "SHA-256" in error.message
    assert not (tmp_path / "packages").exists()


@pytest.mark.parametrize("magic", [b"ADB.", b"ADBd", b"ADBc"])
def test_alpine_package_of_version_3_is_refused_with_the_way_out(tmp_path: Path, magic: bytes) -> None:
    error = refused(tmp_path, magic + bytes(100))
    assert error.code is Code.UNSUPPORTED
    assert "apk extract" in error.hint


@pytest.mark.parametrize("compress", COMPRESSORS.values(), ids=COMPRESSORS)
def test_arch_package(tmp_path: Path, compress: Callable[[bytes], bytes]) -> None:
    told = unpacked(tmp_path, compress(builders.tar(packages.arch_members(FILES))))
    assert told == Package("arch", "amd64")
    assert content(tmp_path / "packages") == TAKEN


def test_arch_package_whose_gzip_has_one_stream(tmp_path: Path) -> None:
    """Told from Alpine's, which begins with the same member in a gzip stream of its own."""
    info, *others = packages.arch_members(FILES)
    members = [builders.tar_member(".PKGINFO", b"arch = x86_64\n"), info, *others[2:]]
    assert unpacked(tmp_path, gzip.compress(builders.tar(members))) == Package("arch", "amd64")
    assert content(tmp_path / "packages") == TAKEN


def test_manjaro_is_told_by_its_packagers(tmp_path: Path) -> None:
    members = packages.arch_members(FILES, packager="Manjaro Build Server <build@manjaro.org>")
    assert unpacked(tmp_path, builders.tar(members)) == Package("manjaro", "amd64")


@pytest.mark.parametrize("compress", [COMPRESSORS["zstd"], COMPRESSORS["xz"], COMPRESSORS["gzip"]])
def test_void_package(tmp_path: Path, compress: Callable[[bytes], bytes]) -> None:
    assert unpacked(tmp_path, compress(builders.tar(packages.xbps_members(FILES)))) == Package("void", "amd64")
    assert content(tmp_path / "packages") == TAKEN


@pytest.mark.parametrize(
    "data",
    [
        packages.apk(FILES, "riscv64"),
        builders.tar(packages.arch_members(FILES, "armv7h")),
        builders.tar(packages.xbps_members(FILES, "i686")),
    ],
)
def test_foreign_architectures_are_refused(tmp_path: Path, data: bytes) -> None:
    assert refused(tmp_path, data).code is Code.UNSUPPORTED


@pytest.mark.parametrize("compress", COMPRESSORS.values(), ids=COMPRESSORS)
@pytest.mark.parametrize("above", ["", "./", "void-kernel/", "./void-kernel/"])
def test_archive_of_a_staged_directory(tmp_path: Path, compress: Callable[[bytes], bytes], above: str) -> None:
    members = [
        builders.tar_member(above or "./", kind=tarfile.DIRTYPE),
        builders.tar_member(f"{above}metadata.json", b"{}"),
        builders.tar_member(f"{above}boot/vmlinux-6.1", b"kernel"),
        builders.tar_member(f"{above}boot/again", kind=tarfile.LNKTYPE, link=f"{above}boot/vmlinux-6.1"),
        builders.tar_member(f"{above}boot/link", kind=tarfile.SYMTYPE, link="vmlinux-6.1"),
        builders.tar_member(f"{above}lib/modules/6.1/kernel/a.ko", b"module"),
    ]
    assert unpacked(tmp_path, compress(builders.tar(members))) == Package()
    kernels = dict.fromkeys(("boot/again", "boot/link", "boot/vmlinux-6.1"), b"kernel")
    assert content(tmp_path / "archive") == {
        **kernels,
        "lib/modules/6.1/kernel/a.ko": b"module",
        "metadata.json": b"{}",
    }
    assert not (tmp_path / "packages").exists()


def test_archive_in_several_compressed_streams(tmp_path: Path) -> None:
    """As pbzip2, pigz and pzstd write them."""
    whole = builders.tar(FILES)
    halves = [whole[:700], whole[700:]]
    for compress in (gzip.compress, bz2.compress, zstandard.ZstdCompressor().compress):
        assert unpacked(tmp_path, b"".join(compress(half) for half in halves)) == Package()


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"text",
        bytes(4096),
        builders.elf(),
        builders.arm64_image(),
        builders.bzimage(gzip.compress(builders.elf()), len(builders.elf())),
        *(compress(builders.elf()) for compress in COMPRESSORS.values()),
        gzip.compress(builders.elf())[:20],
        gzip.compress(b""),
        b"\x1f\x8b\x08 no gzip",
    ],
)
def test_other_files_are_left_alone(tmp_path: Path, data: bytes) -> None:
    assert unpacked(tmp_path, data) is None
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_what_packages_plant_beside_the_kernel_is_not_taken(tmp_path: Path) -> None:
    planted = [
        builders.tar_member(name, b"planted") for name in ("metadata.json", "vmlinux", "manifest.json", "modules/a.ko")
    ]
    for data in (packages.apk([*FILES, *planted]), builders.tar(packages.arch_members([*FILES, *planted]))):
        unpacked(tmp_path, data)
        assert content(tmp_path / "packages") == TAKEN


def test_devices_are_counted(tmp_path: Path) -> None:
    device = builders.tar_member("lib/modules/6.6.9-0-virt/null", kind=tarfile.CHRTYPE)
    told = unpacked(tmp_path, packages.apk([*FILES, device]))
    assert told is not None
    assert told.skipped == {"device": 1}


@pytest.mark.parametrize(
    "member",
    [
        builders.tar_member("../outside", b"x"),
        builders.tar_member("boot/../../outside", b"x"),
        builders.tar_member("boot/link", kind=tarfile.SYMTYPE, link="../../outside"),
        builders.tar_member("boot/" + "x" * 300, b"x"),
    ],
)
@pytest.mark.parametrize("first", [True, False])
def test_names_that_lead_out_condemn_the_package(
    tmp_path: Path, member: tuple[tarfile.TarInfo, bytes], first: bool
) -> None:
    members = [member, *FILES] if first else [*FILES, member]
    for data in (
        packages.apk(members),
        builders.tar(packages.arch_members(members)),
        lzma.compress(builders.tar(members)),
        builders.deb(members),
    ):
        error = refused(tmp_path, data)
        assert error.code is Code.CORRUPT
        assert error.message.startswith("file cannot be used: ")
        assert {path.name for path in tmp_path.iterdir()} <= {"file", "packages", "archive"}
        Job().run(["rm", "-rf", tmp_path / "packages", tmp_path / "archive"])


LARGE = builders.tar_member("boot/initramfs", random.Random(1).randbytes(400_000))  # several blocks for zstd
WHOLE = {
    "apk": packages.apk(FILES),
    "arch": zstandard.ZstdCompressor(write_checksum=True).compress(
        builders.tar(packages.arch_members([*FILES, LARGE]))
    ),
    "void": lzma.compress(builders.tar(packages.xbps_members(FILES))),
    "tar": builders.tar(FILES)[: -8 << 10],
}


@pytest.mark.parametrize("name", WHOLE)
def test_truncated_packages_are_refused_or_no_packages(tmp_path: Path, name: str) -> None:
    whole = WHOLE[name]
    refusals = 0
    for number, cut in enumerate([*range(1, len(whole), max(1, len(whole) // 25)), len(whole) - 1]):
        (tmp_path / "file").write_bytes(whole[:cut])
        told: Package | BangerError | None
        try:
            told = unpack(tmp_path / "file", tmp_path / f"packages-{number}", tmp_path / f"archive-{number}", Job())
        except BangerError as error:
            told = error
        if isinstance(told, BangerError):
            assert told.code is Code.CORRUPT
            refusals += 1
        else:  # cut before it can be told from a compressed kernel
            assert told is None
            assert refusals == 0
    assert refusals > 5


@given(st.sampled_from(sorted(WHOLE)), st.data())
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=150)
def test_damaged_packages_end_in_one_kind_of_error(tmp_path: Path, name: str, data: st.DataObject) -> None:
    content = bytearray(WHOLE[name])
    for _ in range(data.draw(st.integers(1, 6))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    with contextlib.suppress(BangerError):
        unpacked(tmp_path, bytes(content))
    assert {path.name for path in tmp_path.iterdir()} <= {"file", "packages", "archive"}
    Job().run(["rm", "-rf", tmp_path / "packages", tmp_path / "archive"])
