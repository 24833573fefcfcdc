"""Bounded decompression of everything that kernels, modules, packages and images are compressed with."""

from __future__ import annotations

import bz2
import contextlib
import io
import lzma
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, TYPE_CHECKING, BinaryIO, Protocol, cast

import lz4.block
import lz4.frame
import zstandard
from isal import igzip_lib

from banger.api.errors import BangerError, Code
from banger.job import Job

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

_MAGIC = {
    b"\x1f\x8b\x08": "gzip",  # RFC 1952
    b"\xfd7zXZ\x00": "xz",
    b"BZh": "bzip2",
    b"\x02\x21\x4c\x18": "lz4",  # the legacy frame, which kernels use (lz4_Frame_format.md)
    b"\x04\x22\x4d\x18": "lz4-frame",
    b"\x28\xb5\x2f\xfd": "zstd",  # RFC 8878
    b"\x50\x2a\x4d\x18": "zstd",  # a skippable frame, with which pzstd begins
    b"\x5d\x00\x00": "lzma",
    b"\x89LZO\x00\r\n\x1a\n": "lzo",  # lzop's; told apart here, unpacked by nobody but lzop
}
MAGIC_SIZE = max(map(len, _MAGIC))

_IsalError = cast(type[Exception], igzip_lib.IsalError)  # which its stub declares as an instance

_STEP = 1 << 18  # bytes that are unpacked at once: they stay in the cache of the processor
_INPUT = 1 << 18  # bytes given to a decompressor at once: with more, isal takes a third longer
_FIRST_INPUT = 1 << 12  # and at first: what a short stream leaves of it is taken back, for each of a million of them
_REPORT_EVERY = 4 << 20
_MEMORY_LIMIT = 128 << 20  # bytes of dictionary or window: xz -9 takes 64 MiB, zstd --ultra -22 (kernels) 128 MiB
_LZ4_BLOCK = 8 << 20  # every block but the last of the legacy format


def compression(head: bytes) -> str | None:
    """The name of the compression that data begins with, or None."""
    return next((kind for magic, kind in _MAGIC.items() if head.startswith(magic)), None)


def chunks(
    stream: IO[bytes], kind: str, *, concatenated: bool = False, name: str = "", head: bytes = b""
) -> Iterator[bytes]:
    """The decompressed bytes of one compressed stream, in pieces of at most 1 MiB; what follows it is ignored.

    `head` is what has been read of it already. With `concatenated` all streams that follow one another, as gzip(1),
    xz(1) and zstd(1) do. Raises CORRUPT, with `name` as what is damaged, when it is damaged or ends early.
    """
    subject = name or f"the {kind} data"
    decode = _DECODERS.get(kind)
    if decode is None:
        raise BangerError(Code.UNSUPPORTED, f"{subject} is compressed with {kind}, which cannot be unpacked here")
    source = _Source(stream)
    source.put_back(head)
    try:
        yield from decode(source)
        while concatenated and (head := source.skip_padding()):
            if compression(head) != kind:
                raise BangerError(Code.CORRUPT, f"{subject} is damaged: something else follows its {kind} data")
            yield from decode(source)
    except EOFError as error:
        raise BangerError(Code.CORRUPT, f"{subject} is damaged: it ends early") from error
    except (
        _IsalError,
        lzma.LZMAError,
        ValueError,
        RuntimeError,
        zstandard.ZstdError,
        lz4.block.LZ4BlockError,
    ) as error:
        raise BangerError(Code.CORRUPT, f"{subject} is damaged") from error
    except OSError as error:
        if error.errno is not None:
            raise  # from the system: bz2 reports damage as an OSError without a number
        raise BangerError(Code.CORRUPT, f"{subject} is damaged") from error


def decompress(data: bytes, limit: int) -> bytes:
    """Data, decompressed to at most `limit` bytes (else CORRUPT) when its magic number says that it is compressed."""
    kind = compression(data)
    if kind is None:
        return data
    output = bytearray()
    for piece in chunks(io.BytesIO(data), kind):
        output += piece
        if len(output) > limit:
            raise BangerError(Code.CORRUPT, f"the {kind} data unpacks to more than {limit >> 20} MiB")
    return bytes(output)


@contextlib.contextmanager
def open_decompressed(path: Path, job: Job, stage: str) -> Iterator[BinaryIO]:
    """The content of a file, compressed or not (told by magic number), reporting progress in bytes of the file.

    Raises CORRUPT, naming the file, when decompression fails inside the block.
    """
    try:
        raw = io.BufferedReader(_ProgressFile(open(path, "rb", buffering=0), path, job, stage), _STEP)
    except OSError as error:
        raise BangerError(Code.NOT_FOUND, f"cannot read {path}: {error.strerror}") from error
    with raw:
        kind = compression(raw.peek(MAGIC_SIZE))
        if kind is None:
            yield raw
        else:
            pieces = chunks(raw, kind, concatenated=True, name=str(path))
            with io.BufferedReader(PieceReader(pieces), _STEP) as stream:
                yield stream


class PieceReader(io.RawIOBase):
    """A file to read of bytes that come in pieces."""

    def __init__(self, pieces: Iterator[bytes]) -> None:
        self._pieces = pieces
        self._piece = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: WriteableBuffer, /) -> int:
        while not self._piece:
            piece = next(self._pieces, None)
            if piece is None:
                return 0
            self._piece = memoryview(piece)
        target = memoryview(buffer).cast("B")
        count = min(len(target), len(self._piece))
        target[:count] = self._piece[:count]
        self._piece = self._piece[count:]
        return count


class _ProgressFile(io.RawIOBase):
    """A file that reports how much of it has been read."""

    def __init__(self, file: io.FileIO, path: Path, job: Job, stage: str) -> None:
        self._file = file
        self._job = job
        self._stage = stage
        self._label = path.name
        self._total = path.stat().st_size
        self._done = 0
        self._reported = 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: WriteableBuffer, /) -> int:
        count = self._file.readinto(buffer) or 0
        self._done += count
        if self._done - self._reported >= _REPORT_EVERY or (count == 0 and self._reported < self._done):
            self._reported = self._done
            self._job.progress(self._stage, self._label, self._done, self._total)
        return count

    def close(self) -> None:
        self._file.close()
        super().close()


class _Source:
    """A stream to read whole amounts from, and to put back into what was read too much."""

    def __init__(self, stream: IO[bytes]) -> None:
        self._stream = stream
        self._back = b""
        self._position = 0  # in what was put back

    def read(self, size: int) -> bytes:
        """`size` bytes; fewer at the end only."""
        data = self._back[self._position : self._position + size]
        self._position += len(data)
        while len(data) < size and (more := self._stream.read(size - len(data))):
            data += more
        return data

    def exactly(self, size: int) -> bytes:
        """`size` bytes; raises EOFError."""
        data = self.read(size)
        if len(data) < size:
            raise EOFError
        return data

    def put_back(self, data: bytes) -> None:
        start = self._position - len(data)
        if start >= 0 and self._back[start : self._position] == data:
            self._position = start  # without a copy of all that follows
        else:
            self._back, self._position = data + self._back[self._position :], 0

    def skip_padding(self) -> bytes:
        """What comes next, at most MAGIC_SIZE bytes, after the zeros that may pad a stream (xz(1), tapes)."""
        while data := self.read(MAGIC_SIZE):
            if rest := data.lstrip(b"\0"):
                self.put_back(rest)
                head = self.read(MAGIC_SIZE)
                self.put_back(head)
                return head
        return b""


class _Decompressor(Protocol):
    """What bz2, lzma, lz4 and isal have in common; `unused_data` follows the end of the stream."""

    @property
    def eof(self) -> bool: ...

    @property
    def needs_input(self) -> bool: ...

    @property
    def unused_data(self) -> bytes | None: ...

    def decompress(self, data: bytes, max_length: int, /) -> bytes: ...


def _by_object(source: _Source, decompressor: _Decompressor) -> Iterator[bytes]:
    size = _FIRST_INPUT
    while not decompressor.eof:
        data = source.read(size) if decompressor.needs_input else b""
        size = _INPUT
        if decompressor.needs_input and not data:
            raise EOFError
        yield decompressor.decompress(data, _STEP)
    source.put_back(decompressor.unused_data or b"")


def _zstd(source: _Source) -> Iterator[bytes]:
    """Feed a frame block by block, since the library cannot stop within what it is given: a block of 4 bytes may
    become 128 KiB, and none may become more (RFC 8878, 3.1.1)."""
    _skip_frames(source)
    head = source.exactly(5)
    head += source.exactly(zstandard.frame_header_size(head) - len(head))
    frame = zstandard.ZstdDecompressor(max_window_size=_MEMORY_LIMIT).decompressobj()
    yield frame.decompress(head)
    last = 0
    while not last:
        head = source.exactly(3)
        word = int.from_bytes(head, "little")
        last, repeats, size = word & 1, word >> 1 & 3 == 1, word >> 3
        yield frame.decompress(head + source.exactly(1 if repeats else size))
    if not frame.eof:
        yield frame.decompress(source.exactly(4))  # the checksum
    _skip_frames(source)


def _skip_frames(source: _Source) -> None:
    """Skippable frames, RFC 8878, 3.1.2: what pzstd and seekable archives keep their indexes in."""
    while (head := source.read(8))[1:4] == b"\x2a\x4d\x18" and head[0] & 0xF0 == 0x50:
        size = int.from_bytes(head[4:], "little")
        while size:
            size -= len(source.exactly(min(size, _STEP)))
    source.put_back(head)


def _lz4_legacy(source: _Source) -> Iterator[bytes]:
    """The legacy frame has no end mark: kernel builds append the unpacked size, which tells the end from damage."""
    source.exactly(4)
    total = 0
    while word := source.read(4):
        if len(word) < 4:
            raise EOFError
        (size,) = struct.unpack("<I", word)
        block = source.read(min(size, _LZ4_BLOCK * 2))
        if not block and size == total:
            return
        if len(block) != size:
            raise EOFError
        piece = lz4.block.decompress(block, uncompressed_size=_LZ4_BLOCK)
        total += len(piece)
        yield from (piece[start : start + _STEP] for start in range(0, len(piece), _STEP))
        del block, piece  # before the next 8 MiB are made
    if not total:
        raise EOFError


_DECODERS: dict[str, Callable[[_Source], Iterator[bytes]]] = {
    "gzip": lambda source: _by_object(source, igzip_lib.IgzipDecompressor(igzip_lib.DECOMP_GZIP)),
    "xz": lambda source: _by_object(source, lzma.LZMADecompressor(lzma.FORMAT_XZ, _MEMORY_LIMIT)),
    "lzma": lambda source: _by_object(source, lzma.LZMADecompressor(lzma.FORMAT_ALONE, _MEMORY_LIMIT)),
    "bzip2": lambda source: _by_object(source, bz2.BZ2Decompressor()),
    "lz4": _lz4_legacy,
    "lz4-frame": lambda source: _by_object(source, lz4.frame.LZ4FrameDecompressor()),
    "zstd": _zstd,
}
