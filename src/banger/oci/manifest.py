"""Manifests and indexes of images (OCI Image Specification 1.1, and Docker's before it); chooses by platform."""

from __future__ import annotations

import contextlib
import hashlib
import re
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass

from banger.api.errors import BangerError, Code
from banger.fields import Fields
from banger.oci.platform import Platform

MANIFEST_LIMIT = 4 << 20  # bytes, as the distribution specification asks registries to accept
INDEXES = ("application/vnd.oci.image.index.v1+json", "application/vnd.docker.distribution.manifest.list.v2+json")
MANIFESTS = ("application/vnd.oci.image.manifest.v1+json", "application/vnd.docker.distribution.manifest.v2+json")
CONFIGS = ("application/vnd.oci.image.config.v1+json", "application/vnd.docker.container.image.v1+json")
CONFIG_LIMIT = 4 << 20  # bytes
LAYERS_MAX = 500  # docker refuses more than 127
ENTRIES_MAX = 10_000  # of an index; the largest that are published have some dozens

_READ_MAX = 16  # manifests below the first one: indexes may lie in indexes, and entries not say what they are for
# annotations of layers that are single files, and of those that are archives all the same (ORAS)
_TITLE, _UNPACK = "org.opencontainers.image.title", "io.deis.oras.content.unpack"
_ATTESTATION = "vnd.docker.reference.type"  # BuildKit's documentation, "Image attestation storage"


@dataclass(frozen=True)
class Descriptor:
    """A blob: `digest` is "sha256:...", `size` in bytes, `title` the name of a layer that is one file, else ''."""

    media_type: str
    digest: str
    size: int
    title: str = ""


ReadBlob = Callable[[Descriptor, str], Generator[bytes, None, None]]


@dataclass(frozen=True)
class Image:
    """What a reference stands for, for one platform.

    `digest` is that of what the reference names: of an index, or of the image's own `manifest`, then the same.
    """

    digest: str
    config: Descriptor
    layers: tuple[Descriptor, ...]
    manifest: str


@dataclass(frozen=True)
class Manifest:
    """One document: an image's, or an index of the `entries`."""

    digest: str
    kind: str
    fields: Fields
    entries: Sequence[Fields] = ()

    @classmethod
    def parse(cls, body: bytes, label: str) -> Manifest:
        """Read one of the image `label`; raises CORRUPT."""
        fields = Fields.parse(body, f"the manifest of {label}")
        if fields.has("manifests") and (fields.has("layers") or fields.has("config")):
            # under one digest it would be another image to others (CVE-2021-41190)
            raise BangerError(Code.CORRUPT, f"{label} is both an image and an index of images")
        kind = _kind(fields)
        return cls(digest_of(body), kind, fields, fields.objects("manifests", ENTRIES_MAX) if kind in INDEXES else ())


ReadManifest = Callable[[Descriptor], Manifest]


def digest_of(data: bytes) -> str:
    """As the Image Specification writes it ("Digests")."""
    return f"sha256:{hashlib.sha256(data).hexdigest()}"


def find_image(top: Manifest, platform: Platform, label: str, read: ReadManifest, blob: ReadBlob) -> Image:
    """The image for a platform that `top` is or leads to; `read` gives the manifest of a descriptor, checked by digest.

    Where an index does not say what an entry is for, the entry's own configuration does. Raises NOT_FOUND when there is
    none for the platform, CORRUPT and UNSUPPORTED for manifests that are wrong or of kinds that cannot be used.
    """
    search = _Search(platform, label, read, blob)
    found = search.find(top)
    if found is None and not search.offered:
        found = search.artifact
    if found is None:
        raise other_platform(label, search.offered, platform)
    return _image(found, top.digest, label)


def other_platform(label: str, offered: set[str], platform: Platform) -> BangerError:
    """The error for an image that is for other platforms."""
    there = ", ".join(sorted(offered))[:200] or "nothing"
    return BangerError(
        Code.NOT_FOUND,
        f"{label} is for {there!r}, not for {platform}",
        hint="choose what there is with --platform, for kernels with --arch",
    )


def read_config(blob: ReadBlob, descriptor: Descriptor, label: str) -> bytes:
    """The configuration of the image `label`; raises CORRUPT, and what `blob` raises."""
    what = f"the configuration of {label}"
    if descriptor.size > CONFIG_LIMIT:
        raise BangerError(Code.CORRUPT, f"{what} has {descriptor.size:,} bytes; {CONFIG_LIMIT:,} are possible")
    with contextlib.closing(blob(descriptor, what)) as pieces:
        return b"".join(pieces)


def read_descriptor(fields: Fields) -> Descriptor:
    """Read a descriptor; raises CORRUPT."""
    digest = fields.text("digest")
    if not re.fullmatch(r"sha256:[0-9a-f]{64}", digest):
        raise fields.wrong("digest", f"sha256: and 64 hexadecimal digits, not {digest[:100]!r}")
    annotations = fields.object("annotations")
    title = annotations.text(_TITLE, "") if annotations.text(_UNPACK, "") != "true" else ""
    return Descriptor(fields.text("mediaType", ""), digest, fields.number("size", 0), title)


class _Search:
    """Looks for an image through indexes.

    `offered` collects the platforms that there are, `artifact` is the first thing on the way that is no image: a
    signature, a bill of materials, a chart.
    """

    def __init__(self, platform: Platform, label: str, read: ReadManifest, blob: ReadBlob) -> None:
        self._platform = platform
        self._label = label
        self._read = read
        self._blob = blob
        self._left = _READ_MAX
        self.offered: set[str] = set()
        self.artifact: Manifest | None = None

    def find(self, manifest: Manifest, known: bool = True) -> Manifest | None:
        """`known` says that it is for the platform, if it is an image."""
        if manifest.kind not in INDEXES:
            return manifest if known or self._fits(manifest) else None
        for descriptor, known in self._candidates(manifest.entries):
            if self._left == 0:
                raise BangerError(Code.CORRUPT, f"{self._label} leads through more than {_READ_MAX} manifests")
            self._left -= 1
            below = self._read(descriptor)
            if below.kind not in INDEXES and _is_artifact(below):
                self.artifact = self.artifact or below
            elif found := self.find(below, known):
                return found
        return None

    def _fits(self, manifest: Manifest) -> bool:
        """Whether an image is for the platform by its own word."""
        config = read_descriptor(manifest.fields.object("config"))
        offered = platform_of(
            Fields.parse(read_config(self._blob, config, self._label), f"the config of {self._label}")
        )
        return not offered.architecture or self._rank(offered) is not None

    def _rank(self, offered: Platform) -> float | None:
        rank = self._platform.rank(offered)
        if rank is None:
            self.offered.add(f"{offered.os[:20]}/{offered.architecture[:20]}/{offered.variant[:20]}".rstrip("/"))
        return rank

    def _candidates(self, entries: Sequence[Fields]) -> Iterator[tuple[Descriptor, bool]]:
        """What may be or lead to an image for the platform, the best first, and whether it says that itself."""
        entries = [entry for entry in entries if not _is_attestation(entry)]
        ranked: list[tuple[float, int, bool]] = []
        for number, entry in enumerate(entries):
            offered = platform_of(entry.object("platform"))
            if not offered.architecture:
                ranked.append((float("inf"), number, len(entries) == 1))
            elif (rank := self._rank(offered)) is not None:
                ranked.append((rank, number, True))
        for _, number, known in sorted(ranked):
            yield read_descriptor(entries[number]), known


def platform_of(fields: Fields) -> Platform:
    """The platform that an index's entry or an image's config names; raises CORRUPT."""
    return Platform.of(fields.text("os", ""), fields.text("architecture", ""), fields.text("variant", ""))


def _is_artifact(manifest: Manifest) -> bool:
    """By the type of its configuration (Image Specification 1.1, "Guidelines for Artifact Usage")."""
    config = manifest.fields.object("config").text("mediaType", "")
    return config not in CONFIGS and config != ""


def _is_attestation(entry: Fields) -> bool:
    platform = entry.object("platform")
    unknown = platform.text("os", "") == platform.text("architecture", "") == "unknown"
    return unknown or entry.object("annotations").has(_ATTESTATION)


def _kind(manifest: Fields) -> str:
    """The type of a manifest; OCI's may leave it out (Image Specification 1.1, "mediaType")."""
    kind = manifest.text("mediaType", "")
    if kind:
        return kind
    if manifest.number("schemaVersion", 0) != 2:
        return "application/vnd.docker.distribution.manifest.v1+json"
    return INDEXES[0] if manifest.has("manifests") else MANIFESTS[0]


def _image(manifest: Manifest, digest: str, label: str) -> Image:
    if manifest.kind not in MANIFESTS:
        raise BangerError(
            Code.UNSUPPORTED,
            f"{label} is of the type {manifest.kind[:120]!r}, which banger does not read",
            hint="push it again with a current tool: skopeo copy --format oci",
        )
    layers = [read_descriptor(layer) for layer in manifest.fields.objects("layers", LAYERS_MAX)]
    for layer in layers:
        if "foreign" in layer.media_type or "nondistributable" in layer.media_type:
            raise BangerError(Code.UNSUPPORTED, f"{label} has a layer that registries must not hold")
        if layer.media_type.endswith("+encrypted"):
            raise BangerError(Code.UNSUPPORTED, f"{label} has an encrypted layer")
    return Image(digest, read_descriptor(manifest.fields.object("config")), tuple(layers), manifest.digest)
