"""Reads and writes tar archives as bundles have them: in one pass over what arrives, compressed, and bounded."""

from __future__ import annotations

import contextlib
import io
import os
import stat
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import BinaryIO

import zstandard

from banger import system
from banger.api.errors import BangerError, Code
from banger.decompress import MAGIC_SIZE, PieceReader, chunks, compression
from banger.disk import space, tar
from banger.disk.tar import Member, TarReader
from banger.job import Job
from banger.readahead import read_ahead

_BUFFER = 1 << 17  # bytes

_LEVEL = 9  # 19 takes 24 times as long for a seventh less: docs/performance.md
_WINDOW_LOG = 23  # 8 MiB, the most that every zstd unpacks without being told
# several jobs of a fixed size: the bytes are the same for any number of threads, and so on any machine
_JOB_SIZE = 32 << 20


@dataclass(frozen=True)
class Bounds:
    """What an archive may unpack to: `limit` bytes, and `ratio_max` times its size once it is `ratio_from` bytes.

    `weigh` says how many bytes of a piece count for the ratio.
    """

    limit: int
    ratio_max: int
    ratio_from: int
    weigh: Callable[[bytes], int] = len


@contextlib.contextmanager
def reading(pieces: Iterable[bytes], label: str, bounds: Bounds, job: Job) -> Iterator[TarReader]:
    """A tar that arrives in `pieces`, perhaps compressed, for the block to read to its end mark.

    All pieces are taken, and what they raise passes. Raises CORRUPT for a damaged archive, one that goes on after its
    end mark or unpacks out of proportion, EXHAUSTED for one too large.
    """
    with read_ahead(pieces) as arriving:
        stream = _reader(_bounded(arriving, label, bounds, job))
        yield TarReader(stream, label, bounds.limit)
        while rest := stream.read(tar.CHUNK):
            if rest.strip(b"\0"):
                raise BangerError(Code.CORRUPT, f"{label} has data after the end of its archive")


def write(output: BinaryIO, contents: Iterable[tuple[Member, Iterable[bytes]]], total: int, job: Job) -> None:
    """Write members and their data as a tar.zst; the same bytes for the same members, on any machine."""
    # "ZSTD_c_nbWorkers" in zstd.h: with one worker or more, the output depends on the job size only
    parameters = zstandard.ZstdCompressionParameters.from_level(
        _LEVEL,
        window_log=_WINDOW_LOG,
        write_checksum=True,
        threads=max(1, os.cpu_count() or 1),
        job_size=_JOB_SIZE,
        overlap_log=9,
    )
    compressor = zstandard.ZstdCompressor(compression_params=parameters).compressobj()
    done = 0
    for member, data in contents:
        output.write(compressor.compress(tar.encode_header(member)))
        for piece in data:
            job.progress("compress", member.path.decode(errors="replace"), done, total)
            output.write(compressor.compress(piece))
            done += len(piece)
        output.write(compressor.compress(bytes(-member.size % tar.BLOCK)))
    output.write(compressor.compress(tar.encode_end()))
    output.write(compressor.flush())


@contextlib.contextmanager
def new_file(output: Path, replace: bool) -> Iterator[BinaryIO]:
    """A file to write that appears when the block ends; what the system says of it is an error that names it.

    Raises EXISTS without `replace`, EXHAUSTED on a full disk, INVALID for what cannot be written.
    """
    try:
        _refuse_taken(output, replace)
        with system.staged_file(output, mode=0o644) as stream:
            yield stream
    except OSError as error:
        full = space.means_full(error)
        code = Code.EXHAUSTED if full else Code.INVALID
        raise BangerError(code, f"{output} cannot be written: {error.strerror}") from error


def _refuse_taken(output: Path, replace: bool) -> None:
    try:
        mode = output.stat().st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISREG(mode):
        raise BangerError(Code.INVALID, f"{output} is not a regular file")
    if not replace:
        raise BangerError(Code.EXISTS, f"{output} exists already", hint="replace it with --force")


def plain_member(path: bytes, size: int) -> Member:
    """A regular file of a bundle, without anything of this host."""
    return Member(path, tar.REGULAR, 0o644, uid=0, gid=0, mtime=0, size=size)


def _reader(pieces: Iterator[bytes]) -> io.BufferedReader:
    return io.BufferedReader(PieceReader(pieces), _BUFFER)


def _bounded(arriving: Iterator[bytes], label: str, bounds: Bounds, job: Job) -> Iterator[bytes]:
    """What the pieces of an archive unpack to, told by magic number, as long as it is in proportion to them."""
    packed = 0

    def counted() -> Iterator[bytes]:
        nonlocal packed
        for piece in arriving:
            packed += len(piece)
            yield piece

    pieces = counted()
    head = b""
    while len(head) < MAGIC_SIZE and (piece := next(pieces, None)) is not None:
        head += piece
    kind = compression(head)
    pieces = chain([head], pieces)
    contents = chunks(_reader(pieces), kind, concatenated=True, name=label) if kind else pieces
    unpacked = weight = 0
    for piece in contents:
        job.check()
        unpacked += len(piece)
        weight += bounds.weigh(piece)
        if weight > bounds.ratio_from and weight > packed * bounds.ratio_max:
            raise BangerError(Code.CORRUPT, f"{label} unpacks to more than {bounds.ratio_max} times its size")
        if unpacked > bounds.limit:
            raise BangerError(Code.EXHAUSTED, f"{label} unpacks to more than {system.human_size(bounds.limit)}")
        yield piece
