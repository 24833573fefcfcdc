"""Several sources make one kernel, or a clear error."""

import gzip
import lzma
import os
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest

from banger import system
from banger.api.errors import BangerError, Code
from banger.job import Job, Progress
from banger.kernelcat import importer, sources
from banger.kernelcat.sources import HOST, discover
from banger.kernelcat.staged import Found
from tests.unit.kernelcat import builders
from tests.unit.kernelcat import builders_packages as packages

MEMBERS = builders.kernel_deb_members()
IMAGE, MODULES = MEMBERS[:3], MEMBERS[3:]
KERNEL = f"boot/vmlinuz-{builders.VERSION}"
OVERLAY = f"{builders.VERSION}/kernel/fs/overlay.ko"


def found(tmp_path: Path, *contents: bytes | Path, kernel_version: str = "", job: Job | None = None) -> Found:
    """What is found in files with these contents, or in these paths."""
    given = []
    for number, content in enumerate(contents):
        if isinstance(content, bytes):
            (tmp_path / f"source-{number}").write_bytes(content)
        given.append(tmp_path / f"source-{number}" if isinstance(content, bytes) else content)
    system.remove_tree(tmp_path / "scratch")
    (tmp_path / "scratch").mkdir()
    return discover(given, tmp_path / "scratch", kernel_version, job or Job())


def refused(tmp_path: Path, *contents: bytes | Path) -> BangerError:
    with pytest.raises(BangerError) as caught:
        found(tmp_path, *contents)
    return caught.value


def assert_whole(parts: Found) -> None:
    assert parts.kernel is not None
    assert parts.modules is not None
    assert parts.kernel.stat().st_size > 0
    assert (parts.modules / OVERLAY).read_bytes() == builders.module("kernel/fs/overlay.ko")


@pytest.mark.parametrize(
    "package",
    [
        builders.deb,
        packages.apk,
        lambda members: packages.rpm(cpio(members)),
        lambda members: builders.tar(packages.arch_members(members)),
        lambda members: builders.tar(packages.xbps_members(members)),
    ],
    ids=["deb", "apk", "rpm", "arch", "void"],
)
def test_split_packages_complete_each_other(tmp_path: Path, package: Callable[..., bytes]) -> None:
    """As Ubuntu's linux-image, linux-modules and linux-modules-extra."""
    parts = found(tmp_path, package(IMAGE), package(MODULES[:4]), package(MODULES[4:]))
    assert_whole(parts)
    assert parts.kernel == tmp_path / "scratch/packages" / KERNEL
    assert parts.distro != ""
    assert parts.arch in ("amd64", "")


def cpio(members: packages.TarMembers) -> bytes:
    regular = [(member, data) for member, data in members if member.isreg()]
    return b"".join(packages.newc(member.name, data) for member, data in regular) + packages.CPIO_END


def test_package_and_directory_and_archive_complete_each_other(tmp_path: Path) -> None:
    directory = tmp_path / "modules"
    builders.module_tree(directory / "lib/modules" / builders.VERSION, builders.VIRTIO, builders.BUILTIN)
    assert_whole(found(tmp_path, builders.deb(IMAGE), directory))
    archive = lzma.compress(builders.tar(MODULES))
    assert_whole(found(tmp_path, builders.elf(), archive))
    # a single lib/modules/<version>
    parts = found(tmp_path, builders.elf(), directory / "lib/modules" / builders.VERSION)
    assert parts.modules == directory / "lib/modules" / builders.VERSION


def test_bare_kernels_in_any_packing_are_files(tmp_path: Path) -> None:
    image = builders.elf()
    for content in (image, gzip.compress(image), builders.bzimage(builders.lz4_legacy(image), len(image))):
        assert found(tmp_path, content) == Found(kernel=tmp_path / "source-0")


def test_two_of_one_part_are_refused(tmp_path: Path) -> None:
    image, other = builders.kernel_deb_members("9.9")[:3], builders.elf("9.9")
    directory = builders.kernel_directory(tmp_path / "directory")
    cases: list[tuple[bytes | Path, ...]] = [
        (builders.elf(), other),
        (builders.elf(), directory),
        (directory, directory),
        (builders.deb(IMAGE), other),
        (builders.deb(IMAGE), builders.deb(image)),
        (builders.deb(IMAGE), packages.apk(image)),
        (builders.deb(MODULES), builders.tar(MODULES), other),
    ]
    for contents in cases:
        error = refused(tmp_path, *contents)
        assert error.code is Code.INVALID
        assert "two sources hold" in error.message


def test_one_package_with_two_kernels_gives_the_wanted_one(tmp_path: Path) -> None:
    both = builders.deb([*MEMBERS, *builders.kernel_deb_members("9.9")])
    assert found(tmp_path, both).kernel == tmp_path / "scratch/packages/boot/vmlinuz-9.9"
    assert found(tmp_path, both, kernel_version=builders.VERSION).kernel == tmp_path / "scratch/packages" / KERNEL


def test_two_architectures_are_refused(tmp_path: Path) -> None:
    error = refused(tmp_path, packages.apk(IMAGE, "x86_64"), packages.apk(MODULES, "aarch64"))
    assert error.code is Code.INVALID
    assert "amd64 and arm64" in error.message


def test_sources_without_a_kernel_are_named(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for content in (builders.deb(MODULES), builders.tar(MODULES), tmp_path / "empty", tmp_path / "absent"):
        error = refused(tmp_path, content)
        assert error.code is Code.NOT_FOUND
        assert str(content if isinstance(content, Path) else tmp_path / "source-0") in error.message
    assert refused(tmp_path).code is Code.NOT_FOUND


def test_skipped_members_of_all_packages_are_counted(tmp_path: Path) -> None:
    device = builders.tar_member(f"lib/modules/{builders.VERSION}/device", kind=tarfile.CHRTYPE)
    parts = found(tmp_path, builders.deb([*IMAGE, device]), builders.deb([*MODULES, device]))
    assert parts.skipped["device"] == 2


def test_the_host_is_a_whole_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "vmlinuz").write_bytes(builders.elf())
    on_host = Found(kernel=tmp_path / "vmlinuz", distro="debian")
    monkeypatch.setattr(sources, "host_kernel", lambda: on_host)
    parts = found(tmp_path, HOST)
    assert (parts.kernel, parts.distro) == (on_host.kernel, "debian")
    assert "two sources" in refused(tmp_path, HOST, builders.elf()).message


def test_unpacking_can_be_cancelled(tmp_path: Path) -> None:
    def cancel(progress: Progress) -> None:
        if progress.done:
            job.cancel()

    job = Job(cancel)
    with pytest.raises(BangerError) as caught:
        found(tmp_path, builders.deb(MEMBERS), job=job)
    assert caught.value.code is Code.CANCELLED


def test_modules_of_an_entry_are_unpacked(tmp_path: Path) -> None:
    """Nothing is lost when an entry of the local catalog is imported again."""
    root = builders.kernel_directory(tmp_path / "root")
    importer.import_kernel(tmp_path / "kernels", "first", [root], Job())
    parts = found(tmp_path, tmp_path / "kernels/first")
    assert parts.modules is not None
    assert (parts.modules / "modules.dep").is_file()
    names = {path.relative_to(parts.modules) for path in parts.modules.rglob("*.ko")}
    tree = root / "lib/modules" / builders.VERSION
    assert names == {path.relative_to(tree) for path in tree.rglob("*.ko")} != set()


def test_devices_and_pipes_are_no_sources(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", Path("/dev/zero")):
        assert "neither a regular file nor a directory" in refused(tmp_path, path).message
