"""Reads RPM packages: headers, digests, and the cpio archive of their files.

Formats: RPM's manual, "RPM V4 Package format", "Header format" and "Lead"; cpio(5), "New ASCII Format".
"""

from __future__ import annotations

import hashlib
import stat
import struct
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, BinaryIO

from banger.api.errors import BangerError, Code
from banger.disk import tar
from banger.disk.tar import Member, show
from banger.job import Job
from banger.kernelcat.streams import Section, naming

MAGIC = b"\xed\xab\xee\xdb"

_LEAD = 96  # bytes
_SOURCE_PACKAGE = 1
_HEADER_MAGIC = b"\x8e\xad\xe8\x01"
_ENTRIES_MAX = 0xFFFF
_STORE_MAX = 32 << 20  # bytes; that of a kernel with 5,000 modules has 1 MiB
_VALUES_MAX = 200_000  # of one tag
_STEP = 1 << 20

# tags of the signature header, which has numbers of its own
_SIG_SHA1, _SIG_SHA256, _SIG_MD5 = 269, 273, 1004
# tags of the header
_DISTRIBUTION, _VENDOR, _ARCH = 1010, 1011, 1022
_FILE_SIZES, _FILE_MODES, _FILE_FLAGS, _FILE_DEVICES, _FILE_INODES = 1028, 1030, 1037, 1095, 1096
_DIRECTORY_INDEXES, _BASE_NAMES, _DIRECTORY_NAMES, _LONG_FILE_SIZES = 1116, 1117, 1118, 5008
_PAYLOAD_FORMAT, _PAYLOAD_DIGEST, _PAYLOAD_DIGEST_ALGORITHM = 1124, 5092, 5093
_FLAG_GHOST = 1 << 6  # named by the package, but not in it

_STRING, _STRING_ARRAY, _I18N_STRING = 6, 8, 9
_INTEGERS = {2: "B", 3: "H", 4: "I", 5: "Q"}
_BINARY = 7
_DIGESTS = {8: "sha256", 9: "sha384", 10: "sha512"}  # RFC 4880, 9.4

_CPIO_FIELDS = struct.Struct("8s" * 13)
_TRAILER = b"TRAILER!!!"
_MEMBERS_MAX = 200_000
_WAITING_MAX = 16 << 20  # bytes of the names of hard links whose data is still to come
_NAME_MAX, _PATH_MAX = 255, 4095  # <linux/limits.h>
_KINDS = {
    stat.S_IFREG: tar.REGULAR,
    stat.S_IFLNK: tar.SYMLINK,
    stat.S_IFDIR: tar.DIRECTORY,
    stat.S_IFCHR: tar.CHARACTER,
    stat.S_IFBLK: tar.BLOCK_DEVICE,
    stat.S_IFIFO: tar.FIFO,
}


@dataclass(frozen=True)
class RpmPackage:
    """What an RPM package says about itself, and its payload: a cpio archive, perhaps compressed."""

    arch: str
    vendor: str
    distribution: str
    payload: Section
    header: Header

    def reader(self, stream: BinaryIO, limit: int) -> CpioReader:
        """The members of the decompressed payload."""
        return CpioReader(stream, "its payload", limit, lambda: _stripped_files(self.header))


class Header:
    """One header structure: typed values by tag; what is damaged raises CORRUPT when it is asked for."""

    def __init__(self, stream: IO[bytes], left: int) -> None:
        intro = _exactly(stream, 16)
        count, size = struct.unpack(">II", intro[8:])
        if intro[:4] != _HEADER_MAGIC or count > _ENTRIES_MAX or size > _STORE_MAX or 16 + count * 16 + size > left:
            raise _corrupt("a header is damaged")
        index = _exactly(stream, count * 16)
        self._store = _exactly(stream, size)
        self._entries = {tag: (kind, offset, many) for tag, kind, offset, many in struct.iter_unpack(">IIII", index)}
        self.image = intro + index + self._store

    def texts(self, tag: int) -> list[str]:
        """The strings of a tag, empty without it."""
        kind, offset, count = self._entries.get(tag, (_STRING, 0, 0))
        if kind not in (_STRING, _STRING_ARRAY, _I18N_STRING) or count > _VALUES_MAX or offset > len(self._store):
            raise _corrupt(f"the header's tag {tag} is damaged")
        texts = []
        for _ in range(count):
            end = self._store.find(b"\0", offset)
            if end < 0:
                raise _corrupt(f"the header's tag {tag} is damaged")
            texts.append(self._store[offset:end].decode("utf-8", "surrogateescape"))
            offset = end + 1
        return texts

    def text(self, tag: int) -> str:
        """The first string of a tag, '' without it."""
        return next(iter(self.texts(tag)), "")

    def numbers(self, tag: int) -> tuple[int, ...]:
        """The integers of a tag, empty without it."""
        kind, offset, count = self._entries.get(tag, (2, 0, 0))
        size = struct.calcsize(_INTEGERS[kind]) if kind in _INTEGERS else 0
        if not size or count > _VALUES_MAX or offset + count * size > len(self._store):
            raise _corrupt(f"the header's tag {tag} is damaged")
        return struct.unpack_from(f">{count}{_INTEGERS[kind]}", self._store, offset)

    def binary(self, tag: int) -> bytes:
        """The bytes of a tag, empty without it."""
        kind, offset, count = self._entries.get(tag, (_BINARY, 0, 0))
        if kind != _BINARY or offset + count > len(self._store):
            raise _corrupt(f"the header's tag {tag} is damaged")
        return self._store[offset : offset + count]


def read_rpm(package: Path, job: Job) -> RpmPackage:
    """Read the headers of a package and check the digests that it carries of its header and of its payload.

    They tell damage, not who made it: signatures are not checked. Raises CORRUPT, UNSUPPORTED for source packages.
    """
    with naming(package), open(package, "rb") as stream:
        return _read(package, stream, job)


def _read(package: Path, stream: IO[bytes], job: Job) -> RpmPackage:
    total = package.stat().st_size
    lead = _exactly(stream, _LEAD)
    if lead[:4] != MAGIC:
        raise _corrupt("it is not an RPM package")
    if struct.unpack_from(">H", lead, 6)[0] == _SOURCE_PACKAGE:
        raise BangerError(
            Code.UNSUPPORTED,
            f"{package.name} is a source package, which holds no kernel",
            hint="give the binary package, as kernel-core-<version>.<arch>.rpm",
        )
    signature = Header(stream, total - stream.tell())
    _exactly(stream, -stream.tell() % 8)
    header = Header(stream, total - stream.tell())
    offset = stream.tell()
    _check_header(signature, header)
    _check_payload(signature, header, stream, package.name, total - offset, job)
    if header.text(_PAYLOAD_FORMAT) not in ("cpio", ""):
        message = f"{package.name} has a payload of the unsupported format {header.text(_PAYLOAD_FORMAT)[:40]!r}"
        raise BangerError(Code.UNSUPPORTED, message, hint="give the whole binary package")
    return RpmPackage(
        arch=header.text(_ARCH),
        vendor=header.text(_VENDOR),
        distribution=header.text(_DISTRIBUTION),
        payload=Section(package, offset, total - offset),
        header=header,
    )


def _check_header(signature: Header, header: Header) -> None:
    for tag, algorithm in ((_SIG_SHA256, "sha256"), (_SIG_SHA1, "sha1")):
        expected = signature.text(tag)
        if expected and expected != hashlib.new(algorithm, header.image, usedforsecurity=False).hexdigest():
            raise _corrupt(f"the {algorithm} of its header is wrong")


def _check_payload(signature: Header, header: Header, stream: IO[bytes], label: str, total: int, job: Job) -> None:
    """Packages since RPM 4.14 carry a digest of the payload, older ones the MD5 of header and payload."""
    expected = header.text(_PAYLOAD_DIGEST)
    algorithm = _DIGESTS.get(next(iter(header.numbers(_PAYLOAD_DIGEST_ALGORITHM)), 8))
    if expected and algorithm:
        digest = hashlib.new(algorithm)
    else:
        expected, algorithm = signature.binary(_SIG_MD5).hex(), "MD5"
        digest = hashlib.md5(header.image, usedforsecurity=False)
    done = 0
    while expected and (piece := stream.read(_STEP)):
        digest.update(piece)
        done += len(piece)
        job.progress("verify", label, done, total)
    if expected and digest.hexdigest() != expected:
        raise _corrupt(f"the {algorithm} of its payload is wrong")


@dataclass(frozen=True)
class _File:
    """What a payload, or for its stripped members the header, says about a file."""

    path: bytes
    mode: int
    size: int  # of the data in the payload: 0 for all hard links of a file but the last
    inode: tuple[int, int] | None  # device and inode of a file with several links


def _stripped_files(header: Header) -> list[_File]:
    names, directories = header.texts(_BASE_NAMES), header.texts(_DIRECTORY_NAMES)
    modes, flags = header.numbers(_FILE_MODES), header.numbers(_FILE_FLAGS)
    sizes = header.numbers(_LONG_FILE_SIZES) or header.numbers(_FILE_SIZES)
    inodes = list(zip(header.numbers(_FILE_DEVICES), header.numbers(_FILE_INODES), strict=False))
    indexes = header.numbers(_DIRECTORY_INDEXES)
    if any(len(values) != len(names) for values in (modes, flags, sizes, inodes, indexes)):
        raise _corrupt("the header lists files in columns of different lengths")
    if any(index >= len(directories) for index in indexes):
        raise _corrupt("the header names a directory that it does not list")
    regular = [stat.S_ISREG(mode) and not flag & _FLAG_GHOST for mode, flag in zip(modes, flags, strict=True)]
    links = Counter(inode for inode, is_regular in zip(inodes, regular, strict=True) if is_regular)
    last = {inode: number for number, inode in enumerate(inodes) if regular[number]}
    files = []
    for number, name in enumerate(names):
        inode = inodes[number] if regular[number] and links[inodes[number]] > 1 else None
        has_data = stat.S_ISLNK(modes[number]) or (regular[number] and (inode is None or last[inode] == number))
        path = directories[indexes[number]] + name
        files.append(
            _File(
                path=path.encode("utf-8", "surrogateescape"),
                mode=modes[number],
                size=sizes[number] if has_data else 0,
                inode=inode,
            )
        )
    return files


class CpioReader:
    """Iterates over the members of a payload as `tar.TarReader` does over those of a tar; `data` gives their content.

    A member may be stripped to its number: `files` then tells the rest. Hard links come after the file that they are
    links to, although in the archive the last of them has the data. What is no whole, well-formed archive is CORRUPT.
    """

    def __init__(self, stream: BinaryIO, label: str, limit: int, files: Callable[[], Sequence[_File]] = list) -> None:
        self._stream = stream
        self._label = label
        self._limit = limit
        self._list_files = files
        self._files: Sequence[_File] | None = None
        self._consumed = 0
        self._data = 0  # of the current member, still unread

    def __iter__(self) -> Iterator[Member]:
        waiting: dict[tuple[int, int], list[bytes]] = {}  # hard links whose data is still to come
        names = 0  # bytes that were in it
        for number in range(_MEMBERS_MAX + 1):
            for _ in self.data():
                pass
            self._align()
            file = self._header()
            if file is None:
                break
            if number == _MEMBERS_MAX:
                raise self._corrupt(f"has more than {_MEMBERS_MAX:,} members")
            links = waiting.setdefault(file.inode, []) if file.inode else []
            self._data = file.size
            if file.inode and file.size == 0:
                names += len(file.path)
                if names > _WAITING_MAX:
                    raise self._corrupt("has too many hard links")
                links.append(file.path)
                continue
            yield self._member(file)
            for _ in self.data():
                pass
            yield from (_link(path, file.path) for path in links)
            links.clear()
        for paths in waiting.values():  # empty files
            for path in paths:
                yield _link(path, paths[0]) if path != paths[0] else Member(path, tar.REGULAR, 0o644, 0, 0, 0)

    def data(self) -> Iterator[bytes]:
        """The rest of the current member's data, in chunks of at most tar.CHUNK bytes."""
        while self._data:
            chunk = self._read(min(tar.CHUNK, self._data))
            self._data -= len(chunk)
            yield chunk

    def _header(self) -> _File | None:
        """The next member, None at the end of the archive."""
        magic = self._read(6)
        if magic == b"07070X":
            number = self._number(self._read(8))
            self._align()
            if self._files is None:
                self._files = self._list_files()
            if number >= len(self._files):
                raise self._corrupt(f"has the file number {number} of {len(self._files)}")
            file = self._files[number]
            return replace(file, path=self._normalise(file.path))
        if magic != b"070701":
            raise self._corrupt(f"is damaged: {magic!r} does not begin a member")
        fields = [self._number(field) for field in _CPIO_FIELDS.unpack(self._read(_CPIO_FIELDS.size))]
        inode, mode, _, _, links, _, size, major, minor, _, _, name_size, _ = fields
        if not 1 < name_size <= _PATH_MAX + 1:
            raise self._corrupt(f"has a name of {name_size} bytes")
        name = self._read(name_size)
        self._align()
        if name == _TRAILER + b"\0":
            return None
        if name[-1:] != b"\0" or name.startswith(b"/"):
            raise self._corrupt(f"has an unusable member name {show(name)}")
        regular = stat.S_ISREG(mode)
        if size and not regular and not stat.S_ISLNK(mode):
            raise self._corrupt(f"has data for {show(name)}, which is not a file")
        several = (major << 32 | minor, inode) if regular and links > 1 else None
        return _File(self._normalise(name[:-1]), mode, size, several)

    def _member(self, file: _File) -> Member:
        kind = _KINDS.get(stat.S_IFMT(file.mode))
        if kind is None:
            raise self._corrupt(f"has a member {show(file.path)} of the unsupported type {file.mode:o}")
        link = b""
        if kind == tar.SYMLINK:
            if not 0 < file.size <= _PATH_MAX:
                raise self._corrupt(f"has a link {show(file.path)} with an unusable target")
            link = b"".join(self.data())
            if b"\0" in link:
                raise self._corrupt(f"has a link {show(file.path)} with an unusable target")
        size = file.size if kind == tar.REGULAR else 0
        return Member(file.path, kind, file.mode & 0o7777, uid=0, gid=0, mtime=0, size=size, link=link)

    def _normalise(self, name: bytes) -> bytes:
        """A member's name as a path relative to the root, which RPM writes as ./usr/lib or /usr/lib."""
        parts = [part for part in name.split(b"/") if part not in (b"", b".")]
        path = b"/".join(parts)
        if b"\0" in name or b".." in parts:
            raise self._corrupt(f"has an unusable member name {show(name)}")
        if len(path) > _PATH_MAX or any(len(part) > _NAME_MAX for part in parts):
            raise self._corrupt(f"has a member {show(name)} whose name is longer than Linux allows")
        return path

    def _number(self, digits: bytes) -> int:
        if digits.strip(b"0123456789abcdefABCDEF"):
            raise self._corrupt(f"is damaged: {digits!r} is not a number")
        return int(digits, 16)

    def _align(self) -> None:
        self._read(-self._consumed % 4)

    def _read(self, size: int) -> bytes:
        self._consumed += size
        if self._consumed > self._limit:
            raise self._corrupt(f"unpacks to more than {self._limit:,} bytes")
        data = self._stream.read(size)
        if len(data) != size:
            raise self._corrupt("is cut off: the archive ends in the middle")
        return data

    def _corrupt(self, what: str) -> BangerError:
        return _corrupt(f"{self._label} {what}")


def _link(path: bytes, target: bytes) -> Member:
    return Member(path, tar.HARD_LINK, 0o644, uid=0, gid=0, mtime=0, link=target)


def _exactly(stream: IO[bytes], size: int) -> bytes:
    data = stream.read(size)
    if len(data) != size:
        raise _corrupt("it ends early")
    return data


def _corrupt(reason: str) -> BangerError:
    return BangerError(Code.CORRUPT, reason)
