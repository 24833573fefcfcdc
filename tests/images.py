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
INITS = "test-inits"  # MINIMAL with the programs that look after the processes of containers
SYSVINIT = "test-sysvinit"  # MINIMAL with sysvinit and OpenRC in place of systemd
# what is left out of MINIMAL for an image, and what is added
_MADE_OF_MINIMAL = {
    PODMAN: ((), ("podman", "crun", "busybox-static")),
    INITS: ((), ("catatonit", "dumb-init", "runit", "s6", "supervisor", "tini")),
    SYSVINIT: (("systemd-sysv",), ("openrc", "sysvinit-core")),
}
HOST_ARCH = {"x86_64": "amd64", "aarch64": "arm64"}[platform.machine()]


def cached_image(name: str, cache: Path | None = None) -> Path:
    """The images directory that holds an image of the catalog, or one of the above, to be used in place or linked from.

    It is kept in `cache` (by default in the system's temporary directory), by what the image is made of.
    """
    root = cache or Path(tempfile.gettempdir()) / f"banger-test-images-{os.getuid()}"
    made = name in _MADE_OF_MINIMAL
    entry = IMAGES.lookup(IMAGES.embedded().entries, MINIMAL if made else name, HOST_ARCH)
    if made:
        without, added = _MADE_OF_MINIMAL[name]
        packages = (*(package for package in entry.packages if package not in without), *added)
        entry = dataclasses.replace(entry, name=name, packages=packages)
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
