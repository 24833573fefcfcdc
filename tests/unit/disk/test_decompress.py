"""Compression is told by magic number, and damage is reported with the file's name."""

from __future__ import annotations

import bz2
import gzip
import lzma
from collections.abc import Callable
from pathlib import Path

import pytest
import zstandard

from banger.api.errors import BangerError, Code
from banger.disk.decompress import open_decompressed
from banger.job import Job, Progress

CONTENT = bytes(range(256)) * 40_000
COMPRESSIONS: dict[str, Callable[[bytes], bytes]] = {
    "plain": bytes,
    "gzip": gzip.compress,
    "xz": lzma.compress,
    "zstd": zstandard.compress,
    "bzip2": bz2.compress,
}


@pytest.mark.parametrize("kind", COMPRESSIONS)
def test_every_compression_in_one_part_or_several(tmp_path: Path, kind: str) -> None:
    compress = COMPRESSIONS[kind]
    source = tmp_path / "misleading.zip"
    source.write_bytes(compress(CONTENT) + compress(b"and more"))
    with open_decompressed(source, Job(), "import") as stream:
        assert stream.read() == CONTENT + b"and more"


@pytest.mark.parametrize("kind", ["gzip", "xz", "bzip2"])
def test_a_cut_off_file_is_corrupt(tmp_path: Path, kind: str) -> None:
    source = tmp_path / "rootfs.tar"
    compressed = COMPRESSIONS[kind](CONTENT)
    source.write_bytes(compressed[: len(compressed) - 10])
    with (
        pytest.raises(BangerError, match=r"rootfs\.tar is damaged") as caught,
        open_decompressed(source, Job(), "import") as stream,
    ):
        stream.read()
    assert caught.value.code == Code.CORRUPT


def test_progress_counts_compressed_bytes(tmp_path: Path) -> None:
    seen: list[Progress] = []
    source = tmp_path / "rootfs.tar"
    source.write_bytes(CONTENT)
    with open_decompressed(source, Job(seen.append), "import") as stream:
        while stream.read(1 << 20):
            pass
    assert (seen[-1].done, seen[-1].total) == (len(CONTENT), len(CONTENT))
    assert [progress.stage for progress in seen] == ["import"] * len(seen)
