"""Looks into ext4 files and changes them with debugfs (e2fsprogs): without root, without mounting, nothing outside."""

from __future__ import annotations

import re
import stat
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, cast

from banger.api.errors import BangerError, Code
from banger.job import Job

ROOT = "<2>"  # the inode of every root directory, EXT2_ROOT_INO in <ext2fs/ext2_fs.h>

# debugfs(8), stat: the head of its output, before anything that comes out of the filesystem
_STAT = re.compile(
    rb"Inode: (\d+) +Type: ([A-Za-z ]+?) +Mode: +(\d+) .*\n.*\nUser: +(-?\d+) +Group: +(-?\d+) .*Size: (\d+)", re.ASCII
)
_TYPES = {
    b"directory": stat.S_IFDIR,
    b"regular": stat.S_IFREG,
    b"symlink": stat.S_IFLNK,
    b"FIFO": stat.S_IFIFO,
    b"character special": stat.S_IFCHR,
    b"block special": stat.S_IFBLK,
    b"socket": stat.S_IFSOCK,
}
_ENTRY = re.compile(rb"/(\d+)/(\d+)/(-?\d+)/(-?\d+)/(.*)/\d*/")
_STAT_LIMIT = 16 << 10
_LISTING_LIMIT = 16 << 20


@dataclass(frozen=True)
class Inode:
    """A file: `mode` has its type, as in stat(2)."""

    number: int
    mode: int
    uid: int
    gid: int
    size: int


def find(disk: Path, where: str, job: Job) -> Inode | None:
    """The file at a path (or `<number>`) of a filesystem, None without one.

    A symbolic link at the end of the path is not followed; those before it are, inside of the filesystem. `where` has
    no spaces and no quotation marks.
    """
    output = _output(disk, f"stat {where}", _STAT_LIMIT, job)
    found = _STAT.match(output)
    if found is None:
        return None
    number, kind, mode, uid, gid, size = found.groups()
    # ids from 2^31 on come out negative
    ids = (int(uid) % (1 << 32), int(gid) % (1 << 32))
    return Inode(int(number), _TYPES.get(kind, 0) | int(mode, 8), *ids, int(size))


def root(disk: Path, job: Job) -> Inode:
    """The root directory of a filesystem; raises CORRUPT when it has none."""
    found = find(disk, ROOT, job)
    if found is None or not stat.S_ISDIR(found.mode):
        raise BangerError(
            Code.CORRUPT, f"{disk} is no ext4 filesystem that can be read", hint=f"see what 'e2fsck -f {disk}' says"
        )
    return found


def read(disk: Path, number: int, limit: int, job: Job) -> bytes:
    """The content of a file, at most `limit` bytes of it."""
    return _output(disk, f"cat <{number}>", limit, job)


def listing(disk: Path, number: int, job: Job) -> list[bytes] | None:
    """The entries of a directory, as lines "inode/mode/uid/gid/name" without `.` and `..`.

    None when a name has a newline, so that lines are not entries, or there are too many.
    """
    output = _output(disk, f"ls -p <{number}>", _LISTING_LIMIT, job)
    entries = []
    for line in output.split(b"\n"):
        found = _ENTRY.fullmatch(line)
        if found is None:
            if line:
                return None
        elif found[1] != b"0" and found[5] not in (b".", b".."):  # without an inode it is space that is free
            entries.append(b"/".join(found.groups()))
    return None if len(output) >= _LISTING_LIMIT else entries


def change(disk: Path, commands: Sequence[str], job: Job, cwd: Path | None = None) -> None:
    """Run commands that change a filesystem; raises CORRUPT when one of them fails, which may be any.

    Files of the host that they name are relative to `cwd`.
    """
    script = "".join(f"{command}\n" for command in commands).encode(errors="surrogateescape")
    argv: list[str | Path] = ["debugfs", "-w", "-f", "-", disk]
    with job.popen(argv, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, cwd=cwd) as child:
        _, errors = child.communicate(script)
    # it ends with status 0 all the same; its name and version are no error
    problems = [line for line in errors.decode(errors="replace").splitlines() if not line.startswith("debugfs 1.")]
    if child.returncode != 0 or problems:
        raise BangerError(Code.CORRUPT, f"{disk} cannot be changed: {' / '.join(problems[:3]) or 'debugfs failed'}")


def quoted(text: bytes) -> str | None:
    """A word of a command; None for what a command cannot hold."""
    if b"\n" in text or b"\0" in text:
        return None
    return '"' + text.decode(errors="surrogateescape").replace('"', '""') + '"'


def _output(disk: Path, command: str, limit: int, job: Job) -> bytes:
    with job.popen(["debugfs", "-R", command, disk], stderr=subprocess.DEVNULL) as child:
        return cast(BinaryIO, child.stdout).read(limit)
