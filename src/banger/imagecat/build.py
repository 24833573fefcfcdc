"""Makes images of tar streams and publishes them.

With all that it imports it uses the standard library alone: `make run` builds its first image while packages are
installed.
"""

from __future__ import annotations

import contextlib
import shlex
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

from banger import system
from banger.api.errors import BangerError, Code
from banger.disk.squashfs import Contents, TarSource, write_squashfs
from banger.disk.work_seed import make_work_seed
from banger.entries import sum_file
from banger.fields import ARCHITECTURES
from banger.imagecat.home import home_of
from banger.imagecat.manifest import (
    KERNEL,
    ROOTFS_SQUASHFS,
    WORK_SEED,
    ImageConfig,
    ImageManifest,
    Layer,
    read_local,
    write_local,
)
from banger.job import Job
from banger.kernelcat.manifest import hold

Publishing = Callable[[], AbstractContextManager[object]]


def build_image(
    images_dir: Path,
    name: str,
    job: Job,
    open_tar: TarSource,
    *,
    label: str,
    source: str,
    kernel: Path | None = None,
    init: str = "agent",
    config: ImageConfig | None = None,
    origin: str = "",
    revision: str = "",
    replace: bool = False,
    publishing: Publishing = contextlib.nullcontext,
) -> ImageManifest:
    """Make the image `name` of a tar stream and publish it in one step.

    `open_tar` opens the stream, again if need be (see `write_squashfs`); `label` names it in errors; `source`, `origin`
    and `revision` are those of the manifest; `kernel` is the entry of the installed kernel that the image refers to,
    whose files it gets as its own; `publishing` is entered only for the last checks and the rename.
    """
    system.validate_name(name, "image")
    refuse_existing(images_dir / name, replace)
    with system.staging(images_dir, name) as staged:
        contents = write_squashfs(open_tar, staged / ROOTFS_SQUASHFS, job, label)
        kernel_ref = kernel.name if kernel else ""
        facts = Facts(label, source, kernel_ref, init, config or ImageConfig(), origin, revision)
        manifest = finalize_rootfs(staged, name, contents, facts, job)
        publish(staged, images_dir, manifest, kernel, job, replace, publishing)
    return manifest


@dataclass(frozen=True)
class Facts:
    """What is known of a new image besides its tree: `label` names it in errors, all else is as in its manifest."""

    label: str
    source: str
    kernel_ref: str = ""
    init: str = "agent"
    config: ImageConfig = field(default_factory=ImageConfig)
    origin: str = ""
    revision: str = ""
    layers: tuple[Layer, ...] = ()


def finalize_rootfs(staged: Path, name: str, contents: Contents, facts: Facts, job: Job) -> ImageManifest:
    """The manifest of a new managed image whose squashfs lies in `staged`; its work-seed is put beside that.

    Raises CORRUPT for a tree without programs, UNSUPPORTED for programs of another architecture.
    """
    rootfs = staged / ROOTFS_SQUASHFS
    if contents.arch not in ARCHITECTURES:
        raise no_root_filesystem(facts.label, contents.arch)
    os_release = parse_os_release(contents.os_release)
    home = home_of(rootfs, facts.config.user, job)
    make_work_seed(rootfs, home, staged / WORK_SEED, (), job)
    job.progress("digest", name)
    return ImageManifest(
        name=name,
        arch=contents.arch,
        source=facts.source,
        imported_at=now(),
        rootfs=rootfs.name,
        rootfs_sha256=sum_file(rootfs, job),
        size_bytes=rootfs.stat().st_size,
        distro=os_release.get("ID", ""),
        pretty_name=os_release.get("PRETTY_NAME", ""),
        kernel_ref=facts.kernel_ref,
        init=facts.init,
        config=facts.config,
        home=home,
        origin=facts.origin,
        revision=facts.revision,
        layers=facts.layers,
    )


def publish(
    staged: Path,
    images_dir: Path,
    manifest: ImageManifest,
    kernel: Path | None,
    job: Job,
    replace: bool,
    publishing: Publishing,
) -> None:
    """Complete a staged image with its manifest and kernel and make it appear."""
    write_local(staged, manifest)
    job.progress("publish", manifest.name)
    system.sync_tree(staged)  # the slow part of the publication, before the lock is taken
    target = images_dir / manifest.name
    with publishing():
        refuse_existing(target, replace)
        if kernel is not None:
            held = hold(kernel.parent, kernel.name, staged / KERNEL)
            system.sync_tree(staged / KERNEL)  # links to what is on disk already
            if held.arch != manifest.arch:
                raise other_arch(manifest.name, manifest.arch, kernel.name, held.arch)
        system.publish(staged, target)


def now() -> str:
    """This second in UTC, RFC 3339."""
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def parse_os_release(text: bytes) -> dict[str, str]:
    """The assignments of an os-release file (os-release(5)); lines that are none are left out."""
    values: dict[str, str] = {}
    for line in text.decode(errors="replace").splitlines():
        key, equals, value = line.strip().partition("=")
        if not equals or key.startswith("#"):
            continue
        with contextlib.suppress(ValueError):  # an open quotation
            printable = "".join(character for character in "".join(shlex.split(value)) if character.isprintable())
            values[key] = printable[:200]
    return values


def refuse_existing(target: Path, replace: bool) -> None:
    if target.exists() and not replace:
        raise BangerError(
            Code.EXISTS,
            f"there already is an image {target.name!r}",
            hint="choose another name, or add --force to replace it",
        )


def find_present(
    images_dir: Path,
    name: str,
    kernel: Path | None,
    belongs: Callable[[ImageManifest], bool],
    difference: Callable[[ImageManifest], str],
) -> ImageManifest | None:
    """The image `name` if it is the very one that is to be pulled, None if there is none; raises EXISTS for another.

    `belongs` says whether one comes from the same place, `difference` what it has other than the new one, '' for
    nothing; `kernel` is as for `build_image`.
    """
    if not (images_dir / name).exists():
        return None
    instead = "'banger image pull' gives the new one another name with --as, or replaces that one with --force"
    try:
        there = read_local(images_dir, name)
    except BangerError as error:
        if error.code is Code.NOT_FOUND:  # it was removed meanwhile
            return None
        raise BangerError(Code.EXISTS, f"there already is an image {name!r}, and it is broken", hint=instead) from error
    if not belongs(there):
        raise BangerError(
            Code.EXISTS,
            f"the name {name!r} belongs to an image from {there.source}",
            hint=instead,
        )
    different = difference(there)
    if kernel is not None and kernel.name != there.kernel_ref:
        different = f"its kernel is {repr(there.kernel_ref) if there.kernel_ref else 'the default one'}"
    if different:
        raise BangerError(Code.EXISTS, f"there already is an image {name!r}, and {different}", hint=instead)
    return there


def other_arch(image: str, arch: str, kernel: str, kernel_arch: str) -> BangerError:
    """The error for an image and a kernel that do not fit."""
    return BangerError(
        Code.INVALID,
        f"the image {image!r} is for {arch}, the kernel {kernel!r} for {kernel_arch}",
        hint="use another kernel: see 'banger kernel list'",
    )


def no_root_filesystem(label: str, arch: str) -> BangerError:
    """The error for a tree whose programs are for `arch`, '' when it has none."""
    if arch:
        return BangerError(
            Code.UNSUPPORTED,
            f"the programs in {label} are for {arch}, which banger cannot run",
            hint=f"use an image for {' or '.join(ARCHITECTURES)}",
        )
    return BangerError(
        Code.CORRUPT,
        f"{label} is no root filesystem: there is no program in it",
        hint="the archive must hold the directories of the root itself, such as bin/ and etc/, not one above them",
    )
