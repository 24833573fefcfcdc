"""Looks into files that hold a root filesystem: its type, os-release and architecture, without mounting it."""

from __future__ import annotations

import os
import stat
import subprocess
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, cast

from banger import recognise
from banger.api.errors import BangerError, Code
from banger.disk import EXT4, SQUASHFS
from banger.disk.squashfs import elf_machine
from banger.job import Job

_HEAD = 2048  # bytes that hold both kinds of superblock
_LISTING_LIMIT = 4 << 20  # bytes of a directory's listing
_OS_RELEASE_LIMIT = 64 << 10
_PROGRAMS = 16  # that are looked at in one directory
_OS_RELEASE_DIRECTORIES = ("etc", "usr/lib")
_PROGRAM_DIRECTORIES = ("usr/bin", "bin", "usr/sbin", "sbin", "usr/local/bin", "")


@dataclass(frozen=True)
class Tree:
    """What the tree in a root filesystem tells: `arch` is '' without any program that could be read."""

    arch: str
    os_release: bytes


@dataclass(frozen=True)
class _File:
    """A regular file in a root filesystem; `reader` is the command that prints its content."""

    name: str
    executable: bool
    reader: list[str | Path]


def filesystem_type(file: Path) -> str:
    """SQUASHFS or EXT4 by the superblock of a regular file (ext2 and ext3 count as ext4, which reads them).

    Raises NOT_FOUND without a file, INVALID for anything else, CORRUPT for a filesystem that is cut off or that must be
    repaired before it can be mounted read-only.
    """
    try:
        if not file.is_file():
            found = recognise.recognise(file)
            raise BangerError(Code.INVALID, f"{file} is not a regular file", hint=found.advice)
        with open(file, "rb") as stream:
            head = stream.read(_HEAD).ljust(_HEAD, b"\0")
            size = os.fstat(stream.fileno()).st_size
    except OSError as error:
        raise BangerError(Code.INVALID, f"{file} cannot be read: {error.strerror}") from error
    # s_magic, s_major and bytes_used: struct squashfs_super_block in fs/squashfs/squashfs_fs.h of Linux
    kind = recognise.filesystem(head)
    if kind == SQUASHFS:
        _refuse_short(file, size, _number(head, 40, 8))
        return SQUASHFS
    # s_magic and further fields: Documentation/filesystems/ext4/super.rst of Linux
    if kind == EXT4:
        superblock = head[1024:]
        incompatible = _number(superblock, 0x60, 4)
        blocks = _number(superblock, 0x4, 4) | (_number(superblock, 0x150, 4) << 32 if incompatible & 0x80 else 0)
        _refuse_short(file, size, blocks << (10 + min(_number(superblock, 0x18, 4), 6)))
        if incompatible & 0x4:  # INCOMPAT_RECOVER
            raise BangerError(
                Code.CORRUPT,
                f"the ext4 filesystem {file} was not unmounted: its journal must be replayed",
                hint=f"run 'e2fsck -f {file}'",
            )
        return EXT4
    found = recognise.recognise(file)
    raise BangerError(
        Code.INVALID, f"{file} is {found.what}, neither an ext4 nor a squashfs filesystem", hint=found.advice
    )


def look_into(file: Path, filesystem: str, job: Job) -> Tree:
    """What the tree of a filesystem of that type tells; nothing where debugfs (ext4) or rdsquashfs is not installed."""
    list_files = {SQUASHFS: _squashfs_files, EXT4: _ext4_files}[filesystem]
    try:
        return Tree(_arch(file, list_files, job), _os_release(file, list_files, job))
    except BangerError as error:
        if error.code is not Code.MISSING_TOOL:
            raise
        return Tree("", b"")


_List = Callable[[Path, str, Job], Iterator[_File]]


def _arch(file: Path, list_files: _List, job: Job) -> str:
    """The architecture of most of the first programs in the first directory that has any."""
    for directory in _PROGRAM_DIRECTORIES:
        programs = [entry for entry in list_files(file, directory, job) if entry.executable][:_PROGRAMS]
        machines = Counter(elf_machine(_output(program.reader, 20, job)) for program in programs)
        del machines[""]
        if machines:
            return machines.most_common(1)[0][0]
    return ""


def _os_release(file: Path, list_files: _List, job: Job) -> bytes:
    for directory in _OS_RELEASE_DIRECTORIES:
        for entry in list_files(file, directory, job):
            if entry.name == "os-release":
                return _output(entry.reader, _OS_RELEASE_LIMIT, job)
    return b""


def _squashfs_files(file: Path, directory: str, job: Job) -> Iterator[_File]:
    # rdsquashfs(1): "-rwxr-xr-x 0/0 67k name", one a line
    for line in _lines(["rdsquashfs", "--list", f"/{directory}", file], job):
        words = line.split(maxsplit=3)
        if len(words) == 4 and words[0].startswith("-"):
            yield _File(words[3], "x" in words[0], ["rdsquashfs", "--cat", f"/{directory}/{words[3]}", file])


def _ext4_files(file: Path, directory: str, job: Job) -> Iterator[_File]:
    # debugfs(8), ls -p: "/inode/mode/uid/gid/name/size/", one a line; -c reads no bitmaps
    for line in _lines(["debugfs", "-c", "-R", f"ls -p /{directory}", file], job):
        words = line.split("/")
        if len(words) == 8 and words[1].isdecimal() and stat.S_ISREG(mode := int(words[2], 8)):
            yield _File(words[5], bool(mode & 0o111), ["debugfs", "-c", "-R", f"cat <{words[1]}>", file])


def _lines(argv: list[str | Path], job: Job) -> list[str]:
    return _output(argv, _LISTING_LIMIT, job).decode(errors="surrogateescape").splitlines()


def _output(argv: list[str | Path], limit: int, job: Job) -> bytes:
    """The beginning of what a command prints; its failure, as for a directory that is not there, is an empty output."""
    with job.popen(argv, stderr=subprocess.DEVNULL) as child:
        return cast(BinaryIO, child.stdout).read(limit)


def _number(data: bytes, offset: int, size: int) -> int:
    return int.from_bytes(data[offset : offset + size], "little")


def _refuse_short(file: Path, size: int, wanted: int) -> None:
    if size < wanted:
        raise BangerError(Code.CORRUPT, f"{file} is cut off: it has {size:,} bytes, its filesystem {wanted:,}")
