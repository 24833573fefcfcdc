"""Reads what others made within bounds: names stay inside their directory, files below a size."""

from __future__ import annotations

from pathlib import Path, PurePosixPath

from banger import system
from banger.api.errors import BangerError, Code


def confined(directory: Path, name: str, where: str, kind: str = "file") -> Path:
    """The real path of the `kind` (file or directory) called `name` in a directory, all links resolved.

    Raises CORRUPT, with `where` as what gave the name, when there is none or when the name or a link leads out.
    """
    try:
        real = (directory / name).resolve(strict=True)
        found = real.is_dir() if kind == "directory" else real.is_file()
    except (OSError, ValueError, RuntimeError):  # no such file, NUL in the name, loop of links
        found = False
    if not found or ".." in PurePosixPath(name).parts or not real.is_relative_to(directory.resolve()):
        raise BangerError(Code.CORRUPT, f"{where} names {name!r}, which is not a {kind} inside {str(directory)!r}")
    return real


def read_bounded(file: Path, limit: int) -> bytes:
    """The content of a file of at most `limit` bytes (else CORRUPT)."""
    with open(file, "rb") as stream:
        data = stream.read(limit + 1)
    if len(data) > limit:
        raise BangerError(Code.CORRUPT, f"{file.name} is larger than {system.human_size(limit)}")
    return data
