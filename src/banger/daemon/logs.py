"""Reading the files that the recorder and the daemon write: their end, and what comes after it."""

from __future__ import annotations

import asyncio
import os
import struct
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from pathlib import Path

from banger.api.operations import STDERR, STDOUT
from banger.vmm.recorder import MOST_BYTES, RECORD

_POLL_SECONDS = 0.1
_CHUNK = 1 << 18
_HEAD = struct.Struct("<II")  # of a record: the stream with the zero bytes after it, and the length

Piece = tuple[int, bytes]  # stream of the API, bytes


class _Raw:
    """A file of plain bytes."""

    def feed(self, data: bytes) -> Iterable[Piece]:
        return [(STDOUT, data)] if data else []


class _Records:
    """A file of the recorder's records (see recorder.py), which may end in the middle of one.

    So may those of an earlier start of the VM that ended badly: what is no record is skipped until one begins.
    """

    def __init__(self) -> None:
        self._pending = b""

    def feed(self, data: bytes) -> Iterator[Piece]:
        pending = self._pending + data
        position = 0
        while len(pending) - position >= RECORD.size:
            stream, length = _HEAD.unpack_from(pending, position)
            if stream not in (1, 2) or length > MOST_BYTES:
                position += 1
                continue
            end = position + RECORD.size + length
            if len(pending) < end:
                break
            if length:
                yield STDERR if stream == 2 else STDOUT, pending[position + RECORD.size : end]
            position = end
        self._pending = pending[position:]


async def read(path: Path, records: bool, tail: int | None, follow: Callable[[], bool] | None) -> AsyncIterator[Piece]:
    """The content of `<path>.1` and `path`, its last `tail` lines, then what is appended while `follow()` is true."""
    decoder: _Records | _Raw = _Records() if records else _Raw()
    pieces: list[Piece] = []
    file: int | None = None
    try:
        for name in (path.with_name(f"{path.name}.1"), path):
            previous, file = file, _open(name)
            if previous is not None:
                os.close(previous)
            for data in _chunks(file):
                pieces += decoder.feed(data)
                if tail is None:
                    for piece in pieces:
                        yield piece
                    pieces = []
        for piece in _last_lines(pieces, tail) if tail is not None else ():
            yield piece
        while follow is not None:
            going_on = follow()
            # asked before the last look at the old file: nothing is written to it once the new one has its name
            renewed = not _is_same(path, file)
            grown = False
            for data in _chunks(file):
                grown = True
                for piece in decoder.feed(data):
                    yield piece
            if renewed:
                previous, file = file, _open(path)
                if previous is not None:
                    os.close(previous)
            elif not grown:
                if not going_on:
                    return
                await asyncio.sleep(_POLL_SECONDS)
    finally:
        if file is not None:
            os.close(file)


def _chunks(file: int | None) -> Iterator[bytes]:
    while file is not None and (data := os.read(file, _CHUNK)):
        yield data


def _open(path: Path) -> int | None:
    try:
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return None


def _is_same(path: Path, file: int | None) -> bool:
    """Whether `path` still is the open file, or there is none yet."""
    try:
        there = path.stat().st_ino
        return file is not None and there == os.fstat(file).st_ino
    except FileNotFoundError:
        return True


def _last_lines(pieces: list[Piece], count: int) -> Iterable[Piece]:
    """The end of `pieces` that holds `count` lines, a last unfinished one included."""
    kept: deque[Piece] = deque()
    left = count
    for index, (stream, data) in enumerate(reversed(pieces)):
        if left == 0:
            break
        ends = data.count(b"\n") - (1 if index == 0 and data.endswith(b"\n") else 0)
        if ends < left:
            left -= ends
            kept.appendleft((stream, data))
            continue
        position = len(data) - 1 if index == 0 and data.endswith(b"\n") else len(data)
        for _ in range(left):
            position = data.rindex(b"\n", 0, position)
        kept.appendleft((stream, data[position + 1 :]))
        break
    return kept
