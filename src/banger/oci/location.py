"""Where images lie that are files: the transports oci, oci-archive and docker-archive (containers-transports(5))."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from pathlib import Path

from banger.api.errors import BangerError, Code
from banger.oci.reference import Reference, local_name, valid_name

LAYOUT, LAYOUT_ARCHIVE, DOCKER_ARCHIVE = "oci", "oci-archive", "docker-archive"

# other transports of skopeo and podman, which read what only their own programs know
_OTHERS = ("containers-storage", "dir", "docker-daemon", "ostree", "sif", "tarball")
_SUFFIX = re.compile(r"(\.oci|\.docker)?(\.tar)?(\.(gz|xz|zst|bz2|lz4))?|\.(tgz|txz|tzst|tbz2?)")


@dataclass(frozen=True)
class Location:
    """An image in the file or directory `path`: the one called `name`, or the only one where that is ''."""

    transport: str
    path: str
    name: str

    @classmethod
    def parse(cls, text: str) -> Location | None:
        """Read TRANSPORT:PATH[:NAME], None for what has no transport: the path ends at its first colon.

        Raises INVALID without a path, UNSUPPORTED for a transport that banger does not read.
        """
        transport, colon, rest = text.partition(":")
        if colon and transport in _OTHERS:
            raise BangerError(
                Code.UNSUPPORTED,
                f"{text[:300]!r} cannot be read: banger does not know the transport {transport!r}",
                hint=f"copy it first: skopeo copy {transport}:... oci:DIRECTORY:TAG",
            )
        if not colon or transport not in (LAYOUT, LAYOUT_ARCHIVE, DOCKER_ARCHIVE):
            return None
        path, _, name = rest.partition(":")
        if not path or "\0" in path:
            what = "DIRECTORY[:TAG]" if transport == LAYOUT else "FILE[:NAME]"
            raise BangerError(Code.INVALID, f"{text[:300]!r} names no path", hint=f"say {transport}:{what}")
        return cls(transport, path, name)

    def absolute(self) -> Location:
        """The same for other working directories."""
        return replace(self, path=str(Path(self.path).absolute()))

    @property
    def local_name(self) -> str:
        """What banger calls the image unless told otherwise, by its name, else by that of the file."""
        file = Path(self.path).name
        for end in range(len(file)):
            if end and _SUFFIX.fullmatch(file, end):
                file = file[:end]
                break
        if not self.name or self.name.startswith("@"):
            return valid_name(file)
        if self.transport == DOCKER_ARCHIVE or "/" in self.name or ":" in self.name:
            return local_name(Reference.parse(self.name))
        return valid_name(file if self.name == "latest" else f"{file}-{self.name}")

    def __str__(self) -> str:
        return f"{self.transport}:{self.path}" + (f":{self.name}" if self.name else "")
