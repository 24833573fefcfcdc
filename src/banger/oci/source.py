"""Opens what an image is pulled from: a registry, an OCI layout or an archive, by how it is named."""

from __future__ import annotations

import contextlib
from collections.abc import Generator, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from banger.api.errors import BangerError, Code
from banger.job import Job
from banger.oci.docker_archive import DockerArchiveSource
from banger.oci.files import DirectoryFiles, open_archive
from banger.oci.layout_source import LayoutSource
from banger.oci.location import DOCKER_ARCHIVE, LAYOUT, Location
from banger.oci.manifest import Descriptor, Image
from banger.oci.platform import Platform
from banger.oci.reference import Reference, Registries, local_name
from banger.oci.registry import Registry
from banger.paths import absolute_path
from banger.recognise import ARCHIVES, recognise


class Source(Protocol):
    """Where one image comes from. Threads may read blobs at the same time.

    One that is `local` lies on this host: its blobs can as well be read again as be kept in a cache.
    """

    local: bool

    def resolve(self, platform: Platform) -> Image:
        """The image for a platform; raises NOT_FOUND, INVALID, DOWNLOAD, CORRUPT, UNSUPPORTED."""

    def blob(self, descriptor: Descriptor, label: str) -> Generator[bytes, None, None]:
        """The content of a blob of that image in pieces of at most 1 MiB; close the generator to leave early.

        Progress goes to the job as `label`. Its size and digest are checked while it streams, the latter at the end:
        nothing may be done with the pieces before that cannot be undone. Raises DOWNLOAD, CORRUPT.
        """


@dataclass(frozen=True)
class Environment:
    """What this host adds: compressed archives are unpacked in the directory `cache`."""

    cache: Path
    registries: Registries = field(default_factory=Registries)


@contextlib.contextmanager
def open_source(text: str, job: Job, environment: Environment) -> Iterator[Source]:
    """The source that a text names: `oci:DIR[:TAG]`, `oci-archive:FILE[:TAG]`, `docker-archive:FILE[:REF]`, else a
    reference to an image in a registry; paths are absolute.

    Raises INVALID for what is none of these, NOT_FOUND for a missing file, CORRUPT for one that is something else.
    """
    location = Location.parse(text)
    if location is None:
        yield Registry(Reference.parse(text, environment.registries.default), job, environment.registries)
        return
    path = absolute_path(location.path)
    if location.transport == LAYOUT:
        yield LayoutSource(DirectoryFiles(path), location.name, job)
        return
    if path.is_file() and (found := recognise(path)).kind not in ARCHIVES:
        message = f"{location.path!r} is {found.what}, not an archive of images"
        raise BangerError(Code.CORRUPT, message, hint=found.advice)
    with open_archive(path, job, environment.cache) as files:
        if location.transport == DOCKER_ARCHIVE:
            yield DockerArchiveSource(files, location.name, job)
        else:
            yield LayoutSource(files, location.name, job)


def default_name(text: str, registries: Registries) -> str:
    """What banger calls the image unless told otherwise: see `local_name` and `Location.local_name`."""
    location = Location.parse(text)
    return location.local_name if location else local_name(Reference.parse(text, registries.default))
