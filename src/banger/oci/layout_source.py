"""Reads images from OCI image layouts (Image Specification 1.1, "OCI Image Layout Specification")."""

from __future__ import annotations

import re
from collections.abc import Generator, Sequence
from dataclasses import replace

from banger import download
from banger.api.errors import BangerError, Code
from banger.fields import Fields
from banger.job import Job
from banger.oci.files import Files
from banger.oci.layout import BLOBS, INDEX, MARKER, REF_NAME
from banger.oci.manifest import INDEXES, MANIFEST_LIMIT, Descriptor, Image, Manifest, find_image, read_descriptor
from banger.oci.platform import Platform
from banger.oci.reference import same_name

_VERSION = "1.0.0"
_FULL_NAME = "io.containerd.image.name"  # what containerd and `docker save` write besides
_ROOTFS = "a root filesystem becomes an image with 'banger image import NAME --from PATH'"
_SHOWN = 10  # names that fit one line


class LayoutSource:
    """The image called `name` of a layout, or the only one where that is ''; "@N" is the one at that place, from 0.

    Raises CORRUPT for what is no layout, UNSUPPORTED for one of another version.
    """

    local = True

    def __init__(self, files: Files, name: str, job: Job) -> None:
        self._files = files
        self._name = name
        self._job = job
        self._label = files.label + (f", image {name!r}," if name else "")
        if not files.has(MARKER) or not files.has(INDEX):
            hint = (
                "what `docker save` writes is read with docker-archive:FILE" if files.has("manifest.json") else _ROOTFS
            )
            missing = INDEX if files.has(MARKER) else MARKER
            raise BangerError(Code.CORRUPT, f"{files.label} is no OCI layout: it has no {missing!r}", hint=hint)
        version = Fields.parse(self._read(MARKER), f"{MARKER!r} in {files.label}").text("imageLayoutVersion")
        if version != _VERSION:
            raise BangerError(
                Code.UNSUPPORTED, f"{files.label} is an OCI layout of the version {version[:40]!r}, not {_VERSION}"
            )

    def resolve(self, platform: Platform) -> Image:
        """The image for a platform; raises as `find_image` does, and NOT_FOUND or INVALID by the name."""
        index = Manifest.parse(self._read(INDEX), self._files.label)
        if index.kind not in INDEXES:
            raise BangerError(Code.CORRUPT, f"{INDEX!r} in {self._files.label} is not an index of images")
        chosen = self._choose(index.entries)
        digest = read_descriptor(chosen[0]).digest if len(chosen) == 1 else index.digest
        image = find_image(replace(index, entries=chosen), platform, self._label, self._manifest, self.blob)
        return replace(image, digest=digest)

    def blob(self, descriptor: Descriptor, label: str) -> Generator[bytes, None, None]:
        """The content of a blob in pieces of at most 1 MiB, checked by size and digest while it streams."""
        hexadecimal = descriptor.digest.removeprefix("sha256:")
        with self._files.open(f"{BLOBS}/{hexadecimal}") as extent:
            if extent.size != descriptor.size:
                raise BangerError(Code.CORRUPT, f"{extent.where} has {extent.size:,} bytes, not {descriptor.size:,}")
            yield from download.checked(
                extent.pieces(), self._job, source=extent.where, label=label, size=descriptor.size, sha256=hexadecimal
            )

    def _read(self, name: str) -> bytes:
        with self._files.open(name) as extent:
            return extent.read(MANIFEST_LIMIT)

    def _manifest(self, descriptor: Descriptor) -> Manifest:
        if descriptor.size > MANIFEST_LIMIT:
            raise BangerError(Code.CORRUPT, f"{self._label} has a manifest of {descriptor.size:,} bytes")
        return Manifest.parse(b"".join(self.blob(descriptor, self._label)), self._label)

    def _choose(self, entries: Sequence[Fields]) -> Sequence[Fields]:
        """The entries that are the image: one, or one for each of several platforms."""
        names = [_names(entry) for entry in entries]
        if self._name:
            place = int(self._name[1:]) if re.fullmatch(r"@[0-9]{1,6}", self._name) else None
            found = [
                entry
                for number, entry in enumerate(entries)
                if number == place or any(same_name(self._name, name) for name in names[number])
            ]
        elif len(entries) == 1 or not any(names):
            found = list(entries)
        else:
            # what has no name beside what has one is of the kind of signatures
            found = [entry for entry, name in zip(entries, names, strict=True) if name]
            if len({entry.text("digest", "") for entry in found}) > 1:
                raise BangerError(
                    Code.INVALID,
                    f"{self._files.label} has several images: {shown_names(names)}",
                    hint="name one after the path: PATH:NAME",
                )
            found = found[:1]
        if not found:
            raise BangerError(
                Code.NOT_FOUND,
                f"{self._files.label} has no image {self._name!r}, but {shown_names(names)}",
                hint="see what it is called there, or name it by its place: PATH:@0",
            )
        return found


def _names(entry: Fields) -> list[str]:
    annotations = entry.object("annotations")
    return [name for key in (_FULL_NAME, REF_NAME) if (name := annotations.text(key, ""))]


def shown_names(names: Sequence[Sequence[str]]) -> str:
    """The images of a file for an error message: each by its first name, or else by its place."""
    shown = [repr((each[0] if each else f"@{number}")[:80]) for number, each in enumerate(names[:_SHOWN])]
    more = [f"and {len(names) - _SHOWN} more"] if len(names) > _SHOWN else []
    return ", ".join(shown + more) or "none at all"
