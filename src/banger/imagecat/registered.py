"""What is remembered of the files of unmanaged images, so that it is noticed when they change or vanish."""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from banger.api.errors import BangerError, Code
from banger.entries import sum_file
from banger.job import Job

WORK_SEED, KERNEL, INITRD, MODULES = PARTS = ("work-seed", "kernel", "initrd", "modules")


@dataclass(frozen=True)
class Registered:
    """A file, or a directory of modules, as it was when it was registered.

    `part` is one of PARTS, `path` absolute. Of a directory `size_bytes` is that of all files, `mtime_ns` the latest in
    it, and `sha256` covers names and contents.
    """

    part: str
    path: str
    size_bytes: int
    mtime_ns: int
    sha256: str


def register(part: str, path: Path, job: Job) -> Registered:
    """Read a file or directory for its digest; raises IN_USE when it was written meanwhile, NOT_FOUND without it."""
    try:
        size, mtime = mark(path)
        job.progress("digest", str(path))
        entry = Registered(part, str(path), size, mtime, digest(path, job))
    except FileNotFoundError as error:
        raise BangerError(Code.NOT_FOUND, f"{error.filename} does not exist") from error
    except OSError as error:
        raise BangerError(Code.INVALID, f"{error.filename} cannot be read: {error.strerror}") from error
    refuse_changed(entry)
    return entry


def refuse_changed(entry: Registered) -> None:
    """Raise IN_USE for what has changed since a moment ago."""
    if problem(entry):
        raise BangerError(
            Code.IN_USE,
            f"{entry.path} was written while it was read",
            hint="try again when nothing writes it any more",
        )


def problem(entry: Registered) -> str:
    """How it is no longer what was registered, by size and modification time; '' when it is."""
    try:
        if mark(Path(entry.path)) == (entry.size_bytes, entry.mtime_ns):
            return ""
    except FileNotFoundError as error:
        return f"{error.filename} is gone"
    except OSError as error:
        return f"{error.filename} cannot be read: {error.strerror}"
    return f"{entry.path} has changed since it was registered"


def changed(entry: Registered, job: Job) -> str:
    """The same by its content, which is read again."""
    job.progress("verify", entry.path)
    try:
        found = digest(Path(entry.path), job)
    except FileNotFoundError as error:
        return f"{error.filename} is gone"
    except OSError as error:
        return f"{error.filename} cannot be read: {error.strerror}"
    return "" if found == entry.sha256 else content_changed(entry.path, found, entry.sha256)


def content_changed(file: str, found: str, expected: str) -> str:
    """How a problem with the content of a file is told."""
    return f"{file} has changed: its SHA-256 is {found}, not {expected}"


def mark(path: Path) -> tuple[int, int]:
    """What changes with a file or directory: its size and modification time, see Registered."""
    status = path.stat()
    if not stat.S_ISDIR(status.st_mode):
        return status.st_size, status.st_mtime_ns
    size, mtime = 0, status.st_mtime_ns
    for entry in _walk(path):
        inside = entry.stat(follow_symlinks=False)
        mtime = max(mtime, inside.st_mtime_ns)
        if entry.is_file(follow_symlinks=False):
            size += inside.st_size
    return size, mtime


def digest(path: Path, job: Job) -> str:
    """The SHA-256 of a file; of a directory that of the names and digests of its files."""
    if not path.is_dir():
        return sum_file(path, job)
    total = hashlib.sha256()
    for entry in sorted(_walk(path), key=lambda entry: entry.path):
        if entry.is_file(follow_symlinks=False):
            total.update(os.fsencode(os.path.relpath(entry.path, path)) + b"\0")
            total.update(bytes.fromhex(sum_file(Path(entry.path), job)))
    return total.hexdigest()


def _walk(directory: Path) -> Iterator[os.DirEntry[str]]:
    with os.scandir(directory) as found:
        for entry in found:
            yield entry
            if entry.is_dir(follow_symlinks=False):
                yield from _walk(Path(entry.path))
