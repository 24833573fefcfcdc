"""Finds one kernel in what it is imported from: packages, archives, directories, kernel files, the running host."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path

from banger.api.errors import BangerError, Code
from banger.job import Job
from banger.kernelcat.host import host_kernel
from banger.kernelcat.manifest import MODULES
from banger.kernelcat.packages import unpack
from banger.kernelcat.staged import METADATA, Found, discover_paths, kernels
from banger.recognise import COMPRESSED, DIRECTORY, TAR, UNKNOWN, recognise

# kinds of files that may be a kernel or hold one; of the last ones nobody knows what they are
_PERHAPS = ("kernel", "kernels", "deb", "rpm", "package", TAR, DIRECTORY, "program", COMPRESSED, UNKNOWN)
_EXPECTED = (
    "give a package, a kernel file (vmlinux, vmlinuz or Image), or a directory with boot/vmlinux-* or boot/vmlinuz-*, "
    f"or with {METADATA} that names the files"
)
HOST = Path("host")  # the one relative path that may be given: the running host's kernel


def discover(sources: list[Path], scratch: Path, kernel_version: str, job: Job) -> Found:
    """Find one kernel file, and what else belongs to it, in all sources together; packages are unpacked in `scratch`.

    `kernel_version` chooses among several, '' takes the newest. Raises NOT_FOUND when a source or the kernel is not
    there, INVALID when two sources hold the same part, CORRUPT for damaged or hostile packages.
    """
    found = Found()
    packages = scratch / "packages"
    for number, source in enumerate(sources):
        if source == HOST:
            found = _merge(found, host_kernel())
        elif source.is_dir():
            found = _merge(found, _with_packed_modules(discover_paths(source, kernel_version), source, scratch, job))
        elif not source.is_file():
            what = recognise(source).what  # which raises NOT_FOUND
            raise BangerError(Code.INVALID, f"{str(source)!r} is {what}", hint=_EXPECTED)
        else:
            before = kernels(packages)
            archive = scratch / f"archive-{number}"
            package = unpack(source, packages, archive, job)
            if package is None:
                _refuse_others(source)
                found = _merge(found, Found(kernel=source))
            elif archive.is_dir():
                found = _merge(found, replace(discover_paths(archive, kernel_version), skipped=package.skipped))
            else:
                found = _merge(found, Found(distro=package.distro, arch=package.arch, skipped=package.skipped))
                added = kernels(packages) - before
                if before and added:
                    raise _twice("kernel", min(before), min(added))
    if packages.is_dir():
        found = _merge(found, discover_paths(packages, kernel_version))
    if found.kernel is None:
        if len(sources) == 1:
            _refuse_others(sources[0])
        names = ", ".join(map(str, sources)) or "nothing"
        raise BangerError(Code.NOT_FOUND, f"no kernel in {names}", hint=_EXPECTED)
    return found


def _refuse_others(source: Path) -> None:
    """Raise INVALID for a file that is known to be something else than a kernel."""
    found = recognise(source)
    if found.kind not in _PERHAPS:
        hint = _EXPECTED if found.kind in ("initrd", "text", "empty") else found.advice
        raise BangerError(Code.INVALID, f"{source} is {found.what}, not a kernel", hint=hint)


def _merge(first: Found, second: Found) -> Found:
    changes: dict[str, Path] = {}
    for part in ("kernel", "initrd", "modules", "config"):
        path = getattr(second, part)
        if path is not None:
            if getattr(first, part) is not None:
                raise _twice(part, getattr(first, part), path)
            changes[part] = path
    if first.arch and second.arch and first.arch != second.arch:
        raise BangerError(
            Code.INVALID,
            f"the sources are for two architectures: {first.arch} and {second.arch}",
            hint="give only the sources of one kernel",
        )
    return replace(
        first,
        **changes,
        distro=first.distro or second.distro,
        arch=first.arch or second.arch,
        kernel_version=first.kernel_version or second.kernel_version,
        skipped=Counter(first.skipped) + Counter(second.skipped),
    )


def _twice(part: str, first: object, second: object) -> BangerError:
    return BangerError(
        Code.INVALID,
        f"two sources hold a {part}: {first} and {second}",
        hint="give only the sources of one kernel",
    )


def _with_packed_modules(found: Found, source: Path, scratch: Path, job: Job) -> Found:
    """The same with the modules of an entry of the local catalog, which keeps them packed."""
    packed = source / MODULES
    if found.modules is not None or found.kernel is None or not packed.is_file():
        return found
    modules = scratch / "entry-modules"
    job.run(["rdsquashfs", "--unpack-path=/", f"--unpack-root={modules}", "--quiet", packed])
    return replace(found, modules=modules)
