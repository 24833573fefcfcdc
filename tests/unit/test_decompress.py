"""Everything is told by magic number, unpacked within bounds, and called damaged when it is."""

from __future__ import annotations

import bz2
import contextlib
import functools
import gzip
import io
import itertools
import lzma
import struct
import time
import tracemalloc
import zlib
from collections.abc import Callable
from pathlib import Path

import lz4.frame
import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from banger.api.errors import BangerError, Code
from banger.decompress import PieceReader, chunks, compression, decompress, open_decompressed
from banger.job import Job, Progress
from tests.unit.kernelcat.builders import lz4_legacy

CONTENT = bytes(range(256)) * 4_000
COMPRESSIONS: dict[str, Callable[[bytes], bytes]] = {
    "gzip": gzip.compress,
    "xz": lzma.compress,
    "lzma": lambda data: lzma.compress(data, format=lzma.FORMAT_ALONE),
    "bzip2": bz2.compress,
    "lz4": lz4_legacy,
    "lz4-frame": lz4.frame.compress,
    "zstd": zstandard.compress,
}
CONCATENATED = [kind for kind in COMPRESSIONS if kind not in ("lzma", "lz4")]
BOMB = 20 << 20  # bytes


@functools.cache
def bomb(kind: str) -> bytes:
    """What unpacks to BOMB zeros and is as small as the format allows."""
    if kind == "zstd":  # RFC 8878: nothing but blocks that repeat one byte, with a window of 128 KiB
        blocks = BOMB >> 17
        words = ((128 << 10) << 3 | 1 << 1 | (index == blocks - 1) for index in range(blocks))
        return b"\x28\xb5\x2f\xfd\x00\x38" + b"".join(word.to_bytes(3, "little") + b"\0" for word in words)
    return COMPRESSIONS[kind](bytes(BOMB))


@pytest.mark.parametrize("kind", COMPRESSIONS)
def test_every_compression(kind: str) -> None:
    packed = COMPRESSIONS[kind](CONTENT)
    assert compression(packed) == kind
    assert decompress(packed, len(CONTENT)) == CONTENT


@pytest.mark.parametrize("kind", COMPRESSIONS)
@given(st.data())
def test_a_cut_off_stream_is_corrupt(kind: str, data: st.DataObject) -> None:
    packed = COMPRESSIONS[kind](CONTENT[:3000])
    cut = data.draw(st.integers(1, len(packed) - 1))
    with pytest.raises(BangerError, match=f"the {kind} data is damaged") as caught:
        list(chunks(io.BytesIO(packed[:cut]), kind))
    assert caught.value.code is Code.CORRUPT


@pytest.mark.parametrize("kind", COMPRESSIONS)
@given(st.data())
def test_damage_is_corrupt_or_harmless(kind: str, data: st.DataObject) -> None:
    packed = bytearray(COMPRESSIONS[kind](CONTENT[:3000]))
    for _ in range(data.draw(st.integers(1, 4))):
        packed[data.draw(st.integers(0, len(packed) - 1))] = data.draw(st.integers(0, 255))
    with contextlib.suppress(BangerError):
        for _ in itertools.islice(chunks(io.BytesIO(bytes(packed)), kind), 100):
            pass


@pytest.mark.parametrize("kind", COMPRESSIONS)
def test_pieces_and_memory_stay_small(kind: str) -> None:
    packed = bomb(kind)
    tracemalloc.start()
    try:
        total = 0
        for piece in chunks(io.BytesIO(packed), kind):
            assert len(piece) <= 1 << 20
            assert piece.count(0) == len(piece)
            total += len(piece)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert total == BOMB
    assert peak < 24 << 20  # the legacy lz4 format has blocks of 8 MiB


@pytest.mark.parametrize("kind", COMPRESSIONS)
def test_a_bomb_is_refused_at_the_limit(kind: str) -> None:
    with pytest.raises(BangerError, match="more than 5 MiB") as caught:
        decompress(bomb(kind), 5 << 20)
    assert caught.value.code is Code.CORRUPT


def test_a_window_or_dictionary_too_large_is_refused() -> None:
    window = (17 << 3).to_bytes(1, "little")  # 2^(10 + 17) bytes: 128 MiB
    more = (18 << 3).to_bytes(1, "little")
    empty = b"\x01\x00\x00"  # a last block of no bytes
    assert decompress(b"\x28\xb5\x2f\xfd\x00" + window + empty, 1) == b""
    with pytest.raises(BangerError, match="zstd data is damaged"):
        decompress(b"\x28\xb5\x2f\xfd\x00" + more + empty, 1)
    # The .xz File Format, 3.1 and 5.3.1: the block header follows the 12 bytes of the stream's, and its fifth byte
    # is the size of the dictionary; 34 is 256 MiB
    packed = bytearray(lzma.compress(b"content", filters=[{"id": lzma.FILTER_LZMA2, "dict_size": 4096}]))
    assert packed[16] == 0
    packed[16] = 34
    packed[20:24] = struct.pack("<I", zlib.crc32(packed[12:20]))
    with pytest.raises(BangerError, match="xz data is damaged"):
        decompress(bytes(packed), 100)


@pytest.mark.parametrize("kind", CONCATENATED)
def test_what_follows_a_stream(kind: str) -> None:
    """Ignored, unless all streams are asked for: then it must be another one, or zeros that pad."""
    two = COMPRESSIONS[kind](CONTENT) + COMPRESSIONS[kind](b"and more")
    assert b"".join(chunks(io.BytesIO(two), kind)) == CONTENT
    assert b"".join(chunks(io.BytesIO(two + bytes(900)), kind, concatenated=True)) == CONTENT + b"and more"
    with pytest.raises(BangerError, match="something else follows"):
        list(chunks(io.BytesIO(two + b"something"), kind, concatenated=True))
    assert b"".join(chunks(io.BytesIO(two + b"something"), kind)) == CONTENT


@pytest.mark.parametrize("kind", CONCATENATED)
def test_a_hundred_thousand_streams_are_unpacked_in_seconds(kind: str) -> None:
    """What is read too much of each is not copied for each: that took minutes, and an image has room for millions."""
    many = COMPRESSIONS[kind](b"") * 100_000
    begun = time.process_time()
    pieces = chunks(io.BytesIO(COMPRESSIONS[kind](CONTENT) + many), kind, concatenated=True)
    assert b"".join(pieces) == CONTENT
    assert time.process_time() - begun < 20


def test_skippable_frames_of_zstd_are_skipped() -> None:
    skippable = b"\x50\x2a\x4d\x18" + struct.pack("<I", 5) + b"index"
    packed = skippable + zstandard.compress(CONTENT) + skippable
    assert compression(packed) == "zstd"
    assert decompress(packed, len(CONTENT)) == CONTENT
    assert b"".join(chunks(io.BytesIO(packed * 2), "zstd", concatenated=True)) == CONTENT * 2


def test_zstd_frames_of_every_shape() -> None:
    """With and without a checksum, a content size, a window of its own and content at all."""
    for checksum, size, content in itertools.product((False, True), (False, True), (b"", b"x", CONTENT)):
        packer = zstandard.ZstdCompressor(write_checksum=checksum, write_content_size=size)
        assert decompress(packer.compress(content), len(CONTENT)) == content


def test_the_unpacked_size_ends_a_legacy_lz4_stream() -> None:
    """Kernel builds append it: scripts/Makefile.lib, size_append."""
    packed = lz4_legacy(CONTENT)
    assert decompress(packed + struct.pack("<I", len(CONTENT)), len(CONTENT)) == CONTENT
    with pytest.raises(BangerError, match="ends early"):
        decompress(packed + struct.pack("<I", len(CONTENT) + 1), len(CONTENT))


def test_lzo_is_told_apart_but_not_unpacked() -> None:
    with pytest.raises(BangerError, match="compressed with lzo") as caught:
        decompress(b"\x89LZO\x00\r\n\x1a\n", 1)
    assert caught.value.code is Code.UNSUPPORTED


def test_pieces_become_a_file() -> None:
    reader = io.BufferedReader(PieceReader(iter([b"a", b"", b"bcd"])), 2)
    assert (reader.read(2), reader.read(9)) == (b"ab", b"cd")


@pytest.mark.parametrize("kind", ["plain", *CONCATENATED])
def test_a_file_is_opened_whatever_its_name(tmp_path: Path, kind: str) -> None:
    compress = COMPRESSIONS.get(kind, bytes)
    source = tmp_path / "misleading.zip"
    source.write_bytes(compress(CONTENT) + compress(b"and more"))
    with open_decompressed(source, Job(), "import") as stream:
        assert stream.read() == CONTENT + b"and more"


@pytest.mark.parametrize("kind", COMPRESSIONS)
def test_a_cut_off_file_is_named(tmp_path: Path, kind: str) -> None:
    source = tmp_path / "rootfs.tar"
    compressed = COMPRESSIONS[kind](CONTENT)
    source.write_bytes(compressed[: len(compressed) - 10])
    with (
        pytest.raises(BangerError, match=r"rootfs\.tar is damaged") as caught,
        open_decompressed(source, Job(), "import") as stream,
    ):
        stream.read()
    assert caught.value.code == Code.CORRUPT


def test_an_absent_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(BangerError, match="absent") as caught, open_decompressed(tmp_path / "absent", Job(), "import"):
        pass
    assert caught.value.code is Code.NOT_FOUND


def test_progress_counts_compressed_bytes(tmp_path: Path) -> None:
    seen: list[Progress] = []
    source = tmp_path / "rootfs.tar"
    source.write_bytes(CONTENT)
    with open_decompressed(source, Job(seen.append), "import") as stream:
        while stream.read(1 << 20):
            pass
    assert (seen[-1].done, seen[-1].total) == (len(CONTENT), len(CONTENT))
    assert [progress.stage for progress in seen] == ["import"] * len(seen)
