"""The local kernel catalog: one directory per kernel, valid when its manifest.json is."""

from __future__ import annotations

import json
import os
import re
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath

from banger import system
from banger.api.errors import BangerError, Code
from banger.fields import Fields

MANIFEST = "manifest.json"
VMLINUX = "vmlinux"
VMLINUZ = "vmlinuz"
INITRD = "initrd.img"
CONFIG = "config"
MODULES = "modules.squashfs"
BOOT_MODULES = "boot-modules.cpio"

_MANIFEST_LIMIT = 1 << 20  # bytes


@dataclass(frozen=True)
class KernelManifest:
    """What is known about an installed kernel.

    `sha256` is that of `vmlinux`; `imported_at` is UTC, RFC 3339; `boot_modules` are the paths below
    /lib/modules/<kernel_version> that the guest loads, in that order; `missing` names drivers that one of the
    machine types would need ("virtio_pci (CONFIG_VIRTIO_PCI)").
    """

    name: str
    distro: str
    arch: str
    kernel_version: str
    sha256: str
    source: str
    imported_at: str
    modules: bool = False
    pvh: bool = False
    boot_modules: tuple[str, ...] = ()
    missing: tuple[str, ...] = ()

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=2) + "\n"


@dataclass(frozen=True)
class BrokenKernel:
    """A directory of the catalog that nothing may use, and why."""

    name: str
    reason: str


def parse_manifest(text: str | bytes, where: str = MANIFEST) -> KernelManifest:
    """Read a manifest strictly; raises `BangerError(CORRUPT)` naming the field that is wrong."""
    fields = Fields.parse(text, where)
    manifest = KernelManifest(
        name=fields.text("name"),
        distro=fields.text("distro"),
        arch=fields.arch(),
        kernel_version=fields.text("kernel_version"),
        sha256=fields.text("sha256"),
        source=fields.text("source"),
        imported_at=fields.text("imported_at"),
        modules=fields.flag("modules"),
        pvh=fields.flag("pvh"),
        boot_modules=fields.texts("boot_modules"),
        missing=fields.texts("missing"),
    )
    if not re.fullmatch(r"[0-9a-f]{64}", manifest.sha256):
        raise fields.wrong("sha256", "64 hexadecimal digits")
    if not re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d+)?Z", manifest.imported_at):
        raise fields.wrong("imported_at", "a UTC time as in 2026-01-31T12:00:00Z")
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
    system.validate_name(name, "kernel")
    entry = kernels_dir / name
    if not entry.is_dir():
        raise _not_found(kernels_dir, name)
    try:
        return _read_entry(entry)
    except BangerError as error:
        raise BangerError(
            Code.CORRUPT,
            f"the kernel {name!r} is broken: {error.message}",
            hint=f"pull or import it again with --force, or remove it with 'banger kernel rm {name}'",
        ) from error


def list_local(kernels_dir: Path) -> tuple[list[KernelManifest], list[BrokenKernel]]:
    """All installed kernels by name, and the directories that are not usable kernels."""
    good: list[KernelManifest] = []
    broken: list[BrokenKernel] = []
    for name in _names(kernels_dir):
        try:
            good.append(_read_entry(kernels_dir / name))
        except BangerError as error:
            broken.append(BrokenKernel(name, error.message))
    return good, broken


def write_local(entry: Path, manifest: KernelManifest) -> None:
    """Write the manifest into the (staged) directory of its kernel."""
    system.write_file_atomically(entry / MANIFEST, manifest.to_json().encode(), mode=0o644)


def delete_local(kernels_dir: Path, name: str) -> None:
    """Remove a kernel, broken or not; raises NOT_FOUND."""
    system.validate_name(name, "kernel")
    if not (kernels_dir / name).is_dir():
        raise _not_found(kernels_dir, name)
    system.remove_entry(kernels_dir / name)


def kernel_paths(entry: Path) -> tuple[Path, Path]:
    """The kernel file that Firecracker boots and the one that QEMU boots (the bzImage when the ELF has no PVH note)."""
    vmlinux, vmlinuz = entry / VMLINUX, entry / VMLINUZ
    return vmlinux, vmlinuz if vmlinuz.exists() else vmlinux


def _read_entry(entry: Path) -> KernelManifest:
    try:
        with open(entry / MANIFEST, "rb") as stream:
            text = stream.read(_MANIFEST_LIMIT)
    except OSError as error:
        raise BangerError(Code.CORRUPT, f"{MANIFEST} cannot be read: {error.strerror}") from error
    manifest = parse_manifest(text)
    if manifest.name != entry.name:
        raise BangerError(Code.CORRUPT, f"{MANIFEST} belongs to a kernel called {manifest.name!r}")
    needed = [VMLINUX]
    if manifest.modules:
        needed.append(MODULES)
    if manifest.boot_modules:
        needed.append(BOOT_MODULES)
    for file in needed:
        if not (entry / file).is_file():
            raise BangerError(Code.CORRUPT, f"{file} is missing")
    return manifest


def _names(kernels_dir: Path) -> list[str]:
    if not kernels_dir.is_dir():
        return []
    return sorted(entry.name for entry in os.scandir(kernels_dir) if entry.is_dir() and not entry.name.startswith("."))


def _not_found(kernels_dir: Path, name: str) -> BangerError:
    near = system.nearest(name, _names(kernels_dir))
    hint = f"did you mean {near!r}?" if near else "see 'banger kernel list' and 'banger kernel list --available'"
    return BangerError(Code.NOT_FOUND, f"there is no kernel {name!r}", hint=hint)
