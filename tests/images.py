"""Real images for tests: Debian, built once and kept for all test runs of this machine."""

from __future__ import annotations

import dataclasses
import fcntl
import hashlib
import os
import platform
import tempfile
from pathlib import Path

from banger.debian import find_mirror
from banger.imagecat.catalog import IMAGES
from banger.imagecat.debian import mmdebstrap_command, pull_debian
from banger.imagecat.manifest import image_paths, list_local
from banger.job import Job

MINIMAL = "debian-bookworm-minimal"
PODMAN = "test-podman"  # MINIMAL with podman, and a static busybox to fill images of its own
HOST_ARCH = {"x86_64": "amd64", "aarch64": "arm64"}[platform.machine()]


def cached_image(name: str, cache: Path | None = None) -> Path:
    """The images directory that holds an image of the catalog, or PODMAN, ready to be used in place or linked from.

    It is kept in `cache` (by default in the system's temporary directory), by what the image is made of.
    """
    root = cache or Path(tempfile.gettempdir()) / f"banger-test-images-{os.getuid()}"
    entry = IMAGES.lookup(IMAGES.embedded().entries, MINIMAL if name == PODMAN else name, HOST_ARCH)
    if name == PODMAN:
        entry = dataclasses.replace(entry, name=PODMAN, packages=(*entry.packages, "podman", "crun", "busybox-static"))
    mirror = find_mirror()
    key = hashlib.sha256("\n".join(mmdebstrap_command(entry, mirror)).encode()).hexdigest()[:16]
    images = root / key / "images"
    images.mkdir(mode=0o700, parents=True, exist_ok=True)
    with open(root / f"{key}.lock", "wb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # test processes that run in parallel share one build
        if name not in [manifest.name for manifest in list_local(images)[0]]:
            pull_debian(images, entry, Job(), mirror=mirror, replace=True)
    return images


def minimal_image(cache: Path | None = None) -> Path:
    """The images directory that holds the image MINIMAL."""
    return cached_image(MINIMAL, cache)


def minimal_rootfs(cache: Path | None = None) -> Path:
    """The squashfs of the minimal image."""
    images = minimal_image(cache)
    (manifest,) = list_local(images)[0]
    return image_paths(images, manifest).rootfs
