"""Reads images from what `docker save` writes (Moby, image/spec/v1.2: "Combined Image JSON + Filesystem Changeset")."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Generator, Sequence

from banger import download
from banger.api.errors import BangerError, Code
from banger.decompress import MAGIC_SIZE, compression
from banger.fields import Fields
from banger.job import Job
from banger.oci.files import ArchiveFiles, Extent
from banger.oci.layout_source import shown_names
from banger.oci.manifest import (
    ENTRIES_MAX,
    LAYERS_MAX,
    MANIFEST_LIMIT,
    Descriptor,
    Image,
    digest_of,
    other_platform,
    platform_of,
)
from banger.oci.platform import Platform
from banger.oci.reference import same_name
from banger.system import counted

_MANIFEST = "manifest.json"
_CONFIG_TYPE = "application/vnd.oci.image.config.v1+json"
_LAYER_TYPE = "application/vnd.oci.image.layer.v1.tar"


class DockerArchiveSource:
    """The image called `name` of an archive, or the only one where that is ''; "@N" is the one at that place, from 0.

    Such an image has no digest of a manifest; that of its config, which Docker calls the image's ID, serves instead.
    """

    local = True

    def __init__(self, files: ArchiveFiles, name: str, job: Job) -> None:
        self._files = files
        self._name = name
        self._job = job
        self._label = files.label + (f", image {name!r}," if name else "")
        self._extents: dict[str, Extent] = {}  # by digest, of the image that was resolved
        if not files.has(_MANIFEST):
            hint = "what `docker export` writes is a root filesystem: import it with 'banger image import'"
            if files.has("index.json"):
                hint = "it is an OCI layout: read it with oci-archive:FILE"
            elif files.has("repositories"):
                hint = "it is from a Docker before 1.10: load it into a current one, and save it again"
            raise BangerError(
                Code.CORRUPT, f"{files.label} is no archive of `docker save`: it has no {_MANIFEST!r}", hint=hint
            )

    def resolve(self, platform: Platform) -> Image:
        """The image; raises NOT_FOUND and INVALID by its name and platform, CORRUPT."""
        entry = self._choose(
            Fields.parse_list(self._read(_MANIFEST), f"{_MANIFEST!r} in {self._files.label}", ENTRIES_MAX)
        )
        name = entry.text("Config")
        body = self._read(name)
        config = Fields.parse(body, f"{name[:100]!r} in {self._files.label}")
        offered = platform_of(config)
        if offered.architecture and platform.rank(offered) is None:
            raise other_platform(self._label, {str(offered)[:60]}, platform)
        names, diff_ids = entry.texts("Layers"), config.object("rootfs").texts("diff_ids")
        if len(names) != len(diff_ids) or len(names) > LAYERS_MAX:
            raise BangerError(
                Code.CORRUPT,
                f"{self._label} has {counted(len(names), 'layer')}, and its config has {len(diff_ids)}; "
                f"{LAYERS_MAX} are possible",
            )
        digest = digest_of(body)
        self._extents[digest] = self._files.extent(name)
        layers = tuple(self._layer(*each) for each in zip(names, diff_ids, strict=True))
        return Image(digest, Descriptor(_CONFIG_TYPE, digest, len(body)), layers, digest)

    def blob(self, descriptor: Descriptor, label: str) -> Generator[bytes, None, None]:
        """The content of a blob of the resolved image in pieces of at most 1 MiB, checked by digest as it streams."""
        extent = self._extents[descriptor.digest]
        return download.checked(
            extent.pieces(),
            self._job,
            source=extent.where,
            label=label,
            size=descriptor.size,
            sha256=descriptor.digest.removeprefix("sha256:"),
        )

    def _read(self, name: str) -> bytes:
        return self._files.extent(name).read(MANIFEST_LIMIT)

    def _choose(self, entries: Sequence[Fields]) -> Fields:
        names = [entry.texts("RepoTags") for entry in entries]
        place = int(self._name[1:]) if re.fullmatch(r"@[0-9]{1,6}", self._name) else None
        found = [
            entry
            for number, entry in enumerate(entries)
            if not self._name or number == place or any(same_name(self._name, name) for name in names[number])
        ]
        if not found:
            raise BangerError(
                Code.NOT_FOUND,
                f"{self._files.label} has no image {self._name!r}, but {shown_names(names)}",
                hint="see what it is called there, or name it by its place: FILE:@0",
            )
        if len(found) > 1:
            raise BangerError(
                Code.INVALID,
                f"{self._files.label} has several images: {shown_names(names)}",
                hint="name one after the path: FILE:NAME",
            )
        return found[0]

    def _layer(self, name: str, diff_id: str) -> Descriptor:
        """What a layer would be in a registry: plain, so that its digest is its diff_id, or compressed all the same."""
        if not re.fullmatch(r"sha256:[0-9a-f]{64}", diff_id):
            raise BangerError(Code.CORRUPT, f"{self._label} has a layer with the diff_id {diff_id[:100]!r}")
        extent = self._files.extent(name)
        packed = compression(next(extent.pieces(), b"")[:MAGIC_SIZE])
        digest = f"sha256:{self._sum(name, extent)}" if packed else diff_id
        self._extents[digest] = extent
        return Descriptor(f"{_LAYER_TYPE}+{packed}" if packed else _LAYER_TYPE, digest, extent.size)

    def _sum(self, name: str, extent: Extent) -> str:
        if named := re.fullmatch(r"blobs/sha256/([0-9a-f]{64})", name):  # checked when it is read
            return named[1]
        digest = hashlib.sha256()
        for piece in extent.pieces():
            self._job.check()
            digest.update(piece)
        return digest.hexdigest()
