"""Runs tar2sqfs, which packs files into a squashfs as they arrive."""

from __future__ import annotations

import contextlib
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

from banger.api.errors import BangerError, Code
from banger.disk import tar
from banger.disk.parts import Parts
from banger.disk.tar import Member
from banger.job import Job, command_failed, widen_pipe

_BUFFER = 1 << 18  # bytes


class PackerFailedError(BangerError):
    """tar2sqfs failed, with its own message."""


class Packer:
    """Takes one file after another; no path may come twice, and links only after what they link to."""

    def __init__(self, stream: BinaryIO, records: BinaryIO) -> None:
        self._parts = Parts(records)
        self._stream = stream
        self.write = stream.write

    def add(self, member: Member) -> None:
        """Begin a file: exactly `member.size` bytes of data, and zeros up to a whole block, are to be written next."""
        self._stream.write(tar.encode_header(self._parts.placed(member)))

    @property
    def is_in_parts(self) -> bool:
        """Whether the squashfs needs `merge`."""
        return self._parts.used


@contextlib.contextmanager
def packing(target: Path, options: Sequence[str], job: Job) -> Iterator[Packer]:
    """Pack what the block adds into the new squashfs `target`, whole when the block has ended.

    Raises PackerFailedError, also for a disk that is full.
    """
    argv: list[str | Path] = ["tar2sqfs", "--quiet", "--force", "--no-skip", *options, target]
    with (
        tempfile.TemporaryFile() as records,
        tempfile.TemporaryFile() as errors,
        job.popen(argv, stdin=-1, stdout=errors, stderr=errors) as child,
    ):
        assert child.stdin is not None
        widen_pipe(child.stdin)
        in_parts = False
        with contextlib.suppress(BrokenPipeError):  # its exit status tells why
            with open(child.stdin.fileno(), "wb", buffering=_BUFFER, closefd=False) as stream:
                packer = Packer(stream, records)
                yield packer
                in_parts = packer.is_in_parts
                stream.write(tar.encode_end())
            child.stdin.close()
        status = child.wait()
        if status == 0 and in_parts:
            records.seek(0)
            # in a process of its own: for two million files it takes 1 GB of memory
            argv = [sys.executable, "-I", "-m", "banger.disk.merge", target]
            with job.popen(argv, stdin=records, stdout=errors, stderr=errors) as child:
                status = child.wait()
        job.check()
        if status != 0:
            errors.seek(0)
            failure = command_failed(argv, status, errors.read(1 << 20))
            raise PackerFailedError(Code.CORRUPT, failure.message, details=failure.details)
