"""Reads tar archives of any common dialect and writes them again in one canonical, safe form.

Formats: POSIX.1-2017 pax (ustar and pax interchange), GNU tar manual "Tar Internals" (long names, base-256 numbers,
old GNU sparse and pax sparse 0.0, 0.1, 1.0). Only headers are held in memory; file data passes through in chunks.
"""

from __future__ import annotations

import contextlib
import functools
import io
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Protocol

from banger.api.errors import BangerError, Code

BLOCK = 512
CHUNK = 1 << 20

REGULAR, HARD_LINK, SYMLINK, CHARACTER, BLOCK_DEVICE, DIRECTORY, FIFO = b"0", b"1", b"2", b"3", b"4", b"5", b"6"
_CONTIGUOUS, _GNU_SPARSE, _GNU_LONG_NAME, _GNU_LONG_LINK, _GNU_VOLUME = b"7", b"S", b"L", b"K", b"V"
_PAX, _PAX_GLOBAL = b"x", b"g"
_GNU_MAGIC = b"ustar  \0"
_POSIX_MAGIC = b"ustar\00000"

_NAME_MAX, _PATH_MAX = 255, 4095  # <linux/limits.h>, without the terminating NUL
_ID_MAX = 2**32 - 1
_TIME_MAX = 2**32 - 1  # squashfs keeps 32 bits
_METADATA_MAX = 4 << 20  # one pax header, long name or sparse map; Linux allows 64 KiB per extended attribute
_SPARSE_MAX = 1 << 40
_MEMBERS_MAX = 8_000_000

_OTHER_KINDS = (HARD_LINK, SYMLINK, CHARACTER, BLOCK_DEVICE, DIRECTORY, FIFO)
_SPECIAL = (b"", b".", b"..")  # what a name may end with that is no name

_HEADER = struct.Struct("100s8s8s8s12s12s8sc100s8s32s32s8s8s155s12x")
# what a member takes from its pax headers; a global header may set no more, so that many of them take no memory
_PAX_USED = (b"GNU.sparse.name", b"path", b"linkpath", b"size", b"uid", b"gid", b"mtime")
_XATTR = b"SCHILY.xattr."
# squashfs stores these namespaces; overlayfs' own marks of some other mount must not reach ours
_XATTRS_KEPT = (b"user.", b"trusted.", b"security.")
_XATTRS_DROPPED = (b"trusted.overlay.", b"user.overlay.")

Records = list[tuple[bytes, bytes]]


class Readable(Protocol):
    """Where an archive is read from."""

    def read(self, size: int, /) -> bytes:
        """`size` bytes; fewer at the end only."""


class Pieces:
    """A Readable of bytes that come in pieces, which can pass over what nobody wants without copying it."""

    def __init__(self, pieces: Iterator[bytes]) -> None:
        self._pieces = pieces
        self._piece = b""
        self._position = 0

    def read(self, size: int, /) -> bytes:
        end = self._position + size
        if end <= len(self._piece):
            data = self._piece[self._position : end]
            self._position = end
            return data
        found = [self._piece[self._position :]]
        missing = end - len(self._piece)
        self._position = 0
        for piece in self._pieces:
            found.append(piece[:missing])
            if missing <= len(piece):
                self._piece, self._position = piece, missing
                break
            missing -= len(piece)
        else:
            self._piece = b""
        return b"".join(found)

    def skip(self, size: int) -> int:
        """Pass over `size` bytes; returns how many there were."""
        left = size
        while left > len(self._piece) - self._position:
            left -= len(self._piece) - self._position
            self._piece, self._position = next(self._pieces, b""), 0
            if not self._piece:
                return size - left
        self._position += left
        return size


@dataclass(slots=True)
class Member:
    """One file of an archive: `path` without leading slash (b"" is the root), `size` bytes of data in the archive."""

    path: bytes
    kind: bytes
    mode: int
    uid: int
    gid: int
    mtime: int
    size: int = 0
    link: bytes = b""  # a symlink's target as it is, a hard link's as a normalised path
    device: tuple[int, int] = (0, 0)
    xattrs: Records = field(default_factory=list)
    sparse: Records = field(default_factory=list)  # pax sparse records, passed on as they are
    absolute: bool = field(default=False, compare=False)  # the name began with a slash
    absolute_link: bool = field(default=False, compare=False)  # a hard link's target did
    gnu_sparse: bytes = b""  # header bytes 386 to 495 of an old GNU sparse member and its extension blocks

    @property
    def is_sparse(self) -> bool:
        return bool(self.sparse or self.gnu_sparse)


class TarReader:
    """Iterates over the members of a tar stream; `data` gives the file data of the current one.

    `label` names the archive in errors. More than `limit` bytes of archive are refused (EXHAUSTED); whatever is not a
    whole, well-formed archive with safe names is CORRUPT. Without `end_mark` an archive may end after any member.
    """

    def __init__(self, stream: Readable, label: str, limit: int, *, end_mark: bool = True) -> None:
        self._stream = stream
        self._end_mark = end_mark
        self._label = label
        self._limit = limit
        self._consumed = 0
        self._data = 0  # of the current member, still unread
        self._padding = 0
        self._parent = self._parent_path = b""  # as the last name has it, and normalised
        # most numbers are the same as those before; freed with the reader, not kept among what it leaves behind
        self._parse_number = functools.lru_cache(1024)(_parse_number)

    def __iter__(self) -> Iterator[Member]:
        defaults: dict[bytes, bytes] = {}
        records: Records = []
        long_name = long_link = b""
        members = 0
        while True:
            if self._data or self._padding:
                self._skip_data()
            header = self._read(BLOCK, may_end=not self._end_mark)
            kind = self._check(header) if header else b""
            if not kind:
                return
            if kind in (_PAX, _PAX_GLOBAL):
                parsed = self._pax_records(self._metadata(header))
                if kind == _PAX_GLOBAL:
                    defaults.update((key, value) for key, value in parsed if key in _PAX_USED)
                else:
                    records = parsed
                continue
            if kind == _GNU_LONG_NAME:
                long_name = self._metadata(header).rstrip(b"\0")
                continue
            if kind == _GNU_LONG_LINK:
                long_link = self._metadata(header).rstrip(b"\0")
                continue
            if kind != _GNU_VOLUME:
                members += 1
                if members > _MEMBERS_MAX:
                    raise BangerError(Code.EXHAUSTED, f"{self._label} has more than {_MEMBERS_MAX:,} files")
                yield self._member(header, kind, defaults, records, long_name, long_link)
            records, long_name, long_link = [], b"", b""

    def data(self) -> Iterator[bytes]:
        """The rest of the current member's data, in chunks of at most CHUNK bytes."""
        while self._data:
            if self._data + self._padding <= CHUNK:  # data and padding in one read: most files are small
                chunk = self._read(self._data + self._padding)
                if self._padding:
                    chunk = chunk[: self._data]
                self._data = self._padding = 0
            else:
                chunk = self._read(min(CHUNK, self._data))
                self._data -= len(chunk)
            yield chunk
        if self._padding:
            self._read(self._padding)
            self._padding = 0

    def _skip_data(self) -> None:
        if not isinstance(self._stream, Pieces):
            for _ in self.data():
                pass
            return
        size = self._data + self._padding
        self._data = self._padding = 0
        self._count(size)
        if self._stream.skip(size) != size:
            raise self._cut_off()

    def corrupt(self, what: str) -> BangerError:
        """The error for an archive that breaks a rule."""
        return BangerError(Code.CORRUPT, f"{self._label} {what}")

    def _read(self, size: int, may_end: bool = False) -> bytes:
        self._count(size)
        data = self._stream.read(size)
        if len(data) != size and (data or not may_end):
            raise self._cut_off()
        return data

    def _count(self, size: int) -> None:
        self._consumed += size
        if self._consumed > self._limit:
            raise BangerError(Code.EXHAUSTED, f"{self._label} unpacks to more than the limit of {self._limit:,} bytes")

    def _cut_off(self) -> BangerError:
        return self.corrupt("is cut off: the archive ends in the middle")

    def _check(self, header: bytes) -> bytes:
        """The type flag of a header block with a right checksum; b"" for the block of zeros that ends an archive."""
        if not header[0] and not header.strip(b"\0"):
            return b""
        # POSIX: the sum of all bytes, the checksum's own eight counted as spaces
        total = _sum(header) - sum(header[148:156]) + 8 * 0x20
        if self._number(header[148:156]) != total:
            raise self.corrupt("is damaged or is not a tar archive: wrong header checksum")
        return REGULAR if header[156:157] == b"\0" else header[156:157]

    def _number(self, raw: bytes) -> int:
        value = self._parse_number(raw)
        if value is None:
            raise self.corrupt("is damaged or is not a tar archive: a field of a header is not a number")
        return value

    def _metadata(self, header: bytes) -> bytes:
        size = self._number(header[124:136])
        if not 0 <= size <= _METADATA_MAX:
            raise self.corrupt(f"has an extended header of {size:,} bytes")
        return self._read(size + -size % BLOCK)[:size]

    def _pax_records(self, data: bytes) -> Records:
        records: Records = []
        position = 0
        while position < len(data):
            space = data.find(b" ", position, position + 11)
            digits = data[position:space] if space > position else b""
            end = position + int(digits) if digits.isdigit() else 0
            key, equals, value = data[space + 1 : end - 1].partition(b"=")
            if not (space + 1 < end <= len(data) and data[end - 1] == 0x0A and equals and key):
                raise self.corrupt("has a malformed pax header")
            records.append((key, value))
            position = end
        return records

    def _member(
        self,
        header: bytes,
        kind: bytes,
        defaults: dict[bytes, bytes],
        records: Records,
        long_name: bytes,
        long_link: bytes,
    ) -> Member:
        name, mode, uid, gid, size, mtime, _, _, link, _, _, _, _, _, prefix = _HEADER.unpack(header)
        name = name.partition(b"\0")[0]
        if prefix[0] and header[257:265] == _POSIX_MAGIC:
            name = prefix.partition(b"\0")[0] + b"/" + name
        number = self._number
        numbers = number(mode) & 0o7777, number(uid), number(gid), number(mtime), number(size)
        member = Member(b"", kind, *numbers, link.partition(b"\0")[0])
        if records or defaults or long_name or long_link:
            pax = {**defaults, **dict(records)} if records else defaults
            name = pax.get(b"GNU.sparse.name") or pax.get(b"path") or long_name or name
            member.link = pax.get(b"linkpath") or long_link or member.link
            member.uid = self._decimal(pax, b"uid", member.uid)
            member.gid = self._decimal(pax, b"gid", member.gid)
            member.size = self._decimal(pax, b"size", member.size)
            member.mtime = self._decimal(pax, b"mtime", member.mtime)
            member.xattrs = _kept_xattrs(records)
        if header[156] == 0 and name.endswith(b"/"):  # how the V7 format marks a directory
            member.kind = DIRECTORY
        elif kind == _CONTIGUOUS:
            member.kind = REGULAR
        member.path = path = self._normalise(name)
        member.absolute = name.startswith(b"/")
        if records:
            member.sparse = self._pax_sparse(records, path)
        if kind == _GNU_SPARSE:
            member.gnu_sparse = self._gnu_sparse(header, path)
            member.kind = REGULAR
        self._check_member(member, header)
        self._data = member.size
        self._padding = -member.size % BLOCK
        return member

    def _check_member(self, member: Member, header: bytes) -> None:
        """Complete a member by what is special to its kind; raises CORRUPT for impossible values."""
        path, kind = member.path, member.kind
        if kind == REGULAR:
            if member.size < 0:
                raise self.corrupt(f"has a member {show(path)} of negative size")
        else:  # POSIX: no data follows the other types, whatever their size field says
            member.size = 0
            if kind not in _OTHER_KINDS:
                raise self.corrupt(f"has a member {show(path)} of the unsupported type {show(kind)}")
        if kind in (HARD_LINK, SYMLINK):
            link = member.link
            if not link or b"\0" in link or len(link) > _PATH_MAX:
                raise self.corrupt(f"has a link {show(path)} with an unusable target")
            if kind == HARD_LINK:
                member.absolute_link = link.startswith(b"/")
                member.link = self._normalise(link)
        else:
            member.link = b""
        if kind in (CHARACTER, BLOCK_DEVICE):
            member.device = major, minor = (self._number(header[329:337]), self._number(header[337:345]))
            if not (0 <= major < 1 << 12 and 0 <= minor < 1 << 20):  # <linux/kdev_t.h>
                raise self.corrupt(f"has a device {show(path)} with impossible numbers")
        if not (0 <= member.uid <= _ID_MAX and 0 <= member.gid <= _ID_MAX):
            raise self.corrupt(f"has a member {show(path)} with an impossible owner")
        member.mtime = max(0, min(member.mtime, _TIME_MAX))

    def _decimal(self, pax: dict[bytes, bytes], key: bytes, default: int) -> int:
        value = pax.get(key)
        if not value:
            return default
        whole = value.partition(b".")[0]
        if not whole.removeprefix(b"-").isdigit() or len(whole) > 20:
            raise self.corrupt(f"is damaged: {show(value)} is not a number")
        return int(whole)

    def _normalise(self, name: bytes) -> bytes:
        """A member's name as a path relative to the root of the archive, without '.', '..' and empty components.

        By its letters alone, as Docker and umoci do it, whatever links there may be on the way.
        """
        parent, _, last = name.rpartition(b"/")
        # most members lie in the same directory as the one before them
        if (
            parent == self._parent != b""
            and last not in _SPECIAL
            and b"\0" not in last
            and len(last) <= _NAME_MAX
            and len(name) <= _PATH_MAX
        ):
            return self._parent_path + last
        if not name or b"\0" in name:
            raise self.corrupt(f"has an unusable member name {show(name)}")
        parts: list[bytes] = []
        for part in name.split(b"/"):
            if part == b".." and not parts:
                raise self.corrupt(f"has a member {show(name)} that points out of the archive with '..'")
            if part == b"..":
                parts.pop()
            elif part not in (b"", b"."):
                parts.append(part)
        path = b"/".join(parts)
        if len(path) > _PATH_MAX or any(len(part) > _NAME_MAX for part in parts):
            raise self.corrupt(f"has a member {show(name)} whose name is longer than Linux allows")
        if last not in _SPECIAL and len(parts) > 1:
            self._parent, self._parent_path = parent, path[: -len(last)]
        return path

    def _gnu_sparse(self, header: bytes, path: bytes) -> bytes:
        if header[257:265] != _GNU_MAGIC:
            raise self.corrupt(f"has a member {show(path)} in an unsupported sparse format")
        self._check_sparse_size(self._number(header[483:495]), path)
        sparse_map = header[386:495]
        extended = header[482]
        while extended:
            block = self._read(BLOCK)
            sparse_map += block
            extended = block[504]
            if len(sparse_map) > _METADATA_MAX:
                raise self.corrupt(f"has a member {show(path)} with too many holes")
        return sparse_map

    def _pax_sparse(self, records: Records, path: bytes) -> Records:
        sparse = [
            (key, value) for key, value in records if key.startswith(b"GNU.sparse.") and key != b"GNU.sparse.name"
        ]
        for key in (b"GNU.sparse.realsize", b"GNU.sparse.size"):
            self._check_sparse_size(self._decimal(dict(sparse), key, 0), path)
        return sparse

    def _check_sparse_size(self, size: int, path: bytes) -> None:
        if not 0 <= size <= _SPARSE_MAX:
            raise self.corrupt(f"has a sparse member {show(path)} of {size:,} bytes; the limit is 1 TiB")


def encode_header(member: Member) -> bytes:
    """The header blocks of a member in pax format; exactly `member.size` bytes of data and their padding follow."""
    records: Records = []
    name = member.path or b"./"
    if len(name) > 100:
        records.append((b"path", name))
    if len(member.link) > 100:
        records.append((b"linkpath", member.link))
    for key, value, limit in (
        (b"uid", member.uid, 8**7),
        (b"gid", member.gid, 8**7),
        (b"size", member.size, 8**11),
    ):
        if value >= limit:
            records.append((key, b"%d" % value))
    records += member.sparse
    records += [(_XATTR + key, value) for key, value in member.xattrs]
    kind, magic = (_GNU_SPARSE, _GNU_MAGIC) if member.gnu_sparse else (member.kind, _POSIX_MAGIC)
    block = _block(
        name,
        kind,
        member.mode,
        member.uid % 8**7,
        member.gid % 8**7,
        member.size % 8**11,
        member.mtime,
        member.link,
        magic,
        member.device,
        member.gnu_sparse[:109],
    )
    block += member.gnu_sparse[109:]
    if not records:
        return block
    data = b"".join(_pax_record(key, value) for key, value in records)
    return _block(b"pax", _PAX, 0o644, 0, 0, len(data), 0) + data + bytes(-len(data) % BLOCK) + block


def first_names(data: bytes) -> list[bytes] | None:
    """The names of the members of a tar archive whose headers lie in `data`, with which it begins; None for no tar."""
    header = data[:BLOCK]
    if len(header) < BLOCK or not header[0]:
        return None
    total = _sum(header) - sum(header[148:156]) + 8 * 0x20  # POSIX: the checksum's own eight count as spaces
    if header[148] & 0x80 or _parse_number(header[148:156]) != total:
        return None
    names: list[bytes] = []
    with contextlib.suppress(BangerError):  # `data` ends in the middle
        for member in TarReader(io.BytesIO(data), "", len(data)):
            names.append(member.path)
    return names


def encode_end() -> bytes:
    """The two blocks of zeros that end an archive."""
    return bytes(2 * BLOCK)


def _block(
    name: bytes,
    kind: bytes,
    mode: int,
    uid: int,
    gid: int,
    size: int,
    mtime: int,
    link: bytes = b"",
    magic: bytes = _POSIX_MAGIC,
    device: tuple[int, int] = (0, 0),
    gnu_sparse: bytes = b"",
) -> bytes:
    tail, tail_sum = _block_tail(kind, link, magic, device, gnu_sparse)
    head = b"%b%07o\0%07o\0%07o\0%011o\0%011o\0" % (name[:100].ljust(100, b"\0"), mode, uid, gid, size, mtime)
    # POSIX: the sum of all bytes, the checksum's own eight counted as spaces
    return b"%b%06o\0 %b" % (head, (zlib.adler32(head, 0) & 0xFFFF) + tail_sum + 8 * 0x20, tail)


@functools.lru_cache(64)
def _block_tail(
    kind: bytes, link: bytes, magic: bytes, device: tuple[int, int], gnu_sparse: bytes
) -> tuple[bytes, int]:
    """A header block after its checksum, and the sum of these bytes; of most files it is the same."""
    tail = b"%b%b%b%b%07o\0%07o\0%b" % (
        kind,
        link[:100].ljust(100, b"\0"),
        magic,
        bytes(64),  # names of owners
        *device,
        (bytes(41) + gnu_sparse).ljust(167, b"\0"),  # the old GNU sparse map begins at byte 386, in the POSIX prefix
    )
    return tail, sum(tail)


def _sum(block: bytes) -> int:
    """The sum of a block's bytes: Adler-32's first half (RFC 1950), which stays below its modulus for 256 of them."""
    return (zlib.adler32(block[:256], 0) & 0xFFFF) + (zlib.adler32(block[256:], 0) & 0xFFFF)


def _parse_number(raw: bytes) -> int | None:
    """A number as headers have it, None for what is none."""
    if raw[0] & 0x80:  # GNU base-256, two's complement after the marker bit
        value = int.from_bytes(raw, "big") - (1 << (8 * len(raw) - 1))
        return value if raw[0] != 0xFF else value - (1 << (8 * len(raw) - 1))
    digits = raw.partition(b"\0")[0].strip(b" ")
    if digits.strip(b"01234567"):
        return None
    return int(digits or b"0", 8)


def _pax_record(key: bytes, value: bytes) -> bytes:
    """`length key=value\\n`, where the length counts its own digits (POSIX pax, "pax Header Block")."""
    rest = len(key) + len(value) + 3
    length = rest + len(str(rest))
    length = rest + len(str(length))
    return b"%d %s=%s\n" % (length, key, value)


def _kept_xattrs(records: Records) -> Records:
    if not records:
        return []
    names = ((key.removeprefix(_XATTR), value) for key, value in records if key.startswith(_XATTR))
    return [
        (name, value)
        for name, value in names
        if name.startswith(_XATTRS_KEPT) and not name.startswith(_XATTRS_DROPPED) and len(name) <= _NAME_MAX
    ]


def show(name: bytes) -> str:
    """A name from an archive as messages print it: quoted, bounded, without control characters."""
    text = name.decode(errors="backslashreplace")
    return repr(text if len(text) <= 80 else text[:77] + "...")
