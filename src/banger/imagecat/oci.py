"""Makes local images of container images: layers to one squashfs, the configuration to the image's own."""

from __future__ import annotations

import contextlib
import functools
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

from banger import system
from banger.api.errors import BangerError, Code
from banger.disk.squashfs import Contents, pack
from banger.fields import Fields
from banger.imagecat.build import Facts, Publishing, find_present, publish
from banger.imagecat.manifest import CONFIG, ROOTFS_SQUASHFS, ImageConfig, ImageManifest, Layer
from banger.imagecat.runtime import wants_own_init
from banger.job import Job
from banger.oci import onepass, pull
from banger.oci.blobs import BlobCache
from banger.oci.layers import Tree, merged
from banger.oci.location import Location
from banger.oci.manifest import (
    CONFIG_LIMIT,
    Descriptor,
    Image,
    digest_of,
    other_platform,
    platform_of,
    read_config,
)
from banger.oci.platform import Platform
from banger.oci.source import Environment

# bytes of JSON: Linux takes 2 MiB of an environment, and with the layers it stays below what is read of a manifest
_TEXTS_LIMIT = 3 << 20

Flatten = Callable[[pull.Opened, Sequence[Descriptor], Sequence[str], Path, BlobCache, Job], Contents]
Finalize = Callable[[Path, str, Contents, Facts, Job], ImageManifest]


def pull_oci(
    images_dir: Path,
    name: str,
    text: str,
    job: Job,
    *,
    platform: Platform,
    environment: Environment,
    cache: BlobCache,
    kernel: Path | None = None,
    origin: str = "",
    replace: bool = False,
    publishing: Publishing = contextlib.nullcontext,
    flatten: Flatten,
    finalize: Finalize,
) -> ImageManifest:
    """Make the image `name` of what `text` names (see `open_source`), for a platform.

    One that is there already, from the same place and with the same digest, stays as it is unless `replace`. `kernel`
    and `publishing` are as for `build_image`; `flatten` is `pull_and_flatten`, `finalize` `finalize_rootfs`, or what
    stands in for them. Raises EXISTS for a name that is taken otherwise, and what these and `open_source` raise.
    """
    while True:
        with pull.opened(text, environment, job) as opened:
            image = opened.source.resolve(platform)
            source = source_of(text)
            if not replace and (there := _already_there(images_dir, name, source, image, platform, kernel)):
                return there
            config = read_config(opened.source.blob, image.config, text)
            _check_platform(config, platform, text)
            diff_ids = parse_diff_ids(config, text)
            layers = _root_layers(image.layers, diff_ids, text)
            parsed = parse_config(config, text)
            with system.staging(images_dir, name) as staged:
                try:
                    contents = flatten(opened, layers, diff_ids, staged / ROOTFS_SQUASHFS, cache, job)
                except pull.DamagedCache:
                    continue
                (staged / CONFIG).write_bytes(config)
                facts = Facts(
                    label=text,
                    source=source,
                    kernel_ref=kernel.name if kernel else "",
                    init="image" if wants_own_init(parsed) else "agent",
                    config=parsed,
                    origin=origin,
                    revision=image.digest,
                    layers=tuple(
                        Layer(blob.digest, diff_id, blob.size) for blob, diff_id in zip(layers, diff_ids, strict=True)
                    ),
                )
                manifest = finalize(staged, name, contents, facts, job)
                try:
                    publish(staged, images_dir, manifest, kernel, job, replace, publishing)
                except BangerError as error:
                    if error.code is not Code.EXISTS:
                        raise
                    continue  # another pull was faster, perhaps of the same
                return manifest


def check_image(text: str, platform: Platform, environment: Environment, job: Job) -> None:
    """Raise what `pull_oci` raises when what `text` names is not there for a platform."""
    with pull.opened(text, environment, job) as opened:
        opened.source.resolve(platform)


def source_of(text: str) -> str:
    """How manifests name what `open_source` opens."""
    return text if Location.parse(text) else f"oci:{text}"


def _already_there(
    images_dir: Path, name: str, source: str, image: Image, platform: Platform, kernel: Path | None
) -> ImageManifest | None:
    """As `find_present`: the index may be the same, and the image in it the one for another platform."""

    def difference(there: ImageManifest) -> str:
        if there.revision != image.digest:
            return "what it was pulled from has changed since"
        try:
            with open(images_dir / name / CONFIG, "rb", opener=system.open_regular) as stream:
                config = digest_of(stream.read(CONFIG_LIMIT))
        except OSError:
            return "its configuration is missing"
        # it names what the layers unpack to, so the rest is the same
        return "" if config == image.config.digest else f"it is not the one for {platform}"

    return find_present(images_dir, name, kernel, lambda there: there.source == source, difference)


def pull_and_flatten(
    opened: pull.Opened,
    layers: Sequence[Descriptor],
    diff_ids: Sequence[str],
    rootfs: Path,
    cache: BlobCache,
    job: Job,
) -> Contents:
    """Download layers (the lowest first) and pack the tree that they make into the new squashfs `rootfs`.

    `diff_ids` are the digests of what the layers unpack to; nothing is unpacked on the way. Raises CORRUPT for what is
    not what its digests say or breaks a rule of `layers.Tree`, EXHAUSTED beyond a limit or without disk space, what the
    source raises, and DamagedCache when it has to be done again.
    """
    if opened.source.local:
        return _flatten(pull.local(opened, layers), diff_ids, rootfs, opened.label, job)
    with cache.held([layer.digest for layer in layers]), pull.downloading(opened, layers, cache) as blobs:
        try:
            return _flatten(blobs, diff_ids, rootfs, opened.label, job)
        except (BangerError, OSError) as error:
            if isinstance(error, BangerError) and error.code is Code.CANCELLED:
                raise
            # whatever it was, damage can be the cause: a size or a type that is not the real one
            if cache.verify([blob.descriptor.digest for blob in blobs if blob.cached], job):
                raise pull.DamagedCache from error
            raise


def _flatten(blobs: Sequence[pull.Readable], diff_ids: Sequence[str], rootfs: Path, label: str, job: Job) -> Contents:
    try:
        opened = [functools.partial(layer.open, job) for layer in _layers(blobs, diff_ids, label)]
        return pack(onepass.merged(opened, label), rootfs, job)
    except onepass.OutOfOrder:
        job.progress("merge", label)
    tree = Tree(label)
    for layer in _layers(blobs, diff_ids, label):
        with layer.open(job) as reader:
            tree.add_layer(iter(reader), job)
    plan = tree.plan()
    del tree
    opened = [functools.partial(layer.open, job) for layer in _layers(blobs, diff_ids, label)]
    return pack(merged(opened, plan), rootfs, job)


def _layers(blobs: Sequence[pull.Readable], diff_ids: Sequence[str], label: str) -> list[pull.Layer]:
    budget = pull.Budget(pull.UNPACKED_LIMIT)
    return [
        pull.Layer(blob, diff_id, f"layer {number} of {label}", budget)
        for number, (blob, diff_id) in enumerate(zip(blobs, diff_ids, strict=True), 1)
    ]


def _check_platform(config: bytes, platform: Platform, label: str) -> None:
    """An image that is in no index says here alone what it is for."""
    fields = Fields.parse(config, f"the configuration of {label}")
    offered = platform_of(fields)
    if offered.architecture and platform.rank(offered) is None:
        shown = f"{offered.os[:20]}/{offered.architecture[:20]}/{offered.variant[:20]}".rstrip("/")
        raise other_platform(label, {shown}, platform)


def _root_layers(layers: Sequence[Descriptor], diff_ids: Sequence[str], label: str) -> Sequence[Descriptor]:
    """The layers that the configuration speaks of; whatever else an image carries is for other programs.

    Their `diff_ids` make sure that they are archives, even where titles call them files.
    """
    if not layers:
        raise BangerError(Code.CORRUPT, f"{label} has no layers: there is nothing in it")
    archives = [layer for layer in layers if _is_archive(layer)]
    if len(diff_ids) == len(archives):
        return archives
    for layer in layers:
        if layer.title or not _is_archive(layer):
            what = layer.title or layer.media_type
            raise BangerError(
                Code.UNSUPPORTED,
                f"{label} is not the image of a root filesystem: {what[:120]!r} is one of its layers",
                hint="files of such an artifact can be had with the oras command",
            )
    raise BangerError(
        Code.CORRUPT, f"{label} has {system.counted(len(layers), 'layer')}, its configuration speaks of {len(diff_ids)}"
    )


def _is_archive(layer: Descriptor) -> bool:
    return not layer.media_type or "tar" in layer.media_type


def parse_diff_ids(config: bytes, label: str) -> tuple[str, ...]:
    """The digests of an image's unpacked layers, the lowest first; raises CORRUPT."""
    rootfs = Fields.parse(config, f"the configuration of {label}").object("rootfs")
    diff_ids = rootfs.texts("diff_ids")
    if not all(re.fullmatch(r"sha256:[0-9a-f]{64}", diff_id) for diff_id in diff_ids):
        raise rootfs.wrong("diff_ids", "digests: sha256: and 64 hexadecimal digits")
    return diff_ids


def parse_config(config: bytes, label: str) -> ImageConfig:
    """What an image says of its main process (OCI Image Configuration 1.1, "config"); raises CORRUPT."""
    fields = Fields.parse(config, f"the configuration of {label}").object("config")
    parsed = ImageConfig(
        entrypoint=fields.texts("Entrypoint"),
        cmd=fields.texts("Cmd"),
        env=fields.texts("Env"),
        user=fields.text("User", ""),
        workdir=fields.text("WorkingDir", ""),
        volumes=fields.keys("Volumes"),
        exposed_ports=fields.keys("ExposedPorts"),
        stop_signal=fields.text("StopSignal", ""),
        healthcheck=_healthcheck(fields),
    )
    _check_texts(parsed, label)
    return parsed


def _healthcheck(fields: Fields) -> tuple[str, ...]:
    """The command of a HEALTHCHECK, () without one (Docker Image Specification 1.2, "Healthcheck")."""
    kind, *words = fields.object("Healthcheck").texts("Test") or ("NONE",)
    shell = fields.texts("Shell") or ("/bin/sh", "-c")
    return {"CMD": tuple(words), "CMD-SHELL": (*shell, *words)}.get(kind, ())


def _check_texts(config: ImageConfig, label: str) -> None:
    """All of it goes into the manifest, and most of it to the system calls of guests."""
    values = asdict(config)
    size = len(json.dumps(values, indent=4))  # no less than in the manifest
    if size > _TEXTS_LIMIT:
        raise BangerError(
            Code.CORRUPT,
            f"what {label} says of its processes, such as its Env, has {size:,} bytes; {_TEXTS_LIMIT:,} are possible",
        )
    for text in (text for value in values.values() for text in ([value] if isinstance(value, str) else value)):
        if "\0" in text:
            raise BangerError(Code.CORRUPT, f"the configuration of {label} has NUL characters")
