"""The local kernel catalog: one directory per kernel, valid when its manifest.json is."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from banger import entries
from banger.api.errors import BangerError, Code
from banger.entries import MANIFEST, BrokenEntry, Manifest
from banger.fields import Fields

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
    would need and the kernel lacks ("virtio_pci (CONFIG_VIRTIO_PCI)"), `unknown` that of which nothing tells. Of a pulled
    one `origin` is the catalog and name it had there ("banger/debian-cloud", "" without a catalog), `revision` what
    tells one release from the next: the SHA-256 of a bundle, package=version, or an image's digest.
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
    )
    if not is_version(manifest.kernel_version):
        raise fields.wrong("kernel_version", "a kernel release as 'uname -r' prints it")
    for path in manifest.boot_modules:
        if path.startswith("/") or ".." in PurePosixPath(path).parts:
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


def kernel_paths(entry: Path) -> tuple[Path, Path]:
    """The kernel file that Firecracker boots and the one that QEMU boots (the bzImage when the ELF has no PVH note)."""
    vmlinux, vmlinuz = entry / VMLINUX, entry / VMLINUZ
    return vmlinux, vmlinuz if vmlinuz.exists() else vmlinux


def _load(entry: Path) -> KernelManifest:
    manifest = entries.load(entry, "kernel", parse_manifest)
    needed = [VMLINUX]
    if manifest.modules:
        needed.append(MODULES)
    if manifest.boot_modules:
        needed.append(BOOT_MODULES)
    for file in needed:
        if not (entry / file).is_file():
            raise BangerError(Code.CORRUPT, f"{file} is missing")
    return manifest
