"""Images as bundles: fetched in one pass over what arrives, and written, the same bytes on any machine.

A bundle is a tar.zst with manifest.json first, then rootfs.squashfs or rootfs.ext4, and perhaps work-seed.ext4 and
config.json. Its manifest has those fields of an image's manifest that mean the same everywhere: PUBLISHED.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Generator, Iterable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import BinaryIO

from banger import archives, download, system
from banger.api import models as m
from banger.api.errors import BangerError, Code
from banger.archives import Bounds, plain_member
from banger.catalogs.format import origin_of, revision
from banger.disk import EXT4, space, tar
from banger.disk.tar import Member, TarReader
from banger.disk.work_seed import make_work_seed
from banger.entries import MANIFEST, sum_file
from banger.fields import Fields
from banger.imagecat.build import Publishing, now, publish, refuse_existing
from banger.imagecat.catalog import CatalogEntry
from banger.imagecat.manifest import (
    CONFIG,
    ROOTFS_EXT4,
    ROOTFS_SQUASHFS,
    WORK_SEED,
    ImageManifest,
    parse_manifest,
)
from banger.imagecat.rootfs import filesystem_type
from banger.job import Job

PUBLISHED = (
    "arch",
    "rootfs",
    "rootfs_sha256",
    "size_bytes",
    "distro",
    "pretty_name",
    "kernel_ref",
    "init",
    "config",
    "home",
    "layers",
)

_LIMIT = 64 << 30  # bytes, packed or not, as for images that are imported
_SMALL_LIMIT = 4 << 20  # bytes of manifest.json and config.json
_CHECK_EVERY = 32 << 20
_HOLE = 64 << 10  # bytes: zeros of this size, at a multiple of it, take no space
_ZEROS = bytes(tar.CHUNK)


def _weight(piece: bytes) -> int:
    """The bytes of a piece that will take space: empty filesystems are mostly zeros, and no bombs."""
    if piece == _ZEROS[: len(piece)]:
        return 0
    return sum(len(part) for _, part in _parts(piece, 0))


_BOUNDS = Bounds(_LIMIT, ratio_max=1000, ratio_from=1 << 30, weigh=_weight)


def fetch_bundle(
    images_dir: Path,
    name: str,
    entry: CatalogEntry,
    job: Job,
    *,
    kernel: Path | None = None,
    replace: bool = False,
    publishing: Publishing = contextlib.nullcontext,
) -> ImageManifest:
    """Download the bundle of a catalog entry and make the image `name` of it; arguments are as for `build_image`.

    Raises DOWNLOAD when it cannot be had, CORRUPT when it is not what the entry or its own manifest says, INVALID for
    another architecture than the entry's, EXHAUSTED beyond a limit or without disk space.
    """
    system.validate_name(name, "image")
    refuse_existing(images_dir / name, replace)
    source = f"pull:{download.public_url(entry.tarball_url)}"
    size, sha256 = entry.size_bytes, entry.tarball_sha256
    if entry.tarball_url.startswith("/"):  # of a catalog that is a file
        pieces = download.local(Path(entry.tarball_url), job, label=name, size=size, limit=_LIMIT, sha256=sha256)
    else:
        urls = [entry.tarball_url, *entry.mirrors]
        pieces = download.stream(urls, job, label=name, size=size, limit=_LIMIT, sha256=sha256)
    try:
        with contextlib.closing(pieces), system.staging(images_dir, name) as staged:
            document = _receive(pieces, source, staged, job)
            manifest = _manifest(document, name, entry, source, kernel)
            _check(staged, manifest)
            seed = staged / WORK_SEED
            if manifest.rootfs == ROOTFS_SQUASHFS and not seed.exists():
                make_work_seed(staged / ROOTFS_SQUASHFS, manifest.home, seed, (), job)
            publish(staged, images_dir, manifest, kernel, job, replace, publishing)
    except OSError as error:
        if not space.means_full(error):
            raise
        raise _no_space(images_dir) from error
    return manifest


def write_image_bundle(entry: Path, manifest: ImageManifest, output: BinaryIO, job: Job) -> None:
    """Write the image whose files are in `entry` as a bundle; the same bytes for the same image, on any machine.

    Nothing of this host or its user gets into it, so work-seeds stay here: whoever pulls a bundle makes one of the root
    filesystem. Raises UNSUPPORTED for an image with a kernel of its own, CORRUPT when the root filesystem is not what
    the manifest says.
    """
    if manifest.own_kernel:
        raise BangerError(
            Code.UNSUPPORTED,
            f"the image {manifest.name!r} has a kernel of its own, which bundles of images do not hold",
            hint="import the kernel with 'banger kernel import', and register the image again with --kernel-ref",
        )
    total = manifest.size_bytes
    with contextlib.closing(_contents(entry, manifest)) as contents:
        archives.write(output, contents, total, job)


def bundle_entry(manifest: ImageManifest, output: Path, url: str, job: Job) -> m.ImageBundleEntry:
    """The catalog entry of the bundle `output`; `url` is where it will be published, '' for beside the catalog."""
    return m.ImageBundleEntry(
        name=manifest.name,
        kind="bundle",
        distro=manifest.distro or "unknown",
        arch=manifest.arch,
        kernel_ref=manifest.kernel_ref,
        tarball_url=url or output.name,
        tarball_sha256=sum_file(output, job),
        size_bytes=output.stat().st_size,
        description="",
    )


def _contents(entry: Path, manifest: ImageManifest) -> Generator[tuple[Member, Iterable[bytes]]]:
    rootfs = ROOTFS_EXT4 if manifest.filesystem == EXT4 else ROOTFS_SQUASHFS
    values = {**asdict(manifest), "rootfs": rootfs}
    document = json.dumps({key: values[key] for key in PUBLISHED}, indent=2).encode() + b"\n"
    yield plain_member(MANIFEST.encode(), len(document)), [document]
    yield plain_member(rootfs.encode(), manifest.size_bytes), _rootfs(entry / manifest.rootfs, manifest)
    config = entry / CONFIG
    if config.is_file():
        data = config.read_bytes()
        yield plain_member(CONFIG.encode(), len(data)), [data]


def _rootfs(file: Path, manifest: ImageManifest) -> Iterator[bytes]:
    """The content of the root filesystem, checked as it is read."""
    digest = hashlib.sha256()
    left = manifest.size_bytes
    with open(file, "rb", opener=system.open_regular) as stream:
        while left and (piece := stream.read(min(tar.CHUNK, left))):
            left -= len(piece)
            digest.update(piece)
            yield piece
        left += len(stream.read(1))
    if left or digest.hexdigest() != manifest.rootfs_sha256:
        raise BangerError(
            Code.CORRUPT,
            f"{file} is not what the manifest of the image {manifest.name!r} says",
            hint=f"run 'banger image verify {manifest.name}'",
        )


def _receive(pieces: Iterable[bytes], label: str, staged: Path, job: Job) -> dict[str, object]:
    """Lay the files of a bundle into `staged`, its root filesystem checked; returns the published manifest."""
    document: dict[str, object] = {}
    seen: set[str] = set()
    with archives.reading(pieces, label, _BOUNDS, job) as reader:
        for member in reader:
            file = _file_name(reader, member)
            if file in seen:
                raise reader.corrupt(f"has {file} twice")
            if not seen and file != MANIFEST:
                raise reader.corrupt(f"begins with {file}, not with {MANIFEST}")
            seen.add(file)
            if file in (MANIFEST, CONFIG):
                if member.size > _SMALL_LIMIT:
                    raise reader.corrupt(f"has a {file} of {member.size:,} bytes")
                data = b"".join(reader.data())
                if file == MANIFEST:
                    document = _document(data, label)
                else:
                    Fields.parse(data, f"{CONFIG} of {label}")
                    (staged / file).write_bytes(data)
                continue
            if file != WORK_SEED and (file, member.size) != (document["rootfs"], document["size_bytes"]):
                raise reader.corrupt(f"has {file} of {member.size:,} bytes, which is not what its {MANIFEST} says")
            digest = _store(reader.data(), staged / file, job)
            if file != WORK_SEED and digest != document["rootfs_sha256"]:
                raise reader.corrupt(
                    f"has another {file} than its {MANIFEST} says: {digest}, not {document['rootfs_sha256']}"
                )
        if not seen.intersection((ROOTFS_SQUASHFS, ROOTFS_EXT4)):
            raise reader.corrupt("has no root filesystem" if seen else "is empty")
    return document


def _file_name(reader: TarReader, member: Member) -> str:
    """The name of a member, which must be one of the few that bundles have."""
    name = member.path.decode(errors="replace")
    if name not in (MANIFEST, ROOTFS_SQUASHFS, ROOTFS_EXT4, WORK_SEED, CONFIG) or member.absolute:
        raise reader.corrupt(f"has a member {tar.show(member.path)}, which bundles of images do not have")
    if member.kind != tar.REGULAR or member.is_sparse:
        raise reader.corrupt(f"has {name}, which is no plain file")
    return name


def _document(data: bytes, label: str) -> dict[str, object]:
    """The published fields of a bundle's manifest; all other fields are for newer versions."""
    Fields.parse(data, f"{MANIFEST} of {label}")
    values: dict[str, object] = json.loads(data)
    document = {key: values[key] for key in PUBLISHED if key in values}
    _parse(document, label)
    return document


def _parse(document: dict[str, object], label: str, **own: object) -> ImageManifest:
    needed: dict[str, object] = {"name": "image", "source": label, "imported_at": now(), "managed": True}
    return parse_manifest(json.dumps({**document, **needed, **own}), f"{MANIFEST} of {label}")


def _manifest(
    document: dict[str, object], name: str, entry: CatalogEntry, source: str, kernel: Path | None
) -> ImageManifest:
    manifest = _parse(
        document,
        source,
        name=name,
        kernel_ref=kernel.name if kernel else document.get("kernel_ref", ""),
        origin=origin_of(entry),
        revision=revision(entry),
    )
    if manifest.arch != entry.arch:
        raise BangerError(
            Code.INVALID, f"{source} is for {manifest.arch}, its catalog entry {entry.name!r} for {entry.arch}"
        )
    return manifest


def _check(staged: Path, manifest: ImageManifest) -> None:
    """Raise CORRUPT unless the superblocks are what the names say."""
    expected = {manifest.rootfs: EXT4 if manifest.rootfs == ROOTFS_EXT4 else "squashfs", WORK_SEED: EXT4}
    for file, filesystem in expected.items():
        if file == WORK_SEED and not (staged / file).exists():
            continue
        try:
            found = filesystem_type(staged / file)
        except BangerError as error:
            raise BangerError(
                Code.CORRUPT, f"{file} in {manifest.source}: {error.message.replace(f'{staged}/', '')}"
            ) from error
        if found != filesystem:
            raise BangerError(Code.CORRUPT, f"{file} in {manifest.source} is a {found} filesystem")


def _store(pieces: Iterable[bytes], file: Path, job: Job) -> str:
    """Write a file with holes for its zeros; its SHA-256."""
    digest = hashlib.sha256()
    done = checked = 0
    with open(file, "xb", buffering=0) as output:
        for piece in pieces:
            job.check()
            if done - checked >= _CHECK_EVERY or not done:
                checked = done
                if space.is_short(file.parent):
                    raise _no_space(file.parent.parent)
            digest.update(piece)
            if piece != _ZEROS[: len(piece)]:
                for offset, part in _parts(piece, done):
                    system.write_at(output.fileno(), part, offset)
            done += len(piece)
        output.truncate(done)
    file.chmod(0o644)
    return digest.hexdigest()


def _parts(piece: bytes, position: int) -> Iterator[tuple[int, memoryview]]:
    """What of a piece at `position` is no hole, and where it belongs; one after the other is one part."""
    view = memoryview(piece)
    start = 0
    offset = 0
    while offset < len(piece):
        end = min(len(piece), offset + _HOLE - (position + offset) % _HOLE)
        if view[offset:end] == _ZEROS[: end - offset]:
            if start < offset:
                yield position + start, view[start:offset]
            start = end
        offset = end
    if start < len(piece):
        yield position + start, view[start:]


def _no_space(directory: Path) -> BangerError:
    return BangerError(
        Code.EXHAUSTED,
        f"not enough disk space for the image in {directory}",
        hint="remove images or VMs that you no longer need: 'banger image list', 'banger vm list'",
    )
