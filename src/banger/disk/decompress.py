"""Opens a possibly compressed file as the stream of its content, told apart by magic numbers, never by name."""

from __future__ import annotations

import bz2
import contextlib
import gzip
import io
import lzma
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, cast

import zstandard

from banger.api.errors import BangerError, Code
from banger.job import Job

_BUFFER = 1 << 20
_REPORT_EVERY = 4 << 20


class _ProgressFile(io.RawIOBase):
    """A file that reports how much of it has been read."""

    def __init__(self, path: Path, job: Job, stage: str) -> None:
        self._file = open(path, "rb", buffering=0)
        self._job = job
        self._stage = stage
        self._label = path.name
        self._total = path.stat().st_size
        self._done = 0
        self._reported = 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: bytearray | memoryview) -> int:  # type: ignore[override]
        count = self._file.readinto(buffer) or 0
        self._done += count
        if self._done - self._reported >= _REPORT_EVERY or (count == 0 and self._reported < self._done):
            self._reported = self._done
            self._job.progress(self._stage, self._label, self._done, self._total)
        return count

    def close(self) -> None:
        self._file.close()
        super().close()


@contextlib.contextmanager
def open_decompressed(path: Path, job: Job, stage: str) -> Iterator[BinaryIO]:
    """The content of a plain, gzip, xz, zstd or bzip2 file, reporting progress in compressed bytes.

    Raises CORRUPT, naming the file, when decompression fails inside the block.
    """
    try:
        raw = cast(io.BufferedReader, io.BufferedReader(_ProgressFile(path, job, stage), _BUFFER))
    except OSError as error:
        raise BangerError(Code.NOT_FOUND, f"cannot read {path}: {error.strerror}") from error
    with raw, _decompressor(raw) as stream:
        try:
            yield stream
        except (zlib.error, lzma.LZMAError, zstandard.ZstdError, EOFError, OSError) as error:
            if isinstance(error, OSError) and error.errno is not None:
                raise  # from the system; gzip and bz2 report damage as an OSError without a number
            raise BangerError(Code.CORRUPT, f"{path} is damaged or cut off: {error}") from error


def _decompressor(raw: io.BufferedReader) -> BinaryIO:
    magic = raw.peek(6)[:6]
    if magic.startswith(b"\x1f\x8b"):  # RFC 1952
        return cast(BinaryIO, gzip.GzipFile(fileobj=raw, mode="rb"))
    if magic.startswith(b"\xfd7zXZ\0"):  # The .xz File Format 1.2.1
        return cast(BinaryIO, lzma.LZMAFile(raw))
    if magic.startswith(b"\x28\xb5\x2f\xfd"):  # RFC 8878
        reader = zstandard.ZstdDecompressor().stream_reader(raw, read_across_frames=True)
        return io.BufferedReader(cast(io.RawIOBase, reader), _BUFFER)
    if magic.startswith(b"BZh"):
        return cast(BinaryIO, bz2.BZ2File(raw))
    return raw
