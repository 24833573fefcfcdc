"""Writes an OCI image layout of one image, as a directory or as a tar archive (OCI Image Layout 1.1)."""

from __future__ import annotations

import contextlib
import hashlib
import json
import tarfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import BinaryIO, Protocol

REF_NAME = "org.opencontainers.image.ref.name"
INDEX, MARKER, BLOBS = "index.json", "oci-layout", "blobs/sha256"

_MANIFEST = "application/vnd.oci.image.manifest.v1+json"
_CONFIG = "application/vnd.oci.image.config.v1+json"
_LAYER = "application/vnd.oci.image.layer.v1.tar+gzip"
_INDEX = "application/vnd.oci.image.index.v1+json"
_TAG = "latest"
_LEVEL = 6  # of zlib, as docker and podman have it
_GZIP_HEADER = b"\x1f\x8b\x08\0\0\0\0\0\0\xff"  # RFC 1952: no name, no time, of an unknown system

Json = None | bool | int | float | str | list["Json"] | dict[str, "Json"]


@dataclass(frozen=True)
class Blob:
    """A blob that has been written: its SHA-256 in hexadecimal, and its bytes."""

    sha256: str
    size: int


class Target(Protocol):
    """Where the files of a layout go."""

    def file(self, name: str, data: bytes) -> None:
        """Add a small file."""

    def blob(self) -> contextlib.AbstractContextManager[BlobWriter]:
        """Add a blob whose digest is known only when all of it has been written."""


class BlobWriter:
    """Writes one blob and sums it up."""

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream
        self._digest = hashlib.sha256()
        self._size = 0

    def write(self, data: bytes) -> None:
        self._digest.update(data)
        self._size += len(data)
        self._stream.write(data)

    @property
    def blob(self) -> Blob:
        return Blob(self._digest.hexdigest(), self._size)


class Directory:
    """A layout in a new directory."""

    def __init__(self, path: Path) -> None:
        self._path = path
        (path / BLOBS).mkdir(parents=True)

    def file(self, name: str, data: bytes) -> None:
        (self._path / name).write_bytes(data)

    @contextlib.contextmanager
    def blob(self) -> Iterator[BlobWriter]:
        partial = self._path / BLOBS / ".partial"
        with open(partial, "xb") as stream:
            writer = BlobWriter(stream)
            yield writer
        partial.rename(self._path / BLOBS / writer.blob.sha256)


class Archive:
    """A layout as a tar archive, written to the beginning of a seekable file."""

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream
        # readers that make only what the archive has, like skopeo, want directories before what lies in them
        for parent in reversed(PurePosixPath(BLOBS, "blob").parents[:-1]):
            stream.write(_header(str(parent), 0, tarfile.DIRTYPE))

    def file(self, name: str, data: bytes) -> None:
        self._stream.write(_header(name, len(data)) + data + bytes(-len(data) % tarfile.BLOCKSIZE))

    @contextlib.contextmanager
    def blob(self) -> Iterator[BlobWriter]:
        start = self._stream.tell()
        self._stream.write(bytes(tarfile.BLOCKSIZE))  # the header names the digest, so it comes last
        writer = BlobWriter(self._stream)
        yield writer
        blob = writer.blob
        self._stream.write(bytes(-blob.size % tarfile.BLOCKSIZE))
        end = self._stream.tell()
        self._stream.seek(start)
        self._stream.write(_header(f"{BLOBS}/{blob.sha256}", blob.size))
        self._stream.seek(end)

    def finish(self) -> None:
        """Write the end of the archive."""
        self._stream.write(bytes(2 * tarfile.BLOCKSIZE))


class LayerWriter:
    """Compresses the tar of a layer into a blob; the same bytes in give the same bytes out."""

    def __init__(self, blob: BlobWriter) -> None:
        self._blob = blob
        self._diff = hashlib.sha256()
        self._crc = self._size = 0
        self._deflate = zlib.compressobj(_LEVEL, zlib.DEFLATED, -zlib.MAX_WBITS)
        blob.write(_GZIP_HEADER)

    def write(self, data: bytes) -> None:
        self._diff.update(data)
        self._crc = zlib.crc32(data, self._crc)
        self._size += len(data)
        self._blob.write(self._deflate.compress(data))

    def finish(self) -> str:
        """Write the end; the digest of the tar ("sha256:...")."""
        self._blob.write(self._deflate.flush())
        self._blob.write(self._crc.to_bytes(4, "little") + (self._size & 0xFFFFFFFF).to_bytes(4, "little"))
        return f"sha256:{self._diff.hexdigest()}"


def write_image(target: Target, layer: Blob, config: dict[str, Json], producer: str) -> str:
    """Complete a layout that has the blob of its only layer, and return the digest of the manifest.

    `producer` is noted in the index, so that what wrote the layout finds its own again.
    """
    document = _dump(config)
    manifest = _dump(
        {
            "schemaVersion": 2,
            "mediaType": _MANIFEST,
            "config": _descriptor(_CONFIG, document),
            "layers": [{"mediaType": _LAYER, "digest": f"sha256:{layer.sha256}", "size": layer.size}],
        }
    )
    platform = {key: config[key] for key in ("architecture", "os", "variant") if config.get(key)}
    described = _descriptor(_MANIFEST, manifest) | {"annotations": {REF_NAME: _TAG}, "platform": platform}
    for data in (document, manifest):
        with target.blob() as blob:
            blob.write(data)
    target.file(
        INDEX,
        _dump(
            {
                "schemaVersion": 2,
                "mediaType": _INDEX,
                "manifests": [described],
                "annotations": {"org.opencontainers.image.vendor": producer},
            }
        ),
    )
    target.file(MARKER, _dump({"imageLayoutVersion": "1.0.0"}))
    return str(described["digest"])


def is_made_by(directory: Path, producer: str) -> bool:
    """Whether a directory is a layout as `write_image` leaves it, with nothing besides."""
    try:
        index = json.loads((directory / INDEX).read_bytes())
        (manifest,) = index["manifests"]
        blobs = {path.name for path in (directory / BLOBS).iterdir()}
        digest = manifest["digest"].removeprefix("sha256:")
        content = json.loads((directory / BLOBS / digest).read_bytes())
        named = {digest, *(part["digest"].removeprefix("sha256:") for part in (content["config"], *content["layers"]))}
        return bool(
            index["annotations"]["org.opencontainers.image.vendor"] == producer
            and blobs == named
            and {path.name for path in directory.iterdir()} == {INDEX, MARKER, "blobs"}
            and [path.name for path in (directory / "blobs").iterdir()] == ["sha256"]
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return False


def _dump(document: dict[str, Json]) -> bytes:
    return json.dumps(document, separators=(",", ":")).encode()


def _descriptor(media_type: str, data: bytes) -> dict[str, Json]:
    return {"mediaType": media_type, "digest": f"sha256:{hashlib.sha256(data).hexdigest()}", "size": len(data)}


def _header(name: str, size: int, kind: bytes = tarfile.REGTYPE) -> bytes:
    member = tarfile.TarInfo(f"{name}/" if kind == tarfile.DIRTYPE else name)
    member.type = kind
    member.mode = 0o755 if kind == tarfile.DIRTYPE else 0o644
    member.size = size
    return member.tobuf(tarfile.GNU_FORMAT)
