"""Makes the tar stream of a file or tree of this host, for a guest."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from banger.api.errors import BangerError, Code
from banger.cli.render import plain
from banger.disk import tar

_END = bytes(2 * tar.BLOCK)  # POSIX.1-2017 pax: two blocks of zeros end an archive
_KINDS = {stat.S_IFREG: tar.REGULAR, stat.S_IFDIR: tar.DIRECTORY, stat.S_IFLNK: tar.SYMLINK, stat.S_IFIFO: tar.FIFO}


class Archive:
    """The tar stream of `source` under `name`, read with `chunks`; `name` '' leaves out the directory itself.

    A symbolic link given as `source` is followed, those inside of a tree are kept. Owners are root unless `owners`.
    `skipped` tells afterwards what was left out and why.
    """

    def __init__(self, source: str, name: str, owners: bool) -> None:
        self.source = source
        self.skipped: list[str] = []
        self._name = os.fsencode(name)
        self._owners = owners
        self._links: dict[tuple[int, int], bytes] = {}

    def size(self) -> int:
        """The bytes of file data in it, for a progress bar."""
        status = Path(self.source).stat()
        if not stat.S_ISDIR(status.st_mode):
            return status.st_size
        total = 0
        for directory, _, names in os.walk(self.source):
            for name in names:
                entry = os.lstat(f"{directory}/{name}")
                total += entry.st_size if stat.S_ISREG(entry.st_mode) else 0
        return total

    def chunks(self, chunk_size: int) -> Iterator[bytes]:
        """The stream, in pieces of at most about `chunk_size` bytes; small ones are gathered."""
        gathered: list[bytes] = []
        size = 0
        for piece in self._pieces(chunk_size):
            if size + len(piece) > chunk_size:
                yield b"".join(gathered)
                gathered, size = [], 0
            gathered.append(piece)
            size += len(piece)
        yield b"".join(gathered)

    def _pieces(self, chunk_size: int) -> Iterator[bytes]:
        stack = [(os.fsencode(self.source), self._name, True)]
        while stack:
            path, name, follow = stack.pop()
            try:
                status = Path(self.source).stat() if follow else os.lstat(path)
                if name:
                    yield from self._member(path, name, status, chunk_size)
                if stat.S_ISDIR(status.st_mode):
                    with os.scandir(path) as entries:
                        inner = sorted((entry.path, entry.name) for entry in entries)
                    prefix = name + b"/" if name else b""
                    stack += [(path, prefix + entry, False) for path, entry in reversed(inner)]
            except (FileNotFoundError, PermissionError) as error:
                if follow:
                    raise
                self._skip(path, error.strerror or "unreadable")
        yield _END

    def _member(self, path: bytes, name: bytes, status: os.stat_result, chunk_size: int) -> Iterator[bytes]:
        kind = _KINDS.get(stat.S_IFMT(status.st_mode))
        if kind is None:
            self._skip(path, "a socket" if stat.S_ISSOCK(status.st_mode) else "a device")
            return
        link = os.readlink(path) if kind == tar.SYMLINK else b""  # noqa: PTH115 (Path would change "./x" to "x")
        identity = status.st_dev, status.st_ino
        if kind == tar.REGULAR and status.st_nlink > 1:
            if identity in self._links:
                kind, link = tar.HARD_LINK, self._links[identity]
            else:
                self._links[identity] = name
        member = tar.Member(
            path=name,
            kind=kind,
            mode=stat.S_IMODE(status.st_mode),
            uid=status.st_uid if self._owners else 0,
            gid=status.st_gid if self._owners else 0,
            mtime=max(0, int(status.st_mtime)),
            size=status.st_size if kind == tar.REGULAR else 0,
            link=link,
        )
        if kind != tar.REGULAR:
            yield tar.encode_header(member)
            return
        with open(path, "rb", buffering=0) as stream:
            yield tar.encode_header(member)
            yield from _data(stream, member.size, chunk_size, os.fsdecode(path))
        yield bytes(-member.size % tar.BLOCK)

    def _skip(self, path: bytes, reason: str) -> None:
        self.skipped.append(plain(f"{os.fsdecode(path)}: {reason}"))


def _data(stream: BinaryIO, size: int, chunk_size: int, path: str) -> Iterator[bytes]:
    while size:
        data = stream.read(min(chunk_size, size))
        if not data:
            raise BangerError(Code.IN_USE, f"{path} became shorter while it was read", hint="copy it again")
        size -= len(data)
        yield data
