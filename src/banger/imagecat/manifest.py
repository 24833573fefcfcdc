"""The local image catalog: one directory per image, valid when its manifest.json is."""

from __future__ import annotations

import contextlib
import os
from dataclasses import dataclass, field
from pathlib import Path

from banger import entries, system
from banger.api.errors import BangerError, Code
from banger.disk import EXT4, SQUASHFS
from banger.entries import MANIFEST, BrokenEntry, Manifest
from banger.fields import Fields
from banger.imagecat import registered
from banger.imagecat.home import usable
from banger.imagecat.registered import Registered
from banger.job import Job
from banger.kernelcat import manifest as kernels
from banger.kernelcat.manifest import KernelManifest

ROOTFS_SQUASHFS = "rootfs.squashfs"
ROOTFS_EXT4 = "rootfs.ext4"
WORK_SEED = "work-seed.ext4"
CONFIG = "config.json"  # the configuration of an OCI image, as its registry has it
KERNEL = "kernel"  # the directory with the image's own copy of its kernel
OWN_KERNEL = "@image"  # the name of a kernel that only its image has: no installed one can be called so

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
    exposed_ports: tuple[str, ...] = ()  # "8080/tcp"
    stop_signal: str = ""  # "SIGTERM", "15"
    healthcheck: tuple[str, ...] = ()  # the words of its command


@dataclass(frozen=True)
class Layer:
    """A layer that an image was made of: digests ("sha256:...") of its blob and of the tar in that; the blob's size."""

    digest: str
    diff_id: str
    size_bytes: int


@dataclass(frozen=True)
class ImageManifest(Manifest):
    """What is known about an image.

    `rootfs` is a file name inside the image's directory, or an absolute path when banger does not manage the file;
    `filesystem` ("squashfs" or "ext4"), `size_bytes` and `rootfs_sha256` are that file's. Of an unmanaged one there are
    also its `rootfs_mtime_ns`, `work_seed`, the absolute path of its seed or "", and `registered`, all that was given
    by path besides. `imported_at` is UTC, RFC 3339; `distro` and `pretty_name` come from os-release; `kernel_ref` names
    the kernel that its VMs boot unless told otherwise ("" for the default one), `own_kernel` says that the one in
    KERNEL is no copy of an installed one; `init` is "agent" when banger's agent stays PID 1 and "image" when it starts
    the image's own init. `home` is the directory that the home disks of its VMs are mounted on; `key_fingerprint`
    ("SHA256:...") tells which SSH key its own work-seed lets in, "" when none was put in yet.

    Of a pulled image `origin` is its catalog entry ("catalog/name", "" without one) and `revision` tells one release
    from the next: the digest of the manifest or index that a reference stood for, or the SHA-256 of a bundle. `layers`
    are those of an OCI image, the lowest first; its configuration lies beside the manifest in CONFIG.
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
    own_kernel: bool = False
    managed: bool = True
    filesystem: str = SQUASHFS
    rootfs_mtime_ns: int = 0
    work_seed: str = ""
    registered: tuple[Registered, ...] = ()
    init: str = "agent"
    config: ImageConfig = field(default_factory=ImageConfig)
    home: str = "/root"
    key_fingerprint: str = ""
    origin: str = ""
    revision: str = ""
    layers: tuple[Layer, ...] = ()


@dataclass(frozen=True)
class ImagePaths:
    """The files of an image; `work_seed` is None when it has none."""

    rootfs: Path
    work_seed: Path | None


def parse_manifest(text: str | bytes, where: str = MANIFEST) -> ImageManifest:
    """Read a manifest strictly; raises `BangerError(CORRUPT)` naming the field that is wrong."""
    fields = Fields.parse(text, where)
    config = fields.object("config")
    rootfs = fields.text("rootfs")
    manifest = ImageManifest(
        name=fields.text("name"),
        arch=fields.arch(),
        source=fields.text("source"),
        imported_at=fields.utc_time("imported_at"),
        rootfs=rootfs,
        rootfs_sha256=fields.sha256("rootfs_sha256"),
        size_bytes=fields.number("size_bytes", 0),
        distro=fields.text("distro", ""),
        pretty_name=fields.text("pretty_name", ""),
        kernel_ref=fields.text("kernel_ref", ""),
        own_kernel=fields.flag("own_kernel"),
        managed=fields.flag("managed"),
        filesystem=fields.text("filesystem", EXT4 if rootfs == ROOTFS_EXT4 else SQUASHFS),
        rootfs_mtime_ns=fields.number("rootfs_mtime_ns", 0),
        work_seed=fields.text("work_seed", ""),
        registered=tuple(
            _registered(entry) for entry in (fields.objects("registered") if fields.has("registered") else [])
        ),
        init=fields.text("init", "agent"),
        config=ImageConfig(
            entrypoint=config.texts("entrypoint"),
            cmd=config.texts("cmd"),
            env=config.texts("env"),
            user=config.text("user", ""),
            workdir=config.text("workdir", ""),
            volumes=config.texts("volumes"),
            exposed_ports=config.texts("exposed_ports"),
            stop_signal=config.text("stop_signal", ""),
            healthcheck=config.texts("healthcheck"),
        ),
        home=fields.text("home", "/root"),
        key_fingerprint=fields.text("key_fingerprint", ""),
        origin=fields.text("origin", ""),
        revision=fields.text("revision", ""),
        layers=tuple(
            Layer(layer.text("digest"), layer.text("diff_id"), layer.number("size_bytes", 0))
            for layer in (fields.objects("layers") if fields.has("layers") else [])
        ),
    )
    if manifest.init not in _INITS:
        raise fields.wrong("init", " or ".join(_INITS))
    if manifest.managed and manifest.rootfs not in (ROOTFS_SQUASHFS, ROOTFS_EXT4):
        raise fields.wrong("rootfs", f"{ROOTFS_SQUASHFS} or {ROOTFS_EXT4}")
    if not manifest.managed and not _is_absolute(manifest.rootfs):
        raise fields.wrong("rootfs", "an absolute path")
    if manifest.filesystem not in (SQUASHFS, EXT4):
        raise fields.wrong("filesystem", f"{SQUASHFS} or {EXT4}")
    if manifest.work_seed and (manifest.managed or not _is_absolute(manifest.work_seed)):
        raise fields.wrong("work_seed", "an absolute path, of an unmanaged image")
    if not manifest.home or usable(manifest.home) != manifest.home:
        raise fields.wrong("home", "the path of a home directory")
    if manifest.kernel_ref:
        try:
            system.validate_name(manifest.kernel_ref, "kernel")
        except BangerError as error:
            raise fields.wrong("kernel_ref", "the name of a kernel") from error
    return manifest


def _registered(fields: Fields) -> Registered:
    entry = Registered(
        fields.text("part"),
        fields.text("path"),
        fields.number("size_bytes", 0),
        fields.number("mtime_ns", 0),
        fields.sha256("sha256"),
    )
    if entry.part not in registered.PARTS:
        raise fields.wrong("part", " or ".join(registered.PARTS))
    if not _is_absolute(entry.path):
        raise fields.wrong("path", "an absolute path")
    return entry


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
    # joining an absolute path, as unmanaged images have it, gives that path
    work_seed = entry / (manifest.work_seed or WORK_SEED)
    return ImagePaths(entry / manifest.rootfs, work_seed if work_seed.is_file() else None)


def kernel_of(images_dir: Path, kernels_dir: Path, image: ImageManifest) -> tuple[KernelManifest, Path] | None:
    """The kernel of an image and the directory of its files: the installed one of that name, else the image's own copy.

    None without a reference, and when neither can be used. Raises CORRUPT for a damaged kernel that only the image has.
    """
    held = images_dir / image.name / KERNEL
    if image.own_kernel:
        try:
            return kernels.read_at(held, OWN_KERNEL), held
        except BangerError as error:
            raise BangerError(
                Code.CORRUPT,
                f"the kernel of the image {image.name!r} is broken: {error.message}",
                hint="make the image again with --force, or boot another kernel with --kernel",
            ) from error
    for directory in (kernels_dir / image.kernel_ref, held):
        with contextlib.suppress(BangerError):
            kernel = kernels.read_at(directory, image.kernel_ref)
            if kernel.arch == image.arch:
                return kernel, directory
    return None


def images_with_kernel(images_dir: Path, name: str) -> list[str]:
    """The images that refer to a kernel, those without their root filesystem too."""
    found, _ = entries.read_all(images_dir, _parse_entry)
    return [image.name for image in found if image.kernel_ref == name]


def images_by_layer(images_dir: Path) -> dict[str, list[str]]:
    """The images that were made of each layer, by the digest of its blob."""
    users: dict[str, list[str]] = {}
    for image in entries.read_all(images_dir, _parse_entry)[0]:
        for digest in {layer.digest for layer in image.layers}:
            users.setdefault(digest, []).append(image.name)
    return users


def disk_usage(images_dir: Path, name: str) -> int:
    """Bytes that the files in an image's directory take on disk."""
    return sum(system.allocated_bytes(Path(file)) for file in os.scandir(images_dir / name) if file.is_file())


def own_bytes(entry: Path) -> int:
    """Bytes that are free again without this entry: those of files that nothing else links to."""
    files = [file.stat(follow_symlinks=False) for file in entry.rglob("*") if file.is_file()]
    return sum(status.st_blocks * 512 for status in files if status.st_nlink == 1)


def verify_local(images_dir: Path, name: str, job: Job) -> str:
    """Read an image again, all of it: what is wrong with it, '' when nothing is. Raises NOT_FOUND."""
    try:
        while True:
            try:
                read_local(images_dir, name)  # says so when it is not there
            except BangerError as error:
                if error.code is not Code.CORRUPT:
                    raise
            problem = entries.steadily(images_dir / name, lambda entry: _changed(entry, job))
            if problem is not None:
                return problem
    except BangerError as error:
        if error.code is not Code.CORRUPT:
            raise
        return error.message
    except OSError as error:
        return f"{error.filename} cannot be read: {error.strerror}"


def _changed(entry: Path, job: Job) -> str:
    manifest = _load(entry)
    rootfs = entry / manifest.rootfs
    job.progress("verify", str(rootfs) if not manifest.managed else f"{entry.name}/{manifest.rootfs}")
    found = entries.sum_file(rootfs, job)
    if found != manifest.rootfs_sha256:
        return registered.content_changed(manifest.rootfs, found, manifest.rootfs_sha256)
    for file in manifest.registered:
        if problem := registered.changed(file, job):
            return problem
    if (entry / KERNEL).exists():
        problem = kernels.changed_at(entry / KERNEL, OWN_KERNEL if manifest.own_kernel else manifest.kernel_ref, job)
        return f"{KERNEL}/{problem}" if problem else ""
    return ""


def _parse_entry(entry: Path) -> ImageManifest:
    return entries.load(entry, "image", parse_manifest)


def _load(entry: Path) -> ImageManifest:
    manifest = _parse_entry(entry)
    if not manifest.managed:
        if problem := registered_problem(manifest):
            hint = f"register it again with --force, or remove it with 'banger image rm {manifest.name}'"
            raise BangerError(Code.CORRUPT, problem, hint=hint)
        return manifest
    rootfs = entry / manifest.rootfs
    if not rootfs.is_file():
        raise BangerError(Code.CORRUPT, f"{manifest.rootfs} is missing")
    if rootfs.stat().st_size != manifest.size_bytes:
        raise BangerError(Code.CORRUPT, f"{manifest.rootfs} does not have the size that {MANIFEST} says")
    return manifest


def registered_problem(manifest: ImageManifest) -> str:
    """How an unmanaged image's files are no longer those that were registered, '' when they are."""
    rootfs = Registered(
        "rootfs", manifest.rootfs, manifest.size_bytes, manifest.rootfs_mtime_ns, manifest.rootfs_sha256
    )
    if problem := registered.problem(rootfs):
        return problem
    if not manifest.registered and manifest.work_seed and not Path(manifest.work_seed).exists():
        return f"{manifest.work_seed} is gone"
    return next(filter(None, map(registered.problem, manifest.registered)), "")


def _is_absolute(path: str) -> bool:
    return path.startswith("/") and "\0" not in path
