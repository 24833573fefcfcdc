"""Kernels are imported from packages, directories and files; hostile ones leave nothing behind."""

import contextlib
import gzip
import itertools
import json
import os
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from banger import system
from banger.api.errors import BangerError, Code
from banger.job import Job, Progress
from banger.kernelcat import manifest
from banger.kernelcat.importer import Claims, import_kernel
from tests.children import child
from tests.unit.kernelcat import builders

NO_CLAIMS = Claims()


def import_one(tmp_path: Path, *sources: Path, claims: Claims = NO_CLAIMS) -> manifest.KernelManifest:
    return import_kernel(tmp_path / "kernels", "mine", list(sources), Job(), claims=claims)


def refused(tmp_path: Path, *sources: Path, claims: Claims = NO_CLAIMS) -> BangerError:
    """The error of an import that must leave nothing."""
    with pytest.raises(BangerError) as caught:
        import_one(tmp_path, *sources, claims=claims)
    assert list((tmp_path / "kernels").iterdir()) == []
    return caught.value


def squashfs_listing(image: Path) -> dict[str, str]:
    """Path to 'kind mode uid gid' of each member."""
    lines = subprocess.run(["rdsquashfs", "-d", image], check=True, capture_output=True, text=True).stdout.splitlines()
    words = [line.split() for line in lines if line]
    return {word[1].strip('"').lstrip("/"): " ".join([word[0], *word[2:5]]) for word in words}


@pytest.mark.parametrize("suffix", [".xz", ".gz", ".zst", ""])
@pytest.mark.parametrize("modules", ["lib/modules", "usr/lib/modules"])
def test_package_becomes_an_entry(tmp_path: Path, suffix: str, modules: str) -> None:
    package = tmp_path / "linux.deb"
    package.write_bytes(builders.deb(builders.kernel_deb_members(modules=modules), suffix))
    imported = import_one(tmp_path, package, claims=Claims(source="deb:linux=1"))
    assert imported == manifest.read_local(tmp_path / "kernels", "mine")
    assert (imported.kernel_version, imported.distro, imported.source) == (builders.VERSION, "debian", "deb:linux=1")
    entry = tmp_path / "kernels/mine"
    assert (entry / "vmlinux").read_bytes() == builders.elf()
    assert sorted(path.name for path in entry.iterdir()) == [
        "boot-modules.cpio",
        "manifest.json",
        "modules.squashfs",
        "vmlinux",
    ]
    members = squashfs_listing(entry / "modules.squashfs")
    assert members["kernel/fs/overlay.ko"] == "file 0644 0 0"
    assert members["modules.dep"] == "file 0644 0 0"
    assert "build" not in members
    assert "boot" not in members


def test_directory_takes_the_newest_kernel_and_what_belongs_to_it(tmp_path: Path) -> None:
    for version in ("6.1.0-9-test", "6.1.0-10-test"):
        directory = builders.kernel_directory(tmp_path / "stage", version)
        (directory / f"boot/initramfs-{version}.img").write_text(f"initrd of {version}")
    imported = import_one(tmp_path, tmp_path / "stage")
    assert imported.kernel_version == "6.1.0-10-test"
    assert (tmp_path / "kernels/mine/initrd.img").read_text() == "initrd of 6.1.0-10-test"
    older_one = Claims(kernel_version="6.1.0-9-test")
    older = import_kernel(tmp_path / "kernels", "old", [tmp_path / "stage"], Job(), claims=older_one)
    assert older.kernel_version == "6.1.0-9-test"
    assert (tmp_path / "kernels/old/initrd.img").read_text() == "initrd of 6.1.0-9-test"


def metadata_directory(root: Path, **changes: object) -> Path:
    builders.module_tree(root / "modules/tree", builders.VIRTIO, builders.BUILTIN)
    (root / "vmlinux").write_bytes(builders.elf())
    (root / "initrd").write_text("initrd")
    fields = {
        "distro": "void",
        "arch": "x86_64",
        "kernel_version": builders.VERSION,
        "kernel": "vmlinux",
        "initrd": "initrd",
        "modules": "modules/tree",
    }
    (root / "metadata.json").write_text(json.dumps({**fields, **changes}))
    return root


def test_metadata_comes_before_the_search(tmp_path: Path) -> None:
    directory = metadata_directory(tmp_path / "stage")
    (directory / "boot").mkdir()
    (directory / "boot/vmlinux-9.9").write_bytes(builders.elf("9.9"))
    imported = import_one(tmp_path, directory)
    assert (imported.distro, imported.arch, imported.kernel_version) == ("void", "amd64", builders.VERSION)
    assert (tmp_path / "kernels/mine/initrd.img").read_text() == "initrd"
    assert imported.source == f"import:{directory}"


@pytest.mark.parametrize(
    "changes",
    [
        {"kernel": "../outside"},
        {"initrd": "/etc/hostname"},
        {"modules": "link"},
        {"kernel": "modules"},
        {"kernel": ""},
        {"arch": "mips"},
        {"arch": "arm64"},
        {"kernel_version": "6.2"},
        {"kernel_version": "../x"},
        {"distro": ["void"]},
    ],
)
def test_wrong_metadata_is_refused(tmp_path: Path, changes: dict[str, object]) -> None:
    (tmp_path / "outside").write_bytes(builders.elf())
    directory = metadata_directory(tmp_path / "stage", **changes)
    (directory / "link").symlink_to(tmp_path)
    assert refused(tmp_path, directory).code in (Code.CORRUPT, Code.INVALID)


def test_links_in_a_directory_do_not_lead_out(tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("secret")
    directory = builders.kernel_directory(tmp_path / "stage")
    (directory / "lib/modules" / builders.VERSION / "secret").symlink_to(secret)
    import_one(tmp_path, directory)
    assert "secret" not in squashfs_listing(tmp_path / "kernels/mine/modules.squashfs")
    manifest.delete_local(tmp_path / "kernels", "mine")
    for part in (f"lib/modules/{builders.VERSION}", "lib", f"boot/vmlinux-{builders.VERSION}", "boot"):
        path, outside = directory / part, tmp_path / "outside"
        path.rename(outside)
        path.symlink_to(outside)
        assert "inside" in refused(tmp_path, directory).message, part
        path.unlink()
        outside.rename(path)
    import_one(tmp_path, directory)


@pytest.mark.parametrize("pack", [bytes, gzip.compress])
def test_configuration_answers_what_modules_do_not(tmp_path: Path, pack: Callable[[bytes], bytes]) -> None:
    directory = builders.kernel_directory(tmp_path / "stage")
    options = b"CONFIG_BLK_DEV_INITRD=y\nCONFIG_DEVTMPFS=y\nCONFIG_SQUASHFS_LZ4=y\n"
    (directory / f"boot/config-{builders.VERSION}").write_bytes(pack(options))
    assert import_one(tmp_path, directory).unknown == ()
    assert (tmp_path / "kernels/mine/config").read_bytes() == options


def test_bare_kernel_files(tmp_path: Path) -> None:
    vmlinuz = tmp_path / "vmlinuz"
    image = builders.elf(pvh=False)
    vmlinuz.write_bytes(builders.bzimage(builders.lz4_legacy(image), len(image)))
    imported = import_one(tmp_path, vmlinuz)
    assert not imported.modules
    assert not imported.pvh
    # QEMU refuses an ELF without the note, so the bzImage stays
    firecracker, qemu = manifest.kernel_paths(tmp_path / "kernels/mine")
    assert firecracker.read_bytes() == image
    assert qemu.read_bytes() == vmlinuz.read_bytes()


def test_kernel_and_modules_from_separate_packages(tmp_path: Path) -> None:
    members = builders.kernel_deb_members()
    for name, part in (("image", members[:3]), ("modules", members[3:])):
        (tmp_path / f"{name}.deb").write_bytes(builders.deb(part))
    imported = import_one(tmp_path, tmp_path / "image.deb", tmp_path / "modules.deb")
    assert imported.modules
    assert len(imported.boot_modules) == len(builders.VIRTIO)


def test_two_kernels_at_once_are_refused(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).write_bytes(builders.elf())
    assert "two sources" in refused(tmp_path, tmp_path / "a", tmp_path / "b").message


def test_modules_of_another_version_are_refused(tmp_path: Path) -> None:
    kernel = tmp_path / "vmlinux"
    kernel.write_bytes(builders.elf("7.7.7"))
    modules = builders.kernel_directory(tmp_path / "stage")
    (modules / f"boot/vmlinux-{builders.VERSION}").unlink()
    error = refused(tmp_path, kernel, modules)
    assert "'7.7.7'" in error.message
    assert builders.VERSION in error.message


def test_kernel_that_boots_no_guest_is_refused(tmp_path: Path) -> None:
    directory = builders.kernel_directory(tmp_path / "stage")
    tree = {path: needs for path, needs in builders.VIRTIO.items() if "overlay" not in path}
    builders.module_tree(directory / "lib/modules" / builders.VERSION, tree, builders.BUILTIN)
    error = refused(tmp_path, directory)
    assert error.code is Code.UNSUPPORTED
    assert "overlay (CONFIG_OVERLAY_FS)" in error.message


@pytest.mark.parametrize("content", [b"", b"text", b"!<arch>\n", b"\x7fELF", b"MZ\0\0zimg"])
def test_what_is_no_kernel_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "file").write_bytes(content)
    refusals = (Code.INVALID, Code.CORRUPT, Code.NOT_FOUND, Code.UNSUPPORTED)
    assert refused(tmp_path, tmp_path / "file").code in refusals


def test_empty_directories_and_missing_files_are_named(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for source in (tmp_path / "empty", tmp_path / "absent"):
        error = refused(tmp_path, source)
        assert error.code is Code.NOT_FOUND
        assert str(source) in error.message


def test_wrong_claims_are_refused(tmp_path: Path) -> None:
    (tmp_path / "vmlinux").write_bytes(builders.elf())
    assert "'arm64'" in refused(tmp_path, tmp_path / "vmlinux", claims=Claims(arch="arm64")).message
    assert "'5.0'" in refused(tmp_path, tmp_path / "vmlinux", claims=Claims(kernel_version="5.0")).message


def test_names_are_taken_once_unless_replaced(tmp_path: Path) -> None:
    kernels = tmp_path / "kernels"
    for name, version in (("old", "6.1"), ("new", "6.2")):
        (tmp_path / name).write_bytes(builders.elf(version))
    import_one(tmp_path, tmp_path / "old")
    with pytest.raises(BangerError, match="exists already") as caught:
        import_one(tmp_path, tmp_path / "new")
    assert caught.value.code is Code.EXISTS
    assert "--force" in caught.value.hint
    assert manifest.read_local(kernels, "mine").kernel_version == "6.1"
    import_kernel(kernels, "mine", [tmp_path / "new"], Job(), replace=True)
    assert manifest.read_local(kernels, "mine").kernel_version == "6.2"
    assert [path.name for path in kernels.iterdir()] == ["mine"]


def test_lock_is_held_only_around_the_publication(tmp_path: Path) -> None:
    """Whoever takes the name while another import builds wins, and the later one is refused under the lock."""
    (tmp_path / "vmlinux").write_bytes(builders.elf())
    kernels = tmp_path / "kernels"
    stages: list[str] = []

    @contextlib.contextmanager
    def publishing() -> Iterator[None]:
        stages.append("locked")
        (kernels / "mine").mkdir()
        yield

    def report(progress: Progress) -> None:
        stages.append(progress.stage)

    with pytest.raises(BangerError, match="exists already"):
        import_kernel(kernels, "mine", [tmp_path / "vmlinux"], Job(report), publishing=publishing)
    assert stages[-2:] == ["publish", "locked"]
    assert [path.name for path in kernels.iterdir()] == ["mine"]


def test_planted_entry_files_are_not_taken(tmp_path: Path) -> None:
    directory = builders.kernel_directory(tmp_path / "stage")
    for name in ("manifest.json", "boot-0123456789ab.cpio", "boot-modules.cpio"):
        (directory / name).write_text("planted")
    import_one(tmp_path, directory)
    entry = tmp_path / "kernels/mine"
    assert not (entry / "boot-0123456789ab.cpio").exists()
    assert (entry / "boot-modules.cpio").read_bytes().startswith(b"070701")
    assert manifest.read_local(tmp_path / "kernels", "mine").source.startswith("import:")


def test_cancelling_leaves_nothing(tmp_path: Path) -> None:
    package = tmp_path / "linux.deb"
    package.write_bytes(builders.deb(builders.kernel_deb_members()))

    def cancel_while_packing(progress: Progress) -> None:
        if progress.stage == "pack modules":
            job.cancel()

    job = Job(cancel_while_packing)
    with pytest.raises(BangerError) as caught:
        import_kernel(tmp_path / "kernels", "mine", [package], job)
    assert caught.value.code is Code.CANCELLED
    assert list((tmp_path / "kernels").iterdir()) == []


def import_until_killed(kernels: Path, package: Path, survive: int) -> None:
    """Import a kernel, and kill this process at a progress report after `survive` others."""

    def kill(progress: Progress) -> None:
        nonlocal survive
        survive -= 1
        if survive < 0:
            os.kill(os.getpid(), signal.SIGKILL)

    import_kernel(kernels, "mine", [package], Job(kill), replace=True)


def test_killed_import_leaves_the_old_kernel_or_the_new(tmp_path: Path) -> None:
    """Killed at each of its progress reports in turn, until one import gets through."""
    kernels = tmp_path / "kernels"
    (tmp_path / "vmlinux").write_bytes(builders.elf("6.0"))
    old = import_one(tmp_path, tmp_path / "vmlinux")
    (tmp_path / "linux.deb").write_bytes(builders.deb(builders.kernel_deb_members()))

    for survive in itertools.count():
        process = child(import_until_killed, kernels, tmp_path / "linux.deb", survive)
        process.join()
        installed = manifest.read_local(kernels, "mine")
        if process.exitcode == 0:
            break
        assert process.exitcode == -signal.SIGKILL
        assert installed == old
        assert system.sweep_staging(kernels) != []
    assert survive > 10
    assert installed.kernel_version == builders.VERSION
    assert [path.name for path in kernels.iterdir()] == ["mine"]


def test_unreadable_sources_are_explained(tmp_path: Path) -> None:
    directory = builders.kernel_directory(tmp_path / "stage")
    (directory / "lib/modules" / builders.VERSION / "modules.dep").unlink()
    (directory / "lib/modules" / builders.VERSION / "modules.dep").mkdir()
    assert "modules.dep" in refused(tmp_path, directory).message


def test_imports_are_reproducible(tmp_path: Path) -> None:
    package = tmp_path / "linux.deb"
    package.write_bytes(builders.deb(builders.kernel_deb_members()))
    for name in ("first", "second"):
        import_kernel(tmp_path / "kernels", name, [package], Job())
    for file in ("modules.squashfs", "boot-modules.cpio", "vmlinux"):
        first, second = (tmp_path / "kernels" / name / file for name in ("first", "second"))
        assert first.read_bytes() == second.read_bytes(), file
