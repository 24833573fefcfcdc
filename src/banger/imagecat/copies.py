"""Copies of local images: an unmanaged one made banger's own, and a further name for the same content."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import os
from collections.abc import Iterator
from pathlib import Path

from banger import entries, system
from banger.api.errors import BangerError, Code
from banger.disk import EXT4, space
from banger.entries import MANIFEST
from banger.imagecat import registered
from banger.imagecat.build import Publishing, refuse_existing
from banger.imagecat.manifest import (
    KERNEL,
    ROOTFS_EXT4,
    ROOTFS_SQUASHFS,
    WORK_SEED,
    ImageManifest,
    read_local,
    write_local,
)
from banger.job import Job
from banger.kernelcat import manifest as kernels

_CHUNK = 1 << 20
_ZEROS = bytes(_CHUNK)


def promote_image(
    images_dir: Path, name: str, job: Job, *, publishing: Publishing = contextlib.nullcontext
) -> ImageManifest:
    """Copy the files of an unmanaged image into its directory, by reflink where possible, and manage them from now on.

    What is copied is checked against what was registered. Raises NOT_FOUND without the image, WRONG_STATE for a managed
    one, CORRUPT when a file has changed or is gone, EXHAUSTED without disk space.
    """
    manifest = read_local(images_dir, name)
    if manifest.managed:
        raise BangerError(
            Code.WRONG_STATE,
            f"the image {name!r} is managed already: its files are banger's own",
            hint="only images made by 'banger image register' can be promoted",
        )
    rootfs = ROOTFS_EXT4 if manifest.filesystem == EXT4 else ROOTFS_SQUASHFS
    copies = {rootfs: (Path(manifest.rootfs), manifest.rootfs_sha256)}
    if manifest.work_seed:
        # images that an earlier version registered have no digest of it
        digests = {part.path: part.sha256 for part in manifest.registered}
        copies[WORK_SEED] = (Path(manifest.work_seed), digests.get(manifest.work_seed, ""))
    promoted = dataclasses.replace(
        manifest, rootfs=rootfs, managed=True, rootfs_mtime_ns=0, work_seed="", registered=()
    )
    with system.staging(images_dir, name) as staged, _told_of(name, images_dir):
        for file, (source, digest) in copies.items():
            found = _copy(source, staged / file, job)
            if digest and found != digest:
                raise BangerError(
                    Code.CORRUPT,
                    registered.content_changed(str(source), found, digest),
                    hint=f"register it again with --force, or remove it with 'banger image rm {name}'",
                )
        write_local(staged, promoted)
        job.progress("publish", name)
        entry = images_dir / name
        system.sync_tree(staged)  # the slow part of the publication, before the lock is taken
        with publishing():
            if not entry.exists() or read_local(images_dir, name) != manifest:
                raise _replaced(name)
            _link_files(entry, staged)
            system.publish(staged, entry)
    return promoted


def tag_image(
    images_dir: Path,
    source: str,
    target: str,
    job: Job,
    *,
    replace: bool = False,
    publishing: Publishing = contextlib.nullcontext,
) -> ImageManifest:
    """Give the content of an image a further name; files are hard-linked, or copied where that is not possible.

    Raises NOT_FOUND without the image, EXISTS for a taken name without `replace`, INVALID for the same name.
    """
    system.validate_name(target, "image")
    read_local(images_dir, source)
    if source == target:
        raise BangerError(Code.INVALID, f"the image {source!r} has this name already", hint="give another name")
    refuse_existing(images_dir / target, replace)
    with _told_of(target, images_dir), system.staging(images_dir, target) as staged:
        entry = staged / "entry"
        tagged = dataclasses.replace(hold_image(images_dir, source, entry), name=target)
        write_local(entry, tagged)
        job.progress("publish", target)
        system.sync_tree(entry)
        with publishing():
            refuse_existing(images_dir / target, replace)
            system.publish(entry, images_dir / target)
    return tagged


def hold_image(images_dir: Path, name: str, target: Path) -> ImageManifest:
    """Give the new directory `target` the files of an image but its manifest, whatever becomes of that.

    They are linked where that is possible; those of an unmanaged image stay where they are. Raises as `read_local`.
    """

    def link(entry: Path) -> ImageManifest:
        manifest = read_local(images_dir, name)
        system.remove_tree(target)
        target.mkdir(mode=0o755)
        _link_files(entry, target)
        return manifest

    while True:
        read_local(images_dir, name)  # says so when it is not there
        manifest = entries.steadily(images_dir / name, link)
        if manifest is not None:
            return manifest


def _link_files(entry: Path, target: Path) -> None:
    """Link the files of the image in `entry` into the directory `target`, but for its manifest and what is there."""
    there = {MANIFEST, *(file.name for file in target.iterdir())}
    for file in entry.iterdir():
        if file.is_file() and file.name not in there and not file.name.startswith("."):
            system.link_or_copy(file, target / file.name)
    if (entry / KERNEL).is_dir():
        kernels.link_files(entry / KERNEL, target / KERNEL)


def _copy(source: Path, target: Path, job: Job) -> str:
    """Copy a file, by reflink or its data without the holes, and return the SHA-256 of what was written."""
    digest = hashlib.sha256()
    with (
        open(source, "rb", buffering=0, opener=system.open_regular) as reader,
        open(target, "xb+", buffering=0) as copy,
    ):
        size = os.fstat(reader.fileno()).st_size
        cloned = system.clone_file(reader.fileno(), copy.fileno())
        if not cloned:
            os.truncate(copy.fileno(), size)
        origin = copy if cloned else reader
        done = 0
        for start, end in system.data_extents(origin.fileno()):
            _add_zeros(digest, start - done)
            done = start
            while done < end and (chunk := os.pread(origin.fileno(), min(_CHUNK, end - done), done)):
                digest.update(chunk)
                if not cloned:
                    system.write_at(copy.fileno(), chunk, done)
                done += len(chunk)
                job.progress("copy", source.name, done, size)
        _add_zeros(digest, size - done)
    target.chmod(0o644)
    return digest.hexdigest()


def _add_zeros(digest: hashlib._Hash, count: int) -> None:
    """Add a hole of a file to its digest."""
    while count > 0:
        digest.update(_ZEROS[:count])
        count -= len(_ZEROS)


@contextlib.contextmanager
def _told_of(name: str, images_dir: Path) -> Iterator[None]:
    """Tell the system's errors as those of writing the image `name`."""
    try:
        yield
    except OSError as error:
        full = space.means_full(error)
        raise BangerError(
            Code.EXHAUSTED if full else Code.INVALID,
            f"the image {name!r} cannot be written: {error.strerror}: {error.filename or images_dir}",
            hint="remove images or VMs that you no longer need" if full else "",
        ) from error


def _replaced(name: str) -> BangerError:
    return BangerError(Code.IN_USE, f"the image {name!r} was replaced or removed meanwhile", hint="try again")
