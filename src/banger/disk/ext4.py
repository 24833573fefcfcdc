"""Makes ext4 disks, empty or from a prepared one: sparse files that cost milliseconds, whatever their size."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterator
from pathlib import Path

from banger import system
from banger.api.errors import BangerError, Code
from banger.job import Job

MIN_SIZE = 64 << 20
BYTES_PER_INODE = 16384  # mke2fs.conf(5), inode_ratio: the usual one from 512 MiB on
MAX_SIZE = 16 << 40  # ext4's file size limit with 4 KiB blocks, so that such a disk can be a file on ext4

_JOURNAL = 32  # MiB, of large disks
# All there is, so that a disk does not depend on the host: from e2fsprogs 1.47 on orphan_file and metadata_csum_seed
# come by themselves in Debian 13, which Linux before 5.15 cannot mount and of which the first takes 2 MB of each disk.
# No resize_inode: the blocks reserved for it would be written, 70 MB for a disk of 8 GB.
_FEATURES = (
    "none,64bit,dir_index,dir_nlink,ext_attr,extent,extra_isize,filetype,flex_bg,has_journal,huge_file,large_file,"
    "metadata_csum,sparse_super"
)


def make_ext4(path: Path, size: int, label: str, job: Job, content: Path | None = None) -> None:
    """Make the new sparse file `path` of `size` bytes and an ext4 filesystem called `label` (at most 16 bytes) in it.

    It gets what is in the directory `content`, and is to grow then. Measured with e2fsprogs 1.47: 5 ms and 0.2 MB on
    disk for 8 GB, 8 ms and 0.7 MB for 64 GB. Raises INVALID for an impossible size, EXISTS when the file exists,
    EXHAUSTED without disk space; nothing is left behind then.
    """
    check_size(size)
    try:
        fd = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC, 0o600)
    except FileExistsError as error:
        raise BangerError(Code.EXISTS, f"{path} already exists") from error
    with _whole_or_absent(path, size):
        try:
            os.truncate(fd, size)
        finally:
            os.close(fd)
        try:
            _mke2fs(path, size, label, "assume_storage_prezeroed=1", content, job)
        except BangerError as error:
            if "Bad option" not in error.message and "Valid extended options" not in error.message:
                raise
            # e2fsprogs before 1.47: the guest's kernel will zero the inode tables in the background
            _mke2fs(path, size, label, "lazy_itable_init=1,lazy_journal_init=1", content, job)


def clone_ext4(seed: Path, path: Path, size: int, job: Job) -> None:
    """Make the new file `path` with the content of the ext4 disk `seed`, grown to `size` bytes when that is more.

    Raises as `make_ext4` does, OSError without the seed and CORRUPT for one that cannot be grown.
    """
    check_size(size)
    if path.exists():
        raise BangerError(Code.EXISTS, f"{path} already exists")
    with _whole_or_absent(path, size):
        system.copy_file_prefer_clone(seed, path)
        path.chmod(0o600)
        if path.stat().st_size < size:
            os.truncate(path, size)
            job.run(["resize2fs", "-f", path])  # to the size of the file


@contextlib.contextmanager
def _whole_or_absent(path: Path, size: int) -> Iterator[None]:
    """Remove a disk that was not finished, whatever the reason, and say so when that is a full disk."""
    try:
        yield
    except BaseException as error:
        path.unlink(missing_ok=True)
        if _is_full(error):
            raise _no_space(path, size) from error
        raise


def check_size(size: int) -> None:
    """Raise BangerError(INVALID) unless a disk can have this size."""
    if not MIN_SIZE <= size <= MAX_SIZE:
        raise BangerError(
            Code.INVALID, f"a disk of {size:,} bytes is not possible", hint="use a size between 64 MiB and 16 TiB"
        )


def _mke2fs(path: Path, size: int, label: str, zeroing: str, content: Path | None, job: Job) -> None:
    journal = max(4, min(_JOURNAL, size >> 24))  # MiB; it fills up in the host's file, the default is up to 1 GiB
    filling: list[str | Path] = []
    if content is not None:
        # it grows: journal and inodes as in a large one, where resize2fs would keep those of a small one
        journal = _JOURNAL
        filling = ["-i", str(BYTES_PER_INODE), "-d", content]
    job.run(
        [
            "mke2fs",
            "-q",
            "-F",  # a regular file
            "-t",
            "ext4",
            "-b",
            "4096",
            "-m",
            "0",
            "-L",
            label,
            "-J",
            f"size={journal}",
            "-O",
            _FEATURES,
            "-E",
            f"nodiscard,{zeroing}",
            *filling,
            path,
        ],
        env=os.environ | {"PATH": f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin", "LC_ALL": "C"},
    )


def _is_full(error: BaseException) -> bool:
    """Whether a failure means that the disk is full."""
    if isinstance(error, BangerError):
        return "No space left" in error.message
    return isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def _no_space(path: Path, size: int) -> BangerError:
    return BangerError(
        Code.EXHAUSTED,
        f"not enough disk space in {path.parent} for a disk of {size:,} bytes",
        hint="free some space, or ask for a smaller disk",
    )
