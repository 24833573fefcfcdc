"""Finds the files of the kernel that this host runs."""

from __future__ import annotations

import os
import shlex
import struct
from collections.abc import Iterable
from pathlib import Path

from banger.api.errors import BangerError, Code
from banger.kernelcat.staged import Found

_HEADER = 0x10000  # bytes: the version of a bzImage is within its setup code


def host_kernel(root: Path = Path("/"), release: str = os.uname().release) -> Found:
    """The files of the kernel `release` as distributions install them below `root`.

    Raises NOT_FOUND when the kernel is not installed there (a container, a microVM, or an update since the last boot),
    INVALID when only root can read it.
    """
    modules = _first([root / "lib/modules" / release, root / "usr/lib/modules" / release])
    trees = [modules] if modules else []
    kernel, other = _kernel(root / "boot", trees, release)
    if kernel is None:
        raise BangerError(
            Code.NOT_FOUND,
            f"this host runs the kernel {release!r}, but its file is not installed"
            + (f": {other} is another version" if other else f" in {root / 'boot'} or {root / 'lib/modules'}"),
            hint="reboot into the installed kernel, then try again"
            if other
            else "containers and microVMs get theirs from outside: see 'banger kernel list --available' for others",
        )
    if not os.access(kernel, os.R_OK):
        copy = f"/tmp/{kernel.name}"
        also = f" --from {shlex.quote(str(modules))}" if modules else ""
        raise BangerError(
            Code.INVALID,
            f"the host's kernel {kernel} can be read by root only",
            hint=f"sudo install -m 644 {shlex.quote(str(kernel))} {shlex.quote(copy)}"
            f" && banger kernel import NAME --from {shlex.quote(copy)}{also}",
        )
    configs = [root / f"boot/config-{release}", *(tree / "config" for tree in trees), root / "proc/config.gz"]
    initrds = [root / f"boot/initrd.img-{release}", root / f"boot/initramfs-{release}.img", *_flavoured(kernel)]
    return Found(
        kernel=kernel,
        initrd=_first(path for path in initrds if os.access(path, os.R_OK)),
        modules=modules,
        config=_first(path for path in configs if os.access(path, os.R_OK)),
        distro=_distro(root),
        kernel_version=release,
    )


def _kernel(boot: Path, trees: list[Path], release: str) -> tuple[Path | None, Path | None]:
    """The kernel file, or a file that would be it but for its version."""
    named = _first([boot / f"vmlinuz-{release}", *(tree / "vmlinuz" for tree in trees), boot / f"vmlinux-{release}"])
    if named:
        return named, None
    flavours = [boot / "vmlinuz-linux", *sorted(boot.glob("vmlinuz-linux-*"))]  # Arch
    flavours += [path for path in sorted(boot.glob("vmlinuz-*")) if release.endswith(path.name[len("vmlinuz") :])]
    other = None
    for path in flavours:
        if path.is_file():
            if not os.access(path, os.R_OK) or _version(path) in ("", release):
                return path, None
            other = path
    return None, other


def _first(paths: Iterable[Path]) -> Path | None:
    return next((path for path in paths if path.exists()), None)


def _flavoured(kernel: Path) -> list[Path]:
    flavour = kernel.name.partition("-")[2]
    return [kernel.parent / f"initramfs-{flavour}{end}" for end in (".img", "")] if flavour else []


def _version(kernel: Path) -> str:
    """What a bzImage says that it is, '' for other files (Documentation/arch/x86/boot.rst, kernel_version)."""
    with open(kernel, "rb") as stream:
        head = stream.read(_HEADER)
    if len(head) < 0x210 or head[0x202:0x206] != b"HdrS":
        return ""
    (offset,) = struct.unpack_from("<H", head, 0x20E)
    return head[offset + 0x200 :].partition(b" ")[0][:128].decode("ascii", "replace") if offset else ""


def _distro(root: Path) -> str:
    """ID of os-release(5)."""
    for file in (root / "etc/os-release", root / "usr/lib/os-release"):
        if file.is_file():
            values = [line[3:] for line in file.read_text(errors="replace").splitlines() if line.startswith("ID=")]
            return values[-1].strip("'\" ") if values else ""
    return ""
