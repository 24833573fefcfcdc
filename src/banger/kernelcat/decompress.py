"""Bounded decompression of everything that kernels, modules and packages are compressed with."""

from __future__ import annotations

import bz2
import io
import lzma
import struct
import zlib
from collections.abc import Iterator
from typing import IO, TYPE_CHECKING

import lz4.block
import zstandard

from banger.api.errors import BangerError, Code

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

_MAGIC = {
    b"\x1f\x8b\x08": "gzip",
    b"\xfd7zXZ\x00": "xz",
    b"BZh": "bzip2",
    b"\x02\x21\x4c\x18": "lz4",
    b"\x28\xb5\x2f\xfd": "zstd",
    b"\x5d\x00\x00": "lzma",
}

_STEP = 1 << 20
# a zstd block of 4 bytes can become 128 KiB, and the library cannot stop in between: at most 32 MiB per piece
_ZSTD_STEP = 1 << 10
_ZSTD_WINDOW = 1 << 27  # zstd --ultra -22, as kernels are packed
_LZ4_BLOCK = 8 << 20  # every block but the last of the legacy format (lz4_Frame_format.md)


def compression(head: bytes) -> str | None:
    """The name of the compression that data begins with, or None."""
    return next((kind for magic, kind in _MAGIC.items() if head.startswith(magic)), None)


def chunks(stream: IO[bytes], kind: str) -> Iterator[bytes]:
    """The decompressed bytes of one compressed stream, in pieces of bounded size; what follows it is ignored.

    Raises `BangerError(CORRUPT)` when it is damaged or ends early.
    """
    try:
        if kind == "lz4":
            yield from _lz4_legacy(stream)
        elif kind == "zstd":
            yield from _zstd(stream)
        else:
            yield from _bounded(stream, kind)
    except (zlib.error, lzma.LZMAError, OSError, ValueError, zstandard.ZstdError, lz4.block.LZ4BlockError) as error:
        raise BangerError(Code.CORRUPT, f"the {kind} data is damaged: {error}") from error


def decompress(data: bytes, limit: int) -> bytes:
    """Decompress by the data's own magic number to at most `limit` bytes (else CORRUPT)."""
    kind = compression(data)
    if kind is None:
        raise BangerError(Code.CORRUPT, "the data is not compressed with gzip, xz, lzma, bzip2, lz4 or zstd")
    output = bytearray()
    for piece in chunks(io.BytesIO(data), kind):
        output += piece
        if len(output) > limit:
            raise BangerError(Code.CORRUPT, f"the {kind} data unpacks to more than {limit >> 20} MiB")
    return bytes(output)


def _bounded(stream: IO[bytes], kind: str) -> Iterator[bytes]:
    if kind == "gzip":
        inflate = zlib.decompressobj(wbits=31)
        while not inflate.eof:
            data = inflate.unconsumed_tail or stream.read(_STEP)
            piece = inflate.decompress(data, _STEP)
            if not data and not piece:
                raise _truncated(kind)
            yield piece
        return
    if kind not in ("xz", "lzma", "bzip2"):
        raise BangerError(Code.CORRUPT, f"unknown compression {kind!r}")
    decompressor = bz2.BZ2Decompressor() if kind == "bzip2" else lzma.LZMADecompressor(memlimit=256 << 20)
    while not decompressor.eof:
        data = stream.read(_STEP) if decompressor.needs_input else b""
        if decompressor.needs_input and not data:
            raise _truncated(kind)
        yield decompressor.decompress(data, _STEP)


def _zstd(stream: IO[bytes]) -> Iterator[bytes]:
    frame = zstandard.ZstdDecompressor(max_window_size=_ZSTD_WINDOW).decompressobj()
    while not frame.eof:
        data = stream.read(_ZSTD_STEP)
        if not data:
            raise _truncated("zstd")
        yield frame.decompress(data)


def _lz4_legacy(stream: IO[bytes]) -> Iterator[bytes]:
    """The legacy frame has no end mark: the kernel build appends the unpacked size, which tells the end from damage."""
    stream.read(4)
    total = 0
    while True:
        word = stream.read(4)
        if len(word) < 4:
            if total and not word:
                return
            raise _truncated("lz4")
        (size,) = struct.unpack("<I", word)
        block = stream.read(min(size, _LZ4_BLOCK * 2))
        if not block and size == total:
            return
        if len(block) != size:
            raise _truncated("lz4")
        piece = lz4.block.decompress(block, uncompressed_size=_LZ4_BLOCK)
        total += len(piece)
        yield piece


def _truncated(kind: str) -> BangerError:
    return BangerError(Code.CORRUPT, f"the {kind} data ends early")


class PieceReader(io.RawIOBase):
    """A file to read of bytes that come in pieces, at most `limit` of them (else CORRUPT)."""

    def __init__(self, pieces: Iterator[bytes], limit: int) -> None:
        self._pieces = pieces
        self._left = limit
        self._piece = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: WriteableBuffer, /) -> int:
        while not self._piece:
            piece = next(self._pieces, None)
            if piece is None:
                return 0
            self._left -= len(piece)
            if self._left < 0:
                raise BangerError(Code.CORRUPT, "the compressed data unpacks to more than is allowed")
            self._piece = memoryview(piece)
        target = memoryview(buffer).cast("B")
        count = min(len(target), len(self._piece))
        target[:count] = self._piece[:count]
        self._piece = self._piece[count:]
        return count
