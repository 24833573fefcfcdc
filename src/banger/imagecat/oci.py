"""Makes local images of container images: layers to one squashfs, the configuration to the image's own."""

from __future__ import annotations

import contextlib
import functools
import re
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

from banger.api.errors import BangerError, Code
from banger.disk.squashfs import Contents, pack
from banger.fields import Fields
from banger.imagecat.manifest import ImageConfig, Layer
from banger.job import Job
from banger.oci import pull
from banger.oci.blobs import BlobCache
from banger.oci.layers import Tree, merged
from banger.oci.manifest import Descriptor, Image

CONFIG_LIMIT = 4 << 20  # bytes


@dataclass(frozen=True)
class Flattened:
    """The root filesystem that an image's layers make, and what the image says of itself: `config` as it came."""

    contents: Contents
    config: bytes
    layers: tuple[Layer, ...]


OpenBlobs = Callable[[Job], AbstractContextManager[pull.Blobs]]


def pull_and_flatten(
    open_blobs: OpenBlobs, image: Image, rootfs: Path, label: str, cache: BlobCache, job: Job
) -> Flattened:
    """Download an image and pack the tree that its layers make into the new squashfs `rootfs`; `label` names it.

    `open_blobs` opens what the blobs come from, which works with the job that it is given. Nothing is unpacked on the
    way. Raises CORRUPT for what is not what its digests say or breaks a rule of `layers.Tree`, EXHAUSTED beyond a limit
    or without disk space, and what the source raises.
    """
    while True:
        total = pull.Total(job, label)
        with (
            cache.held([descriptor.digest for descriptor in image.layers]),
            job.part(total.report) as part,
            open_blobs(part) as source,
        ):
            config = _read_config(source, image.config, label)
            diff_ids = parse_diff_ids(config, label)
            if len(diff_ids) != len(image.layers):
                layers = f"{label} has {len(image.layers)} layers"
                raise BangerError(Code.CORRUPT, f"{layers}, its configuration speaks of {len(diff_ids)}")
            with pull.downloading(source, image.layers, cache, part, total) as blobs:
                try:
                    contents = _flatten(blobs, diff_ids, rootfs, label, job)
                except BangerError as error:
                    # what lies in the cache may have been damaged there: then it is fetched again
                    cached = [blob.descriptor.digest for blob in blobs if blob.cached]
                    if error.code is not Code.CORRUPT or not cache.verify(cached, job):
                        raise
                    continue
        found = zip(image.layers, diff_ids, strict=True)
        return Flattened(contents, config, tuple(Layer(blob.digest, diff, blob.size) for blob, diff in found))


def _flatten(blobs: Sequence[pull.Blob], diff_ids: Sequence[str], rootfs: Path, label: str, job: Job) -> Contents:
    tree = Tree(label)
    layers: list[pull.Layer] = []
    left = pull.UNPACKED_LIMIT
    for number, (blob, diff_id) in enumerate(zip(blobs, diff_ids, strict=True), 1):
        layer = pull.Layer(blob, diff_id, f"layer {number} of {label}", left)
        with layer.checked(job) as reader:
            tree.add_layer(iter(reader), job)
        left -= layer.unpacked
        layers.append(layer)
    plan = tree.plan()
    del tree
    job.progress("pack", label, 0, plan.kept.count(1), unit="files")
    return pack(merged([functools.partial(layer.open, job) for layer in layers], plan), rootfs, job)


def _read_config(source: pull.Blobs, descriptor: Descriptor, label: str) -> bytes:
    if descriptor.size > CONFIG_LIMIT:
        raise BangerError(Code.CORRUPT, f"the configuration of {label} has {descriptor.size:,} bytes")
    with contextlib.closing(source.blob(descriptor, f"the configuration of {label}")) as pieces:
        return b"".join(pieces)


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
    return ImageConfig(
        entrypoint=_texts(fields, "Entrypoint"),
        cmd=_texts(fields, "Cmd"),
        env=_variables(fields),
        user=fields.text("User", ""),
        workdir=fields.text("WorkingDir", ""),
        volumes=fields.keys("Volumes"),
        exposed_ports=fields.keys("ExposedPorts"),
        stop_signal=fields.text("StopSignal", ""),
    )


def _texts(fields: Fields, key: str) -> tuple[str, ...]:
    return fields.texts(key) if fields.has(key) else ()


def _variables(fields: Fields) -> tuple[str, ...]:
    return tuple(variable for variable in _texts(fields, "Env") if not variable.startswith("=") and "=" in variable)
