"""The local image catalog: one directory per image, valid when its manifest.json is."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass, field
from pathlib import Path

from banger import entries, system
from banger.api.errors import BangerError, Code
from banger.entries import MANIFEST, BrokenEntry, Manifest
from banger.fields import Fields
from banger.job import Job

ROOTFS_SQUASHFS = "rootfs.squashfs"
ROOTFS_EXT4 = "rootfs.ext4"
WORK_SEED = "work-seed.ext4"

_INITS = ("agent", "image")


@dataclass(frozen=True)
class ImageConfig:
    """What a container image says about its main process (OCI Image Configuration 1.1, "config")."""

    entrypoint: tuple[str, ...] = ()
    cmd: tuple[str, ...] = ()
    env: tuple[str, ...] = ()
    user: str = ""
    workdir: str = ""
    volumes: tuple[str, ...] = ()


@dataclass(frozen=True)
class ImageManifest(Manifest):
    """What is known about an image.

    `rootfs` is a file name inside the image's directory, or an absolute path when banger does not manage the file;
    `size_bytes` and `rootfs_sha256` are that file's; `imported_at` is UTC, RFC 3339; `distro` and `pretty_name` come
    from os-release; `kernel_ref` names the kernel that its VMs boot unless told otherwise ("" for the default one);
    `init` is "agent" when banger's agent stays PID 1 and "image" when it starts the image's own init.
    """

    arch: str
    source: str
    imported_at: str
    rootfs: str
    rootfs_sha256: str
    size_bytes: int
    distro: str = ""
    pretty_name: str = ""
    kernel_ref: str = ""
    managed: bool = True
    init: str = "agent"
    config: ImageConfig = field(default_factory=ImageConfig)


@dataclass(frozen=True)
class ImagePaths:
    """The files of an image; `work_seed` is None when it has none."""

    rootfs: Path
    work_seed: Path | None


def parse_manifest(text: str | bytes, where: str = MANIFEST) -> ImageManifest:
    """Read a manifest strictly; raises `BangerError(CORRUPT)` naming the field that is wrong."""
    fields = Fields.parse(text, where)
    config = Fields(json.loads(text).get("config", {}), f"'config' of {where}")
    manifest = ImageManifest(
        name=fields.text("name"),
        arch=fields.arch(),
        source=fields.text("source"),
        imported_at=fields.utc_time("imported_at"),
        rootfs=fields.text("rootfs"),
        rootfs_sha256=fields.sha256("rootfs_sha256"),
        size_bytes=fields.number("size_bytes", 0),
        distro=fields.text("distro", ""),
        pretty_name=fields.text("pretty_name", ""),
        kernel_ref=fields.text("kernel_ref", ""),
        managed=fields.flag("managed"),
        init=fields.text("init", "agent"),
        config=ImageConfig(
            entrypoint=config.texts("entrypoint"),
            cmd=config.texts("cmd"),
            env=config.texts("env"),
            user=config.text("user", ""),
            workdir=config.text("workdir", ""),
            volumes=config.texts("volumes"),
        ),
    )
    if manifest.init not in _INITS:
        raise fields.wrong("init", " or ".join(_INITS))
    if manifest.managed and manifest.rootfs not in (ROOTFS_SQUASHFS, ROOTFS_EXT4):
        raise fields.wrong("rootfs", f"{ROOTFS_SQUASHFS} or {ROOTFS_EXT4}")
    if not manifest.managed and not manifest.rootfs.startswith("/"):
        raise fields.wrong("rootfs", "an absolute path")
    return manifest


def read_local(images_dir: Path, name: str) -> ImageManifest:
    """The manifest of a local image.

    Raises NOT_FOUND with the nearest name, CORRUPT when the entry is broken.
    """
    return entries.read(images_dir, "image", name, _load)


def list_local(images_dir: Path) -> tuple[list[ImageManifest], list[BrokenEntry]]:
    """All local images by name, and the directories that are not usable images."""
    return entries.read_all(images_dir, _load)


def write_local(entry: Path, manifest: ImageManifest) -> None:
    """Write the manifest into the (staged) directory of its image."""
    entries.write(entry, manifest)


def delete_local(images_dir: Path, name: str) -> None:
    """Remove an image, broken or not, but not the files of an unmanaged one; raises NOT_FOUND."""
    entries.delete(images_dir, "image", name)


def image_paths(images_dir: Path, manifest: ImageManifest) -> ImagePaths:
    """Where the files of an image are."""
    entry = images_dir / manifest.name
    work_seed = entry / WORK_SEED
    # joining an absolute path, as unmanaged images have it, gives that path
    return ImagePaths(entry / manifest.rootfs, work_seed if work_seed.is_file() else None)


def disk_usage(images_dir: Path, name: str) -> int:
    """Bytes that the files in an image's directory take on disk."""
    return sum(system.allocated_bytes(Path(file)) for file in os.scandir(images_dir / name) if file.is_file())


def rootfs_digest(path: Path, job: Job) -> str:
    """The SHA-256 of a file in hexadecimal."""
    digest = hashlib.sha256()
    with open(path, "rb", buffering=0) as stream:
        while chunk := stream.read(4 << 20):
            job.check()
            digest.update(chunk)
    return digest.hexdigest()


def _load(entry: Path) -> ImageManifest:
    manifest = entries.load(entry, "image", parse_manifest)
    rootfs = entry / manifest.rootfs
    if not rootfs.is_file():
        raise BangerError(Code.CORRUPT, f"{manifest.rootfs} is missing")
    if rootfs.stat().st_size != manifest.size_bytes:
        raise BangerError(Code.CORRUPT, f"{manifest.rootfs} does not have the size that {MANIFEST} says")
    return manifest
