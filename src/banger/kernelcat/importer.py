"""Makes an entry of the local kernel catalog from packages, directories and kernel files."""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import tarfile
import tempfile
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from datetime import UTC, datetime
from pathlib import Path

from banger import system
from banger.api.errors import BangerError, Code
from banger.guest.bootarchive import write_boot_modules
from banger.job import Job, command_failed
from banger.kernelcat import manifest as layout
from banger.kernelcat.bzimage import UNPACKED_LIMIT, Kernel, embedded_config, read_kernel
from banger.kernelcat.confine import confined, read_bounded
from banger.kernelcat.manifest import KernelManifest
from banger.kernelcat.modules import BootPlan, boot_plan, read_module
from banger.kernelcat.sources import Found, discover, newest

# lz4: the fastest to pack and, in an emulated guest, to read (92 MB of modules: 0.4 s and 36 MB; zstd 7 s and 20 MB)
_COMPRESSOR = "lz4"
_CONFIG_LIMIT = 4 << 20  # bytes
# bytes to leave free: a disk that fills up makes tar2sqfs say "I/O error" and remove the evidence
_FREE_RESERVE = 16 << 20


def import_kernel(
    kernels_dir: Path,
    name: str,
    sources: list[Path],
    job: Job,
    *,
    arch: str | None = None,
    kernel_version: str | None = None,
    distro: str | None = None,
    source: str | None = None,
    replace: bool = False,
    publishing: Callable[[], AbstractContextManager[object]] = nullcontext,
) -> KernelManifest:
    """Install a kernel under `name` from .deb packages, directories and kernel files that together hold it.

    `arch` and `kernel_version` must match what the kernel says when given; `kernel_version` also chooses among several.
    `publishing` gives the lock that is held while the finished entry is renamed into place. Raises EXISTS for a taken
    name unless `replace`, UNSUPPORTED for a kernel that lacks a driver without which no guest boots.
    """
    system.validate_name(name, "kernel")
    refuse_taken(kernels_dir, name, replace)
    try:
        with system.staging(kernels_dir, name) as staged:
            entry, scratch = staged / "entry", staged / "scratch"
            entry.mkdir(mode=0o755)
            scratch.mkdir()
            kernel_file, found = discover(sources, scratch, kernel_version or "", job)
            job.progress("unpack", kernel_file.name)
            data = read_bounded(kernel_file, UNPACKED_LIMIT)
            kernel = read_kernel(data, kernel_file.name)
            _agree("architecture", kernel.arch, arch, found.arch)
            _agree("kernel version", kernel.version, kernel_version, found.kernel_version)

            plan = _build(entry, scratch, data, kernel, found, job)
            manifest = KernelManifest(
                name=name,
                distro=distro or found.distro or "unknown",
                arch=kernel.arch,
                kernel_version=kernel.version,
                sha256=hashlib.sha256(kernel.image).hexdigest(),
                source=source or f"import:{sources[0]}",
                imported_at=datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
                modules=found.modules is not None,
                pvh=kernel.pvh,
                boot_modules=plan.load,
                missing=plan.missing,
            )
            layout.write_local(entry, manifest)
            system.remove_tree(scratch)
            job.progress("publish", name)
            system.syncfs(entry)  # the slow part of the publication, before the lock is taken
            with publishing():
                refuse_taken(kernels_dir, name, replace)
                system.publish(entry, kernels_dir / name)
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        raise BangerError(
            Code.EXHAUSTED if full else Code.INVALID,
            f"the kernel {name!r} cannot be imported: {error.strerror}: {error.filename or kernels_dir}",
            hint="remove kernels, images or VMs that you no longer need" if full else "",
        ) from error
    return manifest


def refuse_taken(kernels_dir: Path, name: str, replace: bool) -> None:
    """Raise EXISTS when a name is taken and must not be replaced."""
    if not replace and (kernels_dir / name).exists():
        raise BangerError(Code.EXISTS, f"the kernel {name!r} exists already", hint="replace it with --force")


def _agree(what: str, actual: str, *claims: str | None) -> None:
    for claim in claims:
        if claim and claim != actual:
            raise BangerError(Code.INVALID, f"the {what} of this kernel is {actual!r}, not {claim!r}")


def _build(entry: Path, scratch: Path, data: bytes, kernel: Kernel, found: Found, job: Job) -> BootPlan:
    """Write all files of the entry but its manifest; `data` is the kernel file as it was found."""
    (entry / layout.VMLINUX).write_bytes(kernel.image)
    if kernel.bzimage and not kernel.pvh:
        (entry / layout.VMLINUZ).write_bytes(data)
    if found.initrd:
        system.copy_file_prefer_clone(found.initrd, entry / layout.INITRD)
    if found.config:
        config: str | None = read_bounded(found.config, _CONFIG_LIMIT).decode("ascii", "replace")
    else:
        config = embedded_config(kernel.image)
    if config is not None:
        (entry / layout.CONFIG).write_text(config)
    modules = _index_modules(found.modules, kernel.version, scratch, job) if found.modules else None
    plan = boot_plan(modules, config)
    if plan.fatal:
        raise BangerError(
            Code.UNSUPPORTED,
            f"no guest could boot with the kernel {kernel.version}: it lacks {', '.join(plan.fatal)}",
            hint="import the kernel together with its modules, or one built with these options",
        )
    if modules:
        job.progress("boot modules", total=len(plan.load), unit="modules")
        write_boot_modules(entry / layout.BOOT_MODULES, ((path, read_module(modules, path)) for path in plan.load))
        _pack_modules(modules, entry / layout.MODULES, job)
    return plan


def _index_modules(found: Path, version: str, scratch: Path, job: Job) -> Path:
    """A private lib/modules/<version> with the regular files of the one found, and with its indexes.

    Packages carry no modules.dep: it is the business of depmod, which runs when they are installed.
    """
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
    root = scratch / "indexed"
    target = root / "lib/modules" / version
    for directory, _, files in os.walk(source):
        inside = target / Path(directory).relative_to(source)
        inside.mkdir(parents=True)
        for file in files:
            job.check()
            path = Path(directory, file)
            if path.is_file() and not path.is_symlink():
                system.link_or_copy(path, inside / file)
    if not (target / "modules.dep").exists() or not (target / "modules.dep.bin").exists():
        job.progress("index", version)
        # the PATH of ordinary users may lack the directory of depmod
        environment = {**os.environ, "PATH": f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"}
        job.run(["depmod", "-b", root, version], env=environment)
    return target


def _pack_modules(modules: Path, output: Path, job: Job) -> None:
    """Pack a module directory as a squashfs whose root it is: owner root, time 0, whatever the host's files have."""
    files = sorted(path for path in modules.rglob("*") if path.is_dir() or path.is_file())
    total = sum(path.stat().st_size for path in files)
    done = 0
    argv: list[str | Path] = ["tar2sqfs", "--quiet", "--no-skip", "--compressor", _COMPRESSOR, output]
    with tempfile.TemporaryFile() as errors, job.popen(argv, stdin=-1, stdout=errors, stderr=errors) as packer:
        try:
            with tarfile.open(fileobj=packer.stdin, mode="w|", format=tarfile.GNU_FORMAT, bufsize=1 << 20) as archive:
                for path in files:
                    job.progress("pack modules", path.name, done, total)
                    if shutil.disk_usage(output.parent).free < _FREE_RESERVE:
                        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), os.fspath(output))
                    member = tarfile.TarInfo(path.relative_to(modules).as_posix())
                    if path.is_dir():
                        member.type, member.mode = tarfile.DIRTYPE, 0o755
                        archive.addfile(member)
                        continue
                    with open(path, "rb") as content:
                        member.size = os.fstat(content.fileno()).st_size
                        archive.addfile(member, content)
                    done += member.size
            if packer.stdin:
                packer.stdin.close()
            status = packer.wait()
        except BrokenPipeError:
            status = packer.wait()
        job.check()
        if status != 0:
            errors.seek(0)
            raise command_failed(argv, status, errors.read(1 << 20))
