"""Makes an entry of the local kernel catalog from packages, directories, kernel files and bundles."""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

from banger import system
from banger.api.errors import BangerError, Code
from banger.decompress import decompress
from banger.disk import space
from banger.entries import sum_file
from banger.guest.bootarchive import write_boot_modules
from banger.job import Job
from banger.kernelcat import manifest as layout
from banger.kernelcat.bundle import receive_bundle
from banger.kernelcat.bzimage import Kernel, embedded_config, unpack_kernel
from banger.kernelcat.confine import confined, read_bounded
from banger.kernelcat.manifest import KernelManifest
from banger.kernelcat.modules import BootPlan, ModuleDirectory, ModuleTree, boot_plan, read_module
from banger.kernelcat.packer import pack_modules
from banger.kernelcat.sources import discover
from banger.kernelcat.staged import Found, newest

_CONFIG_LIMIT = 4 << 20  # bytes
_STEP = 1 << 20

Publishing = Callable[[], AbstractContextManager[object]]


@dataclass(frozen=True)
class Claims:
    """What is said about a kernel besides its files, '' where nothing is: by the user, or by the catalog it is from.

    `distro` fills in what the files do not tell; `arch` and `kernel_version` must be what the kernel says, and
    `kernel_version` chooses among several. `source`, `origin` and `revision` are those of the manifest;
    `skipped` counts what was left out of the files already.
    """

    distro: str = ""
    arch: str = ""
    kernel_version: str = ""
    source: str = ""
    origin: str = ""
    revision: str = ""
    skipped: Mapping[str, int] = field(default_factory=dict)


def import_kernel(
    kernels_dir: Path,
    name: str,
    sources: list[Path],
    job: Job,
    *,
    claims: Claims = Claims(),
    replace: bool = False,
    publishing: Publishing = nullcontext,
) -> KernelManifest:
    """Install a kernel under `name` from packages, directories and kernel files that together hold it.

    `publishing` gives the lock that is held while the finished entry is renamed into place. Raises EXISTS for a taken
    name unless `replace`, UNSUPPORTED for a kernel that lacks a driver without which no guest boots.
    """

    def make(entry: Path, scratch: Path) -> KernelManifest:
        found = discover(sources, scratch, claims.kernel_version, job)
        given = claims if claims.source else dataclasses.replace(claims, source=f"import:{sources[0]}")
        return _complete(entry, scratch, name, found, None, given, job)

    return _install(kernels_dir, name, make, job, replace, publishing)


def import_bundle(
    kernels_dir: Path,
    name: str,
    pieces: Iterable[bytes],
    job: Job,
    *,
    claims: Claims,
    replace: bool = False,
    publishing: Publishing = nullcontext,
) -> KernelManifest:
    """Install a kernel under `name` from a bundle that arrives in `pieces`, in one pass over them; else as above."""

    def make(entry: Path, scratch: Path) -> KernelManifest:
        received = receive_bundle(pieces, claims.source, entry / layout.MODULES, scratch, job)
        return _complete(entry, scratch, name, received.found, received.modules, claims, job)

    return _install(kernels_dir, name, make, job, replace, publishing)


def build_kernel(directory: Path, name: str, found: Found, job: Job, *, claims: Claims) -> KernelManifest:
    """Fill the new `directory` with a kernel made of the files `found`, for an owner other than the catalog.

    Raises as `import_kernel` does, but for names.
    """
    with _told_by(str(found.kernel), directory), system.staging(directory.parent, "scratch") as scratch:
        directory.mkdir(mode=0o755)
        manifest = _complete(directory, scratch, name, found, None, claims, job)
        layout.write_local(directory, manifest)
    return manifest


def refuse_taken(kernels_dir: Path, name: str, replace: bool) -> None:
    """Raise EXISTS when a name is taken and must not be replaced."""
    if not replace and (kernels_dir / name).exists():
        raise BangerError(Code.EXISTS, f"the kernel {name!r} exists already", hint="replace it with --force")


def _install(
    kernels_dir: Path,
    name: str,
    make: Callable[[Path, Path], KernelManifest],
    job: Job,
    replace: bool,
    publishing: Publishing,
) -> KernelManifest:
    """Have `make` fill a staged entry (and use a scratch directory beside it), then publish it."""
    system.validate_name(name, "kernel")
    refuse_taken(kernels_dir, name, replace)
    with _told_by(name, kernels_dir), system.staging(kernels_dir, name) as staged:
        entry, scratch = staged / "entry", staged / "scratch"
        entry.mkdir(mode=0o755)
        scratch.mkdir()
        manifest = make(entry, scratch)
        layout.write_local(entry, manifest)
        system.remove_tree(scratch)
        job.progress("publish", name)
        system.sync_tree(entry)  # the slow part of the publication, before the lock is taken
        with publishing():
            refuse_taken(kernels_dir, name, replace)
            system.publish(entry, kernels_dir / name)
    return manifest


@contextlib.contextmanager
def _told_by(name: str, directory: Path) -> Iterator[None]:
    """Tell the system's errors as those of importing the kernel `name` below `directory`."""
    try:
        yield
    except OSError as error:
        full = space.means_full(error)
        raise BangerError(
            Code.EXHAUSTED if full else Code.INVALID,
            f"the kernel {name!r} cannot be imported: {error.strerror}: {error.filename or directory}",
            hint="remove kernels, images or VMs that you no longer need" if full else "",
        ) from error


def _complete(
    entry: Path, scratch: Path, name: str, found: Found, packed: ModuleTree | None, claims: Claims, job: Job
) -> KernelManifest:
    """Write all files of the entry but its manifest, and return that; `packed` modules are in the entry already."""
    assert found.kernel is not None
    job.progress("unpack", found.kernel.name)
    kernel = unpack_kernel(found.kernel, entry / layout.VMLINUX, job, move=found.kernel.is_relative_to(scratch))
    _agree("architecture", kernel.arch, claims.arch, found.arch)
    _agree("kernel version", kernel.version, claims.kernel_version, found.kernel_version)
    if kernel.bzimage and not kernel.pvh:
        system.copy_file_prefer_clone(found.kernel, entry / layout.VMLINUZ)
    if found.initrd:
        system.copy_file_prefer_clone(found.initrd, entry / layout.INITRD)
    if found.config:
        data = read_bounded(found.config, _CONFIG_LIMIT)  # compressed in /proc/config.gz
        config: str | None = decompress(data, _CONFIG_LIMIT).decode("ascii", "replace")
    else:
        config = embedded_config(entry / layout.VMLINUX)
    if config is not None:
        (entry / layout.CONFIG).write_text(config)
    directory = _index_modules(found.modules, kernel.version, scratch, job) if found.modules else None
    modules = ModuleDirectory(directory) if directory else packed
    plan = boot_plan(modules, config)
    if plan.fatal:
        raise BangerError(
            Code.UNSUPPORTED,
            f"no guest could boot with the kernel {kernel.version}: it lacks {', '.join(plan.fatal)}",
            hint="import the kernel together with its modules, or one built with these options",
        )
    if modules:
        job.progress("boot modules", total=len(plan.load), unit="modules")
        contents = ((path, read_module(modules, path, kernel.version)) for path in plan.load)
        write_boot_modules(entry / layout.BOOT_MODULES, contents)
    if directory:
        _pack(directory, entry / layout.MODULES, job)
    return KernelManifest(
        name=name,
        distro=claims.distro or found.distro or kernel.distro or "unknown",
        arch=kernel.arch,
        kernel_version=kernel.version,
        sha256=kernel.sha256,
        source=claims.source,
        imported_at=datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        origin=claims.origin,
        revision=claims.revision,
        modules=modules is not None,
        pvh=kernel.pvh,
        boot_modules=plan.load,
        missing=_missing(kernel, plan),
        unknown=plan.unknown,
        skipped=_skipped(Counter(found.skipped) + Counter(claims.skipped)),
        files={file.name: sum_file(file, job) for file in sorted(entry.iterdir()) if file.name != layout.VMLINUX},
    )


def _agree(what: str, actual: str, *claims: str) -> None:
    for claim in claims:
        if claim and claim != actual:
            raise BangerError(
                Code.INVALID,
                f"the {what} of this kernel is {actual!r}, not {claim!r}",
                hint="what is said of it (by an option, metadata.json or a catalog) must agree with the kernel itself",
            )


def _missing(kernel: Kernel, plan: BootPlan) -> tuple[str, ...]:
    """What the kernel lacks for some machine type; QEMU enters an ELF by its PVH note and needs the bzImage without."""
    bootable = kernel.pvh or kernel.bzimage or kernel.arch != "amd64"
    return plan.missing if bootable else (*plan.missing, "a PVH entry (CONFIG_PVH)")


def _skipped(skipped: Mapping[str, int]) -> tuple[str, ...]:
    """Counts of what was not taken as people say them: "2 devices"."""
    return tuple(f"{count} {kind}{'s' if count > 1 else ''}" for kind, count in sorted(skipped.items()) if count)


def _index_modules(found: Path, version: str, scratch: Path, job: Job) -> Path:
    """A private lib/modules/<version> with the regular files of the one found, and with its indexes.

    Packages carry no modules.dep: it is the business of depmod, which runs when they are installed.
    """

    def link(file: Path, name: Path) -> None:
        job.check()
        system.link_or_copy(file, name)

    is_tree = (found / "kernel").is_dir() or (found / "modules.dep").is_file()
    if is_tree:
        source = found
    elif (found / version).is_dir():
        source = confined(found, version, f"the kernel {version!r}", "directory")
    else:
        present = newest([path.name for path in found.iterdir() if path.is_dir()])
        raise BangerError(
            Code.INVALID,
            f"the kernel is {version!r}, but the modules are for {present or 'nothing'!r}",
            hint="give the kernel and the modules of one version",
        )
    if source.is_relative_to(scratch) and source.parts[-3:] == ("lib", "modules", version):
        root, target = source.parents[2], source  # unpacked a moment ago, and nobody else's
    else:
        root = scratch / "indexed"
        target = root / "lib/modules" / version
        target.parent.mkdir(parents=True)
        system.copy_dir_contents(source, target, link)
        target.chmod(0o755)  # for depmod
    if not (target / "modules.dep").exists() or not (target / "modules.dep.bin").exists():
        job.progress("index", version)
        # the PATH of ordinary users may lack the directory of depmod
        environment = {**os.environ, "PATH": f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"}
        job.run(["depmod", "-b", root, version], env=environment)
    return target


def _pack(modules: Path, output: Path, job: Job) -> None:
    files = sorted(path for path in modules.rglob("*") if path.is_file())
    total = sum(path.stat().st_size for path in files)
    done = 0
    with pack_modules(output, job) as packer:
        for path in files:
            job.progress("pack modules", path.name, done, total)
            with open(path, "rb") as content:
                size = os.fstat(content.fileno()).st_size
                packer.add(path.relative_to(modules).as_posix(), size, iter(lambda: content.read(_STEP), b""))
            done += size
