"""Makes images of root filesystems that stay where they are."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from pathlib import Path

from banger import system
from banger.api.errors import BangerError, Code
from banger.disk import EXT4
from banger.fields import ARCHITECTURES
from banger.imagecat import registered
from banger.imagecat.build import (
    Publishing,
    no_root_filesystem,
    now,
    other_arch,
    parse_os_release,
    publish,
    refuse_existing,
)
from banger.imagecat.manifest import KERNEL, OWN_KERNEL, ImageManifest
from banger.imagecat.rootfs import filesystem_type, look_into
from banger.job import Job
from banger.kernelcat.importer import Claims, build_kernel
from banger.kernelcat.manifest import read_local
from banger.kernelcat.staged import Found


@dataclass(frozen=True)
class KernelFiles:
    """A kernel given by the absolute paths of its files: ELF or bzImage, initrd, and lib/modules/<version>."""

    kernel: Path
    initrd: Path | None = None
    modules: Path | None = None


def register_image(
    images_dir: Path,
    name: str,
    rootfs: Path,
    kernel: Path | KernelFiles,
    job: Job,
    *,
    work_seed: Path | None = None,
    replace: bool = False,
    publishing: Publishing = contextlib.nullcontext,
) -> ImageManifest:
    """Make the unmanaged image `name` of the ext4 or squashfs file `rootfs`, which stays where it is.

    `rootfs` and `work_seed` (ext4) are absolute; `kernel` is an installed one as for `build_image`, or files from which
    the image gets a kernel of its own; `publishing` is as there. Raises NOT_FOUND without one of the files, EXISTS
    without `replace`, INVALID for what is no such filesystem or not for the kernel's architecture, CORRUPT for a
    damaged one.
    """
    system.validate_name(name, "image")
    refuse_existing(images_dir / name, replace)
    files = kernel if isinstance(kernel, KernelFiles) else None
    parts = {registered.WORK_SEED: work_seed}
    if files is not None:
        parts |= {
            registered.KERNEL: files.kernel,
            registered.INITRD: files.initrd,
            registered.MODULES: files.modules,
        }
    given = {part: path for part, path in parts.items() if path is not None}
    for file in (rootfs, *given.values()):
        if file.resolve().is_relative_to(images_dir.resolve()):
            raise BangerError(
                Code.INVALID, f"{file} belongs to banger, which may remove it", hint="register a copy of it elsewhere"
            )
    filesystem = filesystem_type(rootfs)
    if work_seed is not None and filesystem_type(work_seed) != EXT4:
        raise BangerError(Code.INVALID, f"the work-seed {work_seed} is a squashfs, not an ext4 filesystem")
    _refuse_kinds(given)
    read = registered.register("rootfs", rootfs, job)
    others = tuple(registered.register(part, path, job) for part, path in given.items())
    tree = look_into(rootfs, filesystem, job)
    if tree.arch and tree.arch not in ARCHITECTURES:
        raise no_root_filesystem(str(rootfs), tree.arch)
    os_release = parse_os_release(tree.os_release)
    with system.staging(images_dir, name) as staged:
        if files is not None:
            found = Found(kernel=files.kernel, initrd=files.initrd, modules=files.modules)
            claims = Claims(source=f"register:{files.kernel}")
            arch = build_kernel(staged / KERNEL, OWN_KERNEL, found, job, claims=claims).arch
            if tree.arch not in ("", arch):
                raise other_arch(name, tree.arch, str(files.kernel), arch)
        else:
            assert isinstance(kernel, Path)
            arch = read_local(kernel.parent, kernel.name).arch
        for part in (read, *others):
            registered.refuse_changed(part)
        manifest = ImageManifest(
            name=name,
            # a tree that tells nothing is taken for what its kernel is for
            arch=tree.arch or arch,
            source=str(rootfs),
            imported_at=now(),
            rootfs=str(rootfs),
            rootfs_sha256=read.sha256,
            size_bytes=read.size_bytes,
            distro=os_release.get("ID", ""),
            pretty_name=os_release.get("PRETTY_NAME", ""),
            kernel_ref=kernel.name if isinstance(kernel, Path) else "",
            own_kernel=files is not None,
            managed=False,
            filesystem=filesystem,
            rootfs_mtime_ns=read.mtime_ns,
            work_seed=str(work_seed or ""),
            registered=others,
        )
        publish(staged, images_dir, manifest, kernel if isinstance(kernel, Path) else None, job, replace, publishing)
    return manifest


def _refuse_kinds(given: dict[str, Path]) -> None:
    """Raise an error for a part that is not there, or a directory where a file is wanted, or the other way round."""
    for part, path in given.items():
        if not path.exists():
            raise BangerError(Code.NOT_FOUND, f"{path} does not exist")
        if part == registered.MODULES and not path.is_dir():
            raise BangerError(
                Code.INVALID, f"{path} is not a directory", hint="modules are a lib/modules/<version> directory"
            )
        if part != registered.MODULES and not path.is_file():
            raise BangerError(Code.INVALID, f"{path} is not a regular file")
