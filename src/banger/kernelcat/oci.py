"""Takes the kernel out of an image in a registry, as LinuxKit, Ignite and plain Dockerfiles publish them."""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path

from banger.api.errors import BangerError, Code
from banger.disk import tar
from banger.disk.tar import Member
from banger.job import Job
from banger.kernelcat.archive import ARCHIVE_LIMIT, Extraction
from banger.kernelcat.bundle import take_archive
from banger.kernelcat.sources import discover_paths
from banger.oci.reference import Reference
from banger.oci.registry import Registry

_NESTED = "kernel.tar"  # LinuxKit's modules
_STEP = 1 << 20


def fetch_oci(
    reference: Reference, arch: str, into: Path, job: Job, *, insecure: Collection[str] = ()
) -> tuple[list[Path], str, dict[str, int]]:
    """Download the kernel files of an image into directories below `into`.

    Returns these directories, as sources to import, the image's digest, and what was skipped, counted by kind. Raises
    NOT_FOUND for an image without a kernel, and what `Registry`, `Extraction` and `download.stream` raise.
    """
    registry = Registry(reference, job, insecure=insecure)
    image = registry.resolve(arch)
    label = str(reference)
    tree = into / "image"
    extraction = Extraction(tree, label, job, rooted=True)
    for number, layer in enumerate(image.layers, 1):
        if layer.size > ARCHIVE_LIMIT:
            raise BangerError(Code.EXHAUSTED, f"{label} has a layer of {layer.size:,} bytes")
        with contextlib.closing(registry.blob(layer, f"layer {number} of {len(image.layers)}")) as pieces:
            if layer.title:
                extraction.take(_SingleFile(layer.title, layer.size, pieces))
            else:
                take_archive(extraction, pieces, label, job)
    skipped = extraction.finish()
    directories = [tree]
    if (tree / _NESTED).is_file():
        directories.append(into / "nested")
        nested = Extraction(directories[1], f"{_NESTED} of {label}", job, rooted=True)
        with open(tree / _NESTED, "rb") as stream:
            take_archive(nested, iter(lambda: stream.read(_STEP), b""), f"{_NESTED} of {label}", job)
        for kind, count in nested.finish().items():
            skipped[kind] = skipped.get(kind, 0) + count
        (tree / _NESTED).unlink()
    if all(discover_paths(directory, "").kernel is None for directory in directories):
        raise BangerError(
            Code.NOT_FOUND,
            f"there is no kernel in {label}",
            hint="an image with a kernel has /kernel, /vmlinux or /boot/vmlinu*, and /lib/modules",
        )
    return directories, image.digest, skipped


class _SingleFile:
    """A layer that is one file, not an archive, as the artifacts that ORAS pushes have them."""

    def __init__(self, title: str, size: int, pieces: Iterable[bytes]) -> None:
        self._title = title
        self._size = size
        self._pieces = pieces

    def __iter__(self) -> Iterator[Member]:
        # JSON can hold halves of surrogate pairs, which are no text
        name = self._title.encode(errors="surrogatepass")
        yield Member(name, tar.REGULAR, 0o644, uid=0, gid=0, mtime=0, size=self._size)
        for _ in self._pieces:  # to the end, where the digest is checked
            pass

    def data(self) -> Iterator[bytes]:
        yield from self._pieces
