"""Finds the files of a kernel in what it is imported from: Debian packages, directories, bare kernel files."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from pathlib import Path

from banger.api.errors import BangerError, Code
from banger.fields import Fields
from banger.job import Job
from banger.kernelcat.confine import confined, read_bounded
from banger.kernelcat.deb import is_deb, unpack_deb
from banger.kernelcat.manifest import is_version

_METADATA = "metadata.json"
_METADATA_LIMIT = 1 << 20  # bytes


@dataclass(frozen=True)
class Found:
    """The files of a kernel, each None when the source has none, and what its metadata says ('' where nothing).

    `modules` is a lib/modules/<version> directory, or the lib/modules above several.
    """

    kernel: Path | None = None
    initrd: Path | None = None
    modules: Path | None = None
    config: Path | None = None
    distro: str = ""
    arch: str = ""
    kernel_version: str = ""


def discover(sources: list[Path], scratch: Path, kernel_version: str, job: Job) -> tuple[Path, Found]:
    """Find one kernel file, and what else belongs to it, in all sources together; packages are unpacked in `scratch`.

    `kernel_version` chooses among several, '' takes the newest. Raises NOT_FOUND for a source that does not exist,
    INVALID when two sources hold the same part, CORRUPT for damaged or hostile packages.
    """
    found = Found()
    packages = scratch / "packages"
    for source in sources:
        if source.is_dir():
            found = _merge(found, _in_directory(source, kernel_version))
        elif not source.is_file():
            raise BangerError(Code.NOT_FOUND, f"there is no file or directory {str(source)!r}")
        elif is_deb(source):
            unpack_deb(source, packages, job)
        else:
            found = _merge(found, Found(kernel=source))
    if packages.is_dir():
        found = _merge(found, _in_directory(packages, kernel_version))
    if found.kernel is None:
        names = ", ".join(map(str, sources)) or "nothing"
        raise BangerError(
            Code.NOT_FOUND,
            f"no kernel in {names}",
            hint=f"a directory holds boot/vmlinux-* or boot/vmlinuz-*, or {_METADATA} that names the files",
        )
    return found.kernel, found


def newest(names: list[str]) -> str | None:
    """The name with the highest version: runs of digits compare as numbers, '~' sorts before the end."""

    def key(name: str) -> list[tuple[int, int, str]]:
        words = re.findall(r"\d+|\D", name)
        ranks = [(2, int(word), "") if word.isdecimal() else (-1 if word == "~" else 1, 0, word) for word in words]
        return [*ranks, (0, 0, "")]

    return max(names, key=key, default=None)


def _merge(first: Found, second: Found) -> Found:
    changes: dict[str, Path] = {}
    for part in ("kernel", "initrd", "modules", "config"):
        path = getattr(second, part)
        if path is None:
            continue
        if getattr(first, part) is not None:
            raise BangerError(
                Code.INVALID,
                f"two sources hold a {part}: {getattr(first, part)} and {path}",
                hint="give only the sources of one kernel",
            )
        changes[part] = path
    return replace(
        first,
        **changes,
        distro=first.distro or second.distro,
        arch=first.arch or second.arch,
        kernel_version=first.kernel_version or second.kernel_version,
    )


def _in_directory(directory: Path, kernel_version: str) -> Found:
    if (directory / _METADATA).is_file():
        return _by_metadata(directory)
    where = f"the directory {directory.name!r}"
    boot = sorted(path.name for path in directory.glob("boot/*"))
    kernels = [name for name in boot if name.startswith(("vmlinux-", "vmlinuz-"))]
    chosen = [name for name in kernels if _suffix(name) == kernel_version] or kernels
    kernel = newest([name for name in chosen if name.startswith("vmlinux-")]) or newest(chosen)

    def belonging(*prefixes: str) -> Path | None:
        names = (name for name in boot if kernel and name.startswith(prefixes) and _suffix(name) == _suffix(kernel))
        return next((confined(directory, f"boot/{name}", where) for name in names), None)

    roots = ("lib/modules", "usr/lib/modules")
    modules = next((root for root in roots if (directory / root).is_dir()), None)
    return Found(
        kernel=confined(directory, f"boot/{kernel}", where) if kernel else None,
        initrd=belonging("initramfs-", "initrd.img-"),
        modules=confined(directory, modules, where, "directory") if modules else None,
        config=belonging("config-"),
    )


def _suffix(name: str) -> str:
    """What stands after the first '-' of boot/<kind>-<version>[.img]: a release, or a flavour like 'lts'."""
    return name.partition("-")[2].removesuffix(".img")


def _by_metadata(directory: Path) -> Found:
    fields = Fields.parse(read_bounded(confined(directory, _METADATA, "the import"), _METADATA_LIMIT), _METADATA)

    def path(key: str, kind: str, default: str | None = "") -> Path | None:
        value = fields.text(key, default)
        return confined(directory, value, f"{key!r} in {_METADATA}", kind) if value else None

    kernel_version = fields.text("kernel_version", "")
    if kernel_version and not is_version(kernel_version):
        raise fields.wrong("kernel_version", "a kernel release as 'uname -r' prints it")
    return Found(
        kernel=path("kernel", "file", None),
        initrd=path("initrd", "file"),
        modules=path("modules", "directory"),
        distro=fields.text("distro", ""),
        arch=fields.arch(default=""),
        kernel_version=kernel_version,
    )
