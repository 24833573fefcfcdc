"""Keeps the work-seeds of managed images up to date with the user's SSH key."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

from banger import system
from banger.disk.work_seed import prepare_home
from banger.entries import MANIFEST
from banger.imagecat.manifest import WORK_SEED, ImageManifest, image_paths, read_local, write_local
from banger.job import Job
from banger.ssh_keys import SshKey


def refresh_seed(
    images_dir: Path,
    image: ImageManifest,
    key: SshKey,
    publishing: Callable[[], AbstractContextManager[object]],
    job: Job,
) -> ImageManifest:
    """The image as it is once its work-seed lets in `key`; a seed that was made elsewhere is repaired as well.

    Unmanaged seeds are left alone. `publishing` is entered only to put the new seed in its place. Raises NOT_FOUND when
    the image is removed meanwhile.
    """
    while image.managed and image.key_fingerprint != key.fingerprint:
        seed = image_paths(images_dir, image).work_seed
        if seed is None:
            break
        with system.staging(images_dir, image.name) as staged:
            fresh = staged / WORK_SEED
            try:
                system.copy_file_prefer_clone(seed, fresh)
            except FileNotFoundError:
                image = read_local(images_dir, image.name)
                continue
            prepare_home(fresh, [key.public], job)
            _fsync(fresh)
            renewed = dataclasses.replace(image, key_fingerprint=key.fingerprint)
            write_local(staged, renewed)
            with publishing():
                current = read_local(images_dir, image.name)
                if current == image:
                    # the seed first: should the manifest not follow, all this is done again
                    fresh.rename(seed)
                    (staged / MANIFEST).rename(seed.parent / MANIFEST)
                    system.fsync_directory(seed.parent)
                    return renewed
        image = current
    return image


def _fsync(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
