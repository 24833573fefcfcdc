"""The files that an image outside of registries consists of, in a directory or a tar archive; neither is trusted."""

from __future__ import annotations

import contextlib
import errno
import os
import posixpath
import stat
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Protocol

from banger import system
from banger.api.errors import BangerError, Code
from banger.decompress import MAGIC_SIZE, compression, open_decompressed
from banger.disk import space, tar
from banger.job import Job

_ARCHIVE_LIMIT = 64 << 30  # bytes, unpacked
_MEMBERS_MAX = 100_000  # of an archive: images have some per layer
_LINKS_MAX = 8  # from one to the next
_STEP = 1 << 20
_CHECK_EVERY = 32 << 20


@dataclass(frozen=True)
class Extent:
    """A file's bytes: `size` of them from `offset` in an open file; `where` names it in errors."""

    descriptor: int
    offset: int
    size: int
    where: str

    def pieces(self) -> Iterator[bytes]:
        """All, in pieces of at most 1 MiB; fewer when the file has become shorter."""
        done = 0
        while done < self.size:
            piece = os.pread(self.descriptor, min(_STEP, self.size - done), self.offset + done)
            if not piece:
                return
            done += len(piece)
            yield piece

    def read(self, limit: int) -> bytes:
        """All, if they are at most `limit`, else CORRUPT."""
        if self.size > limit:
            raise BangerError(Code.CORRUPT, f"{self.where} has {self.size:,} bytes; {limit:,} are possible")
        return b"".join(self.pieces())


class Files(Protocol):
    """`label` is what users call them."""

    label: str

    def open(self, name: str) -> contextlib.AbstractContextManager[Extent]:
        """A file by its path relative to the whole, without '..'; raises CORRUPT when it is not there or no file."""

    def has(self, name: str) -> bool:
        """Whether there is anything of that name."""


class DirectoryFiles:
    """Those of a directory, in which no link is followed."""

    def __init__(self, path: Path) -> None:
        self.label = repr(str(path))
        self._path = path
        if not path.is_dir():
            there = path.exists()
            raise BangerError(
                Code.INVALID if there else Code.NOT_FOUND,
                f"{self.label} is not a directory" if there else f"there is no directory {self.label}",
                hint="an archive is read with oci-archive:FILE or docker-archive:FILE" if there else "check the path",
            )

    @contextlib.contextmanager
    def open(self, name: str) -> Iterator[Extent]:
        where = f"{name!r} in {self.label}"
        try:
            descriptor = self._open(name)
        except FileNotFoundError as error:
            raise _missing(name, self.label) from error
        except OSError as error:
            link = error.errno in (errno.ELOOP, errno.ENOTDIR)  # what O_NOFOLLOW gives for one
            why = "is reached through a link" if link else f"cannot be read: {error.strerror}"
            raise BangerError(Code.CORRUPT, f"{where} {why}") from error
        try:
            status = os.fstat(descriptor)
            if not stat.S_ISREG(status.st_mode):
                raise BangerError(Code.CORRUPT, f"{where} is not a regular file")
            yield Extent(descriptor, 0, status.st_size, where)
        finally:
            os.close(descriptor)

    def has(self, name: str) -> bool:
        return os.path.lexists(self._path / name)

    def _open(self, name: str) -> int:
        flags = os.O_RDONLY | os.O_CLOEXEC
        parent = os.open(self._path, flags | os.O_DIRECTORY)
        *directories, last = name.split("/")
        try:
            for directory in directories:
                inner = os.open(directory, flags | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=parent)
                os.close(parent)
                parent = inner
            # without O_NONBLOCK a FIFO would wait for its writer
            return os.open(last, flags | os.O_NOFOLLOW | os.O_NONBLOCK, dir_fd=parent)
        finally:
            os.close(parent)


class ArchiveFiles:
    """Those of a tar archive: nothing is unpacked, its headers are read once."""

    def __init__(self, file: BinaryIO, label: str, job: Job) -> None:
        self.label = label
        self._file = file
        self._extents: dict[str, tuple[int, int]] = {}
        self._links: dict[str, str] = {}
        stream = _Headers(file, job, label)
        reader = tar.TarReader(stream, label, _ARCHIVE_LIMIT)
        for count, member in enumerate(reader):
            if count == _MEMBERS_MAX:
                raise BangerError(
                    Code.INVALID,
                    f"{label} has more than {_MEMBERS_MAX:,} files: it is no archive of images",
                    hint="a root filesystem becomes an image with 'banger image import'",
                )
            name = os.fsdecode(member.path)
            self._extents.pop(name, None)
            self._links.pop(name, None)
            if member.kind == tar.REGULAR and not member.is_sparse:
                self._extents[name] = (stream.position, member.size)
            elif member.kind == tar.HARD_LINK:
                self._links[name] = os.fsdecode(member.link)
            elif member.kind == tar.SYMLINK:
                # how `docker save` wrote a layer that another image of the archive has, too
                target = posixpath.join(posixpath.dirname(name), os.fsdecode(member.link))
                self._links[name] = posixpath.normpath(target)

    @contextlib.contextmanager
    def open(self, name: str) -> Iterator[Extent]:
        yield self.extent(name)

    def extent(self, name: str) -> Extent:
        """As `open`, without an end."""
        found = name
        for _ in range(_LINKS_MAX):
            if found in self._extents:
                offset, size = self._extents[found]
                return Extent(self._file.fileno(), offset, size, f"{name!r} in {self.label}")
            if found not in self._links:
                raise _missing(name, self.label)
            found = self._links[found]
        raise BangerError(Code.CORRUPT, f"{name!r} in {self.label} is a link that leads nowhere")

    def has(self, name: str) -> bool:
        return name in self._extents or name in self._links


class _Headers(tar.Pieces):
    """A file whose headers are read and whose data is passed over; it knows how far it has been read."""

    def __init__(self, file: BinaryIO, job: Job, label: str) -> None:
        super().__init__(iter(()))
        self._file = file
        self._job = job
        self._label = label
        self._size = os.fstat(file.fileno()).st_size
        self._unchecked = 0
        self.position = 0

    def read(self, size: int, /) -> bytes:
        data = self._file.read(size)
        self._advance(len(data))
        return data

    def skip(self, size: int) -> int:
        count = min(size, self._size - self.position)
        self._file.seek(count, os.SEEK_CUR)
        self._advance(count)
        return count

    def _advance(self, count: int) -> None:
        self.position += count
        self._unchecked += count
        if self._unchecked >= _CHECK_EVERY:
            self._unchecked = 0
            self._job.progress("read", self._label, self.position, self._size)


@contextlib.contextmanager
def open_archive(path: Path, job: Job, cache: Path) -> Iterator[ArchiveFiles]:
    """The files of a tar archive; a compressed one is first unpacked to a nameless file in the directory `cache`.

    Raises NOT_FOUND, INVALID for what is no file, CORRUPT, and EXHAUSTED without disk space.
    """
    label = repr(str(path))
    try:
        file = open(path, "rb", opener=system.open_regular)
    except FileNotFoundError as error:
        raise BangerError(Code.NOT_FOUND, f"there is no file {label}", hint="check the path") from error
    except OSError as error:
        hint = "a directory is read with oci:DIRECTORY" if path.is_dir() else ""
        raise BangerError(Code.INVALID, f"{label} cannot be read: {error.strerror}", hint=hint) from error
    with file:
        if compression(file.peek(MAGIC_SIZE)) is None:
            yield ArchiveFiles(file, label, job)
        else:
            with _unpacked(path, job, cache) as unpacked:
                yield ArchiveFiles(unpacked, label, job)


@contextlib.contextmanager
def _unpacked(path: Path, job: Job, cache: Path) -> Iterator[BinaryIO]:
    cache.mkdir(mode=0o700, parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=cache) as file:
        size, checked = 0, 0
        with open_decompressed(path, job, "unpack") as stream:
            while piece := stream.read(_STEP):
                size += len(piece)
                if size > _ARCHIVE_LIMIT:
                    limit = system.human_size(_ARCHIVE_LIMIT)
                    raise BangerError(Code.EXHAUSTED, f"{str(path)!r} unpacks to more than {limit}, the limit")
                if size - checked >= _CHECK_EVERY or not checked:
                    checked = size
                    if space.is_short(cache):
                        raise _no_space(path, cache)
                try:
                    file.write(piece)
                except OSError as error:
                    raise _no_space(path, cache) from error
        file.seek(0)
        yield file


def _no_space(path: Path, cache: Path) -> BangerError:
    return BangerError(
        Code.EXHAUSTED,
        f"not enough disk space in {cache} to unpack {str(path)!r}",
        hint="free some, or unpack the archive elsewhere: what is not compressed is read where it lies",
    )


def _missing(name: str, label: str) -> BangerError:
    return BangerError(Code.CORRUPT, f"{label} has no file {name!r}", hint="it is incomplete: copy it again")
