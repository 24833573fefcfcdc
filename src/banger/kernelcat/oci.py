"""Takes the kernel out of an image in a registry, as LinuxKit, Ignite and plain Dockerfiles publish them."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

from banger import system
from banger.api.errors import BangerError, Code
from banger.disk import tar
from banger.disk.tar import Member
from banger.job import Job
from banger.kernelcat.archive import ARCHIVE_LIMIT, Extraction
from banger.kernelcat.bundle import take_archive
from banger.kernelcat.staged import discover_paths
from banger.oci.platform import Platform
from banger.oci.reference import Reference, Registries
from banger.oci.registry import Registry

_NESTED = "kernel.tar"  # LinuxKit's modules
_STEP = 1 << 20


def fetch_oci(
    reference: Reference, arch: str, into: Path, job: Job, registries: Registries
) -> tuple[list[Path], str, dict[str, int]]:
    """Download the kernel files of an image into a directory below `into`.

    Returns this as the sources to import, the digest of what the reference names, and what was skipped, counted by
    kind. Raises NOT_FOUND for an image without a kernel, and what `Registry`, `Extraction` and `download.stream` raise.
    """
    registry = Registry(reference, job, registries)
    image = registry.resolve(Platform.of("linux", arch))
    label = str(reference)
    if (size := sum(layer.size for layer in image.layers)) > ARCHIVE_LIMIT:
        limit = system.human_size(ARCHIVE_LIMIT)
        raise BangerError(Code.EXHAUSTED, f"the layers of {label} have {size:,} bytes, more than {limit}, the limit")
    tree = into / "image"
    extraction = Extraction(tree, label, job, rooted=True)
    # all else is no part of a filesystem: signatures, attestations
    layers = [layer for layer in image.layers if layer.title or "tar" in layer.media_type]
    for number, layer in enumerate(layers, 1):
        with contextlib.closing(registry.blob(layer, f"layer {number} of {len(layers)}")) as pieces:
            if layer.title:
                extraction.take(_SingleFile(layer.title, layer.size, pieces))
            else:
                take_archive(extraction, pieces, label, job)
    skipped = Counter(extraction.finish()) + Counter(layer=len(image.layers) - len(layers))
    nested = tree / _NESTED
    if nested.is_file():
        extraction = Extraction(tree, f"{_NESTED} of {label}", job, rooted=True)
        with open(nested, "rb") as stream:
            take_archive(extraction, iter(lambda: stream.read(_STEP), b""), f"{_NESTED} of {label}", job)
        skipped += Counter(extraction.finish())
    if discover_paths(tree, "").kernel is None:
        raise BangerError(
            Code.NOT_FOUND,
            f"there is no kernel in {label}",
            hint="an image with a kernel has /kernel, /vmlinux or /boot/vmlinu*, and /lib/modules",
        )
    return [tree], image.digest, skipped


class _SingleFile:
    """A layer that is one file, as the artifacts that ORAS pushes have them; not downloaded where it is not wanted."""

    def __init__(self, title: str, size: int, pieces: Iterable[bytes]) -> None:
        self._title = title
        self._size = size
        self._pieces = pieces

    def __iter__(self) -> Iterator[Member]:
        # JSON can hold halves of surrogate pairs, which are no text
        name = self._title.encode(errors="surrogatepass")
        yield Member(name, tar.REGULAR, 0o644, uid=0, gid=0, mtime=0, size=self._size)

    def data(self) -> Iterator[bytes]:
        yield from self._pieces
