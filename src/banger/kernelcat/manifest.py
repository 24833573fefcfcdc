"""The local kernel catalog: one directory per kernel, valid when its manifest.json is."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from banger import entries, system
from banger.api.errors import BangerError, Code
from banger.entries import MANIFEST, BrokenEntry, Manifest, sum_file
from banger.fields import Fields
from banger.job import Job

VMLINUX = "vmlinux"
VMLINUZ = "vmlinuz"
INITRD = "initrd.img"
CONFIG = "config"
MODULES = "modules.squashfs"
BOOT_MODULES = "boot-modules.cpio"


@dataclass(frozen=True)
class KernelManifest(Manifest):
    """What is known about an installed kernel.

    `sha256` is that of `vmlinux`; `imported_at` is UTC, RFC 3339; `boot_modules` are the paths below
    /lib/modules/<kernel_version> that the guest loads, in that order; `missing` names what one of the machine types
    would need and the kernel lacks ("virtio_pci (CONFIG_VIRTIO_PCI)"), `unknown` that of which nothing tells. Of a
    pulled one `origin` is the catalog and name it had there ("banger/debian-cloud", "" without a catalog), `revision`
    what tells one release from the next: the SHA-256 of a bundle, package=version, or an image's digest.
    `skipped` counts what else the archives held that kernels have no use for ("2 devices"); `files` has the SHA-256 of
    every file but `vmlinux`.
    """

    distro: str
    arch: str
    kernel_version: str
    sha256: str
    source: str
    imported_at: str
    origin: str = ""
    revision: str = ""
    modules: bool = False
    pvh: bool = False
    boot_modules: tuple[str, ...] = ()
    missing: tuple[str, ...] = ()
    unknown: tuple[str, ...] = ()
    skipped: tuple[str, ...] = ()
    files: dict[str, str] = field(default_factory=dict)


def parse_manifest(text: str | bytes, where: str = MANIFEST) -> KernelManifest:
    """Read a manifest strictly; raises `BangerError(CORRUPT)` naming the field that is wrong."""
    fields = Fields.parse(text, where)
    manifest = KernelManifest(
        name=fields.text("name"),
        distro=fields.text("distro"),
        arch=fields.arch(),
        kernel_version=fields.text("kernel_version"),
        sha256=fields.sha256("sha256"),
        source=fields.text("source"),
        imported_at=fields.utc_time("imported_at"),
        origin=fields.text("origin", ""),
        revision=fields.text("revision", ""),
        modules=fields.flag("modules"),
        pvh=fields.flag("pvh"),
        boot_modules=fields.texts("boot_modules"),
        missing=fields.texts("missing"),
        unknown=fields.texts("unknown"),
        skipped=fields.texts("skipped"),
        files=fields.digests("files"),
    )
    if not is_version(manifest.kernel_version):
        raise fields.wrong("kernel_version", "a kernel release as 'uname -r' prints it")
    for path in manifest.boot_modules:
        if path.startswith("/") or ".." in path.split("/"):
            raise fields.wrong("boot_modules", f"paths inside the module directory, not {path!r}")
    return manifest


def is_version(text: str) -> bool:
    """Whether this can be a kernel release: it becomes a directory name in the guest."""
    return re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._+~-]{0,127}", text) is not None and ".." not in text


def read_local(kernels_dir: Path, name: str) -> KernelManifest:
    """The manifest of an installed kernel.

    Raises NOT_FOUND with the nearest name, CORRUPT when the entry is broken.
    """
    return entries.read(kernels_dir, "kernel", name, _load)


def list_local(kernels_dir: Path) -> tuple[list[KernelManifest], list[BrokenEntry]]:
    """All installed kernels by name, and the directories that are not usable kernels."""
    return entries.read_all(kernels_dir, _load)


def write_local(entry: Path, manifest: KernelManifest) -> None:
    """Write the manifest into the (staged) directory of its kernel."""
    entries.write(entry, manifest)


def delete_local(kernels_dir: Path, name: str) -> None:
    """Remove a kernel, broken or not; raises NOT_FOUND."""
    entries.delete(kernels_dir, "kernel", name)


def validate_name(name: str) -> str:
    """Check the name of a kernel and return it; raises INVALID."""
    return system.validate_name(name, "kernel")


def verify_local(kernels_dir: Path, name: str, job: Job) -> str:
    """Read a kernel again, all of it: what is wrong with it, '' when nothing is. Raises NOT_FOUND."""
    try:
        while True:
            read_local(kernels_dir, name)
            problem = entries.steadily(kernels_dir / name, lambda entry: changed_at(entry, name, job))
            if problem is not None:
                return problem
    except BangerError as error:
        if error.code is not Code.CORRUPT:
            raise
        return error.message
    except OSError as error:
        return f"{error.filename} cannot be read: {error.strerror}"


def changed_at(entry: Path, name: str, job: Job) -> str:
    """The same of the kernel `name` whose files are in `entry`; raises CORRUPT and OSError for one that lacks some."""
    manifest = _load(entry, name)
    for file, digest in {VMLINUX: manifest.sha256, **manifest.files}.items():
        job.progress("verify", f"{entry.name}/{file}")
        found = sum_file(entry / file, job)
        if found != digest:
            return f"{file} has changed: its SHA-256 is {found}, not {digest}"
    return ""


def kernel_paths(entry: Path) -> tuple[Path, Path]:
    """The kernel file that Firecracker boots and the one that QEMU boots (the bzImage when the ELF has no PVH note)."""
    vmlinux, vmlinuz = entry / VMLINUX, entry / VMLINUZ
    return vmlinux, vmlinuz if vmlinuz.exists() else vmlinux


def hold(kernels_dir: Path, name: str, target: Path) -> KernelManifest:
    """Give the new directory `target` the files of an installed kernel for good, whatever becomes of its entry.

    They are linked where that is possible (`system.link_or_copy`); cached boot archives are left out. Raises as
    `read_local` does.
    """
    manifest = read_local(kernels_dir, name)
    link_files(kernels_dir / name, target, manifest.files)
    return manifest


def link_files(entry: Path, target: Path, others: Iterable[str] = ()) -> None:
    """Give the new directory `target` the files of the kernel in `entry`, and of what is there the `others` too."""
    target.mkdir(mode=0o755)
    for file in sorted({MANIFEST, VMLINUX, VMLINUZ, INITRD, CONFIG, MODULES, BOOT_MODULES, *others}):
        source = entry / file
        if source.exists():
            # resolved: a hard link to a symbolic link would hold nothing
            system.link_or_copy(source.resolve(), target / file)


def read_at(directory: Path, name: str) -> KernelManifest:
    """The manifest of the kernel `name` whose files are in `directory`, whatever that is called; raises CORRUPT."""
    return _load(directory, name)


def _load(entry: Path, name: str = "") -> KernelManifest:
    finish = f"banger kernel import {entry.name} --from {entry} --force"
    fix, hint = f"finish it with '{finish}'", f"run '{finish}'"
    by_hand = any((entry / kernel).exists() for kernel in (VMLINUX, VMLINUZ, "bzImage", "Image", "kernel", "boot"))
    if by_hand and not (entry / MANIFEST).exists():
        raise BangerError(Code.CORRUPT, f"it has no {MANIFEST}; {fix}", hint)
    manifest = entries.load(entry, "kernel", parse_manifest, name)
    needed = {VMLINUX, *manifest.files}
    if manifest.modules:
        needed.add(MODULES)
    elif (entry / "modules").is_dir():
        raise BangerError(Code.CORRUPT, f"its modules are not packed yet; {fix}", hint)
    if manifest.boot_modules:
        needed.add(BOOT_MODULES)
    present = {file.name for file in os.scandir(entry) if file.is_file()}
    for file in sorted(needed - present):
        raise BangerError(Code.CORRUPT, f"{file} is missing")
    return manifest
