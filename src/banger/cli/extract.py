"""Extracts a tar stream from a guest, which is hostile, so that nothing ever lands outside of the target directory.

Names are checked by the reader; every directory is then opened below its parent without following links, every file
is written under a new name and renamed, and links may only lead to places inside the target (like `tarfile`'s
data filter, PEP 706).
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import stat
from collections.abc import Callable, Iterator
from typing import BinaryIO, Protocol, cast

from banger.api.errors import BangerError, Code
from banger.cli.render import plain
from banger.disk import tar

_UNLIMITED = 1 << 62
_MAP_LIMIT = 16 << 20  # bytes of a sparse map
_SPARSE_VERSION = [(b"GNU.sparse.major", b"1"), (b"GNU.sparse.minor", b"0")]


class Readable(Protocol):
    """What an archive is read from; fewer bytes than asked for mean its end."""

    def read(self, size: int, /) -> bytes: ...


def extract(
    stream: Readable, target: str, label: str, rename: str = "", advance: Callable[[int], None] = lambda count: None
) -> list[str]:
    """Extract below the existing directory `target`; returns what was skipped, each with its reason.

    With `rename`, the archive's one member is a file or link that gets this name. `advance` is told of bytes written.
    Raises CORRUPT for an archive that breaks the rules.
    """
    root = os.open(target, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        return _Extraction(root, label, os.fsencode(rename), advance).run(stream)
    finally:
        os.close(root)


class _Extraction:
    def __init__(self, root: int, label: str, rename: bytes, advance: Callable[[int], None]) -> None:
        self._root = root
        self._label = label
        self._rename = rename
        self._advance = advance
        self._umask = os.umask(0o077)
        os.umask(self._umask)
        self._skipped: list[str] = []

    def run(self, stream: Readable) -> list[str]:
        reader = tar.TarReader(cast(BinaryIO, stream), self._label, _UNLIMITED)
        for count, member in enumerate(reader):
            path = member.path
            if self._rename:
                if count or member.kind == tar.DIRECTORY:
                    raise BangerError(Code.CORRUPT, f"{self._label} is more than the one file that was asked for")
                path = self._rename
            try:
                self._extract(path, member, reader)
            except OSError as error:
                if error.errno not in (errno.ELOOP, errno.ENOTDIR, errno.EEXIST, errno.EISDIR, errno.ENOENT):
                    raise
                self._skip(path, error.strerror or "in the way")
        return self._skipped

    def _skip(self, path: bytes, reason: str) -> None:
        self._skipped.append(plain(f"{os.fsdecode(path)}: {reason}"))

    def _extract(self, path: bytes, member: tar.Member, reader: tar.TarReader) -> None:
        parts = path.split(b"/") if path else []
        match member.kind:
            case tar.DIRECTORY:
                os.close(self._directory(parts))
                return
            case tar.CHARACTER | tar.BLOCK_DEVICE:
                self._skip(path, "a device")
                return
            case tar.FIFO:
                self._skip(path, "a named pipe")
                return
            case tar.SYMLINK if not _stays_inside(parts[:-1], member.link):
                self._skip(path, f"a link that leads outside, to {os.fsdecode(member.link)}")
                return
        if not parts:
            raise BangerError(Code.CORRUPT, f"{self._label} has a file without a name")
        parent = self._directory(parts[:-1])
        try:
            with _new_name(parent, parts[-1]) as temporary:
                if member.kind == tar.SYMLINK:
                    os.symlink(member.link, temporary, dir_fd=parent)
                elif member.kind == tar.HARD_LINK:
                    self._link(member.link, temporary, parent)
                else:
                    self._write(temporary, parent, member, reader)
        finally:
            os.close(parent)

    def _directory(self, parts: list[bytes], make: bool = True) -> int:
        """A descriptor of a directory below the root, reached without following links."""
        current = os.dup(self._root)
        for part in parts:
            try:
                if make:
                    with contextlib.suppress(FileExistsError):
                        os.mkdir(part, 0o777, dir_fd=current)
                inner = os.open(part, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=current)
            finally:
                os.close(current)
            current = inner
        return current

    def _link(self, link: bytes, name: bytes, parent: int) -> None:
        *directories, last = link.split(b"/")
        source = self._directory(directories, make=False)
        try:
            # a symbolic link leads somewhere else from another directory
            if not stat.S_ISREG(os.lstat(last, dir_fd=source).st_mode):
                raise OSError(errno.EEXIST, "a hard link to something that is not a file")
            os.link(last, name, src_dir_fd=source, dst_dir_fd=parent, follow_symlinks=False)
        finally:
            os.close(source)

    def _write(self, name: bytes, parent: int, member: tar.Member, reader: tar.TarReader) -> None:
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        descriptor = os.open(name, flags, 0o600, dir_fd=parent)
        with os.fdopen(descriptor, "wb", buffering=0) as target:
            if member.is_sparse:
                self._write_sparse(target.fileno(), member, reader)
            else:
                for chunk in reader.data():
                    _write_all(target.fileno(), memoryview(chunk))
                    self._advance(len(chunk))
            # neither set-id bits nor what the user's umask takes away
            os.fchmod(target.fileno(), (member.mode & 0o777 & ~self._umask) | 0o600)
            os.utime(target.fileno(), (member.mtime, member.mtime))

    def _write_sparse(self, target: int, member: tar.Member, reader: tar.TarReader) -> None:
        extents, rest, chunks, size = self._sparse_map(member, reader)
        for offset, length in extents:
            os.lseek(target, offset, os.SEEK_SET)
            while length:
                if not rest:
                    rest = memoryview(next(chunks, b""))
                    if not rest:
                        raise BangerError(Code.CORRUPT, f"{self._label} has a sparse file that is cut off")
                piece, rest = rest[:length], rest[length:]
                _write_all(target, piece)
                self._advance(len(piece))
                length -= len(piece)
        os.ftruncate(target, size)

    def _sparse_map(
        self, member: tar.Member, reader: tar.TarReader
    ) -> tuple[list[tuple[int, int]], memoryview, Iterator[bytes], int]:
        """The data extents, what is read of the data already, the rest of it, and the whole size.

        Format: GNU tar manual, "Storing Sparse Files", PAX format version 1.0: decimal lines, padded to a block.
        """
        records = dict(member.sparse)
        chunks = reader.data()
        text = next(chunks, b"")
        if any(records.get(key) != value for key, value in _SPARSE_VERSION):
            raise BangerError(Code.CORRUPT, f"{self._label} has a sparse file of an unknown format")
        numbers: list[int] = []
        position, wanted = 0, 1
        while len(numbers) < wanted:
            end = text.find(b"\n", position)
            if end < 0:
                more = next(chunks, b"")
                if not more or len(text) > _MAP_LIMIT:
                    raise BangerError(Code.CORRUPT, f"{self._label} has a sparse file without an end of its map")
                text += more
                continue
            line = text[position:end]
            if not re.fullmatch(rb"[0-9]{1,19}", line):
                raise BangerError(Code.CORRUPT, f"{self._label} has a sparse file with a malformed map")
            numbers.append(int(line))
            position = end + 1
            wanted = 1 + 2 * numbers[0]
        size = int(records.get(b"GNU.sparse.realsize", b"0"))
        extents = list(zip(numbers[1::2], numbers[2::2], strict=True))
        if any(offset + length > size for offset, length in extents):
            raise BangerError(Code.CORRUPT, f"{self._label} has a sparse file with data past its end")
        return extents, memoryview(text)[position + -position % tar.BLOCK :], chunks, size


@contextlib.contextmanager
def _new_name(parent: int, name: bytes) -> Iterator[bytes]:
    """A name to make something under; it then replaces `name` in one step, or goes away after a failure."""
    temporary = b".banger-%d-%d" % (os.getpid(), parent)
    try:
        yield temporary
        os.rename(temporary, name, src_dir_fd=parent, dst_dir_fd=parent)
        # rename(2) does nothing when both are links to one file
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary, dir_fd=parent)


def _stays_inside(directory: list[bytes], link: bytes) -> bool:
    """Whether a symbolic link in `directory` (components below the root) leads nowhere outside of the root.

    `..` counts at the beginning only: after a component that is a link itself, it could lead anywhere.
    """
    parts = [part for part in link.split(b"/") if part not in (b"", b".")]
    up = 0
    while up < len(parts) and parts[up] == b"..":
        up += 1
    return not link.startswith(b"/") and up <= len(directory) and b".." not in parts[up:]


def _write_all(descriptor: int, data: memoryview) -> None:
    while data:
        data = data[os.write(descriptor, data) :]
