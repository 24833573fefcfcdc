"""The few system calls that Python does not wrap well: atomic publication, cheap copies, long socket paths."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import socket
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

# ctypes, shutil, tempfile and difflib are imported where they are used: every start of the command line imports this
if TYPE_CHECKING:
    import ctypes

_AT_FDCWD = -100
_RENAME_EXCHANGE = 2  # <linux/fs.h>, renameat2(2)
_SYNC_FILE_RANGE_WRITE = 2  # <linux/fs.h>, sync_file_range(2)
_FICLONE = 0x40049409  # <linux/fs.h>, ioctl_ficlone(2)

STAGING_PREFIX = ".staging-"
NAME_MAX = 64  # characters of a kernel's, image's or VM's name
_ORPHAN_SECONDS = 10


def _libc() -> ctypes.CDLL:
    import ctypes

    return ctypes.CDLL(None, use_errno=True)


def _off64(value: int) -> ctypes.c_int64:
    import ctypes

    return ctypes.c_int64(value)


def _check(result: int, path: Path) -> None:
    import ctypes

    if result != 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code), os.fspath(path))


def rename_exchange(first: Path, second: Path) -> None:
    """Swap two existing paths of one filesystem in one step (renameat2 with RENAME_EXCHANGE)."""
    result = _libc().renameat2(_AT_FDCWD, os.fsencode(first), _AT_FDCWD, os.fsencode(second), _RENAME_EXCHANGE)
    _check(result, second)


@contextlib.contextmanager
def staging(parent: Path, name: str) -> Iterator[Path]:
    """A private directory beside the entry `name` to build it in; what is left in it at the end is removed."""
    import tempfile

    parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    directory = Path(tempfile.mkdtemp(prefix=f"{STAGING_PREFIX}{name}-", dir=parent))
    try:
        yield directory
    finally:
        remove_tree(directory)


def publish(staged: Path, target: Path) -> None:
    """Make `staged`, of which `sync_tree` has been told, appear as `target` in one step.

    An entry that is already there is exchanged with it, and so ends up in the staging directory, which its context
    manager (or the next start's sweep) removes.
    """
    if target.exists():
        rename_exchange(staged, target)
    else:
        os.rename(staged, target)
    fsync_directory(target.parent)


def sync_tree(directory: Path) -> None:
    """Write a directory and all that is in it to disk; not the whole filesystem, to which guests write all the time."""
    for path, _, files in os.walk(directory):
        for file in files:
            fsync_file(Path(path, file))
        fsync_directory(Path(path))


def fsync_file(path: Path) -> None:
    """Write a file to disk."""
    _fsync(path, os.O_RDONLY | os.O_NOFOLLOW)


def begin_writeback(path: Path) -> None:
    """Let the kernel begin to write what a file has got so far, so that less is left for its fsync."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        _check(_libc().sync_file_range(descriptor, _off64(0), _off64(0), _SYNC_FILE_RANGE_WRITE), path)
    finally:
        os.close(descriptor)


def fsync_directory(directory: Path) -> None:
    """Make the names in a directory durable."""
    _fsync(directory, os.O_RDONLY | os.O_DIRECTORY)


def _fsync(path: Path, flags: int) -> None:
    descriptor = os.open(path, flags | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove_entry(target: Path) -> None:
    """Remove a published directory so that a crash never leaves half of it: rename away, then delete.

    It takes no space: a full disk has none, not even for another directory.
    """
    removed = target.with_name(f"{STAGING_PREFIX}removed-{os.urandom(8).hex()}")
    os.rename(target, removed)
    try:
        fsync_directory(target.parent)
    finally:
        _remove_patiently(removed)


def remove_tree(path: Path) -> None:
    """Delete a tree (or a file), also one with directories that lost their write permission."""
    import shutil

    if path.is_symlink() or not path.is_dir():
        path.unlink(missing_ok=True)
        return
    try:
        shutil.rmtree(path)
    except FileNotFoundError:
        if path.exists():  # somebody else deletes in there, too
            remove_tree(path)
    except PermissionError:
        os.chmod(path, 0o700)
        for directory, names, _ in os.walk(path):
            for name in names:
                inside = os.path.join(directory, name)
                if not os.path.islink(inside):
                    os.chmod(inside, 0o700)
        shutil.rmtree(path)


def sweep_staging(parent: Path) -> list[Path]:
    """Remove what interrupted operations left in `parent`; call it only while nothing else builds there.

    Returns what was removed: files of other users may have to stay.
    """
    removed = []
    for leftover in sorted(parent.glob(f"{STAGING_PREFIX}*")) if parent.is_dir() else []:
        with contextlib.suppress(PermissionError):
            _remove_patiently(leftover)
            removed.append(leftover)
    return removed


def _remove_patiently(path: Path) -> None:
    """Delete a tree in which a process may still write, until it finds its input gone."""
    import time

    deadline = time.monotonic() + _ORPHAN_SECONDS
    while True:
        try:
            remove_tree(path)
            return
        except OSError as error:
            if error.errno != errno.ENOTEMPTY or time.monotonic() > deadline:
                raise
            time.sleep(0.05)


@contextlib.contextmanager
def staged_file(path: Path, mode: int = 0o600) -> Iterator[BinaryIO]:
    """A file to write that replaces `path` when the block ends: readers and crashes see the old content or the new."""
    import tempfile

    fd, temporary = tempfile.mkstemp(prefix=STAGING_PREFIX, dir=path.parent)
    try:
        with os.fdopen(fd, "wb") as stream:
            yield stream
            stream.flush()
            os.fchmod(stream.fileno(), mode)
            os.fsync(stream.fileno())
        os.rename(temporary, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
        raise
    fsync_directory(path.parent)


def write_file_atomically(path: Path, data: bytes, mode: int = 0o600) -> None:
    """Replace a small file so that readers and crashes see the old content or the new one."""
    with staged_file(path, mode) as stream:
        stream.write(data)


def open_regular(path: str, flags: int) -> int:
    """An `opener` for open() that takes nothing but regular files, and never waits for the other end of a pipe.

    Raises OSError, EINVAL for other files.
    """
    descriptor = os.open(path, flags | os.O_NONBLOCK | os.O_CLOEXEC)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "it is not a regular file", path)
    return descriptor


def copy_file_prefer_clone(source: Path, target: Path) -> None:
    """Copy a file by reflink where the filesystem can, else its data extents only, so that holes stay holes."""
    with open(source, "rb") as reader, open(target, "xb") as writer:
        mode = os.fstat(reader.fileno()).st_mode & 0o777
        if not clone_file(reader.fileno(), writer.fileno()):
            _copy_extents(reader.fileno(), writer.fileno())
        os.fchmod(writer.fileno(), mode)


def write_at(descriptor: int, data: bytes | memoryview, offset: int) -> None:
    """Write all of `data` at a place of an open file: the system takes less when the disk is nearly full, say."""
    view = memoryview(data)
    while view:
        written = os.pwrite(descriptor, view, offset)
        view, offset = view[written:], offset + written


def clone_file(reader: int, writer: int) -> bool:
    """Let an empty open file share the blocks of another; False where the filesystem cannot."""
    try:
        fcntl.ioctl(writer, _FICLONE, reader)
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.ENOTTY, errno.EXDEV, errno.EINVAL, errno.ENOSYS):
            raise
        return False
    return True


def data_extents(file: int) -> Iterator[tuple[int, int]]:
    """Where an open file has data, as (start, end) in order; between them are holes (lseek(2), SEEK_DATA)."""
    end = 0
    while True:
        try:
            start = os.lseek(file, end, os.SEEK_DATA)
            end = os.lseek(file, start, os.SEEK_HOLE)
        except OSError as error:
            if error.errno == errno.ENXIO:  # only a hole is left
                return
            raise
        yield start, end


def _copy_extents(reader: int, writer: int) -> None:
    os.ftruncate(writer, os.fstat(reader).st_size)
    for start, end in data_extents(reader):
        os.lseek(reader, start, os.SEEK_SET)
        os.lseek(writer, start, os.SEEK_SET)
        while start < end:
            copied = os.sendfile(writer, reader, None, min(end - start, 1 << 30))
            if copied == 0:
                return
            start += copied


def copy_dir_contents(source: Path, target: Path, copy: Callable[[Path, Path], None] = copy_file_prefer_clone) -> None:
    """Copy what is in the directory `source`, never that directory itself, into `target`, which is made when missing.

    Regular files are copied by `copy`; new directories get the source's modes without setuid, setgid and sticky bits;
    symbolic links, which are not followed, and special files are left out. Raises OSError, FileExistsError for a file
    that is there already.
    """
    with os.scandir(source) as found:  # whole, before `target` is made: that may lie in `source`
        inside = list(found)
    try:
        target.mkdir(mode=0o700)
        made = True
    except FileExistsError:
        if target.is_symlink() or not target.is_dir():
            raise
        made = False
    for entry in inside:
        if entry.is_dir(follow_symlinks=False):
            copy_dir_contents(source / entry.name, target / entry.name, copy)
        elif entry.is_file(follow_symlinks=False):
            copy(source / entry.name, target / entry.name)
    if made:
        # last: the directory may be one that cannot be written
        target.chmod(source.stat().st_mode & 0o777)


def link_or_copy(source: Path, target: Path) -> None:
    """Give `target` the content of `source` for good: a hard link, else a reflink, else a copy."""
    try:
        os.link(source, target)
    except OSError as error:
        if error.errno not in (errno.EXDEV, errno.EPERM, errno.EMLINK, errno.EOPNOTSUPP):
            raise
        copy_file_prefer_clone(source, target)


def bind_unix(path: Path, mode: int = 0o600) -> socket.socket:
    """A listening Unix stream socket at `path`, however long the path is (sun_path holds 108 bytes, unix(7))."""
    directory = os.open(path.parent, os.O_PATH | os.O_DIRECTORY)
    try:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path)
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        # fchmod before bind decides the mode with which the name appears
        os.fchmod(listener.fileno(), mode)
        listener.bind(f"/proc/self/fd/{directory}/{path.name}")
        os.chmod(path, mode)
        listener.listen(128)
        return listener
    finally:
        os.close(directory)


def connect_unix(path: Path, timeout: float | None = None) -> socket.socket:
    """Connect to a Unix stream socket, however long its path is; a symbolic link, which a VMM could make, is none."""
    found = os.open(path, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        client = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        client.settimeout(timeout)
        try:
            client.connect(f"/proc/self/fd/{found}")
        except BaseException:
            client.close()
            raise
        return client
    finally:
        os.close(found)


def allocated_bytes(path: Path) -> int:
    """What a file really takes on disk, holes not counted."""
    return path.stat().st_blocks * 512


def human_size(size: int) -> str:
    """A size for people, in the units that they ask for one in: 146 MiB, 1.5 GiB."""
    value = float(size)
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if value < 1023.95 or unit == "TiB":
            break
        value /= 1024
    return f"{value:.1f}".removesuffix(".0") + f" {unit}"


def counted(count: int, noun: str) -> str:
    """So many of something that takes an s: 1 layer, 2 layers."""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def nearest(name: str, candidates: list[str]) -> str:
    """The candidate that a mistyped name most likely meant, or ''."""
    import difflib

    # letters in the wrong order are a common mistake, and difflib makes nothing of them
    if swapped := [candidate for candidate in candidates if sorted(candidate) == sorted(name)]:
        return swapped[0]
    matches = difflib.get_close_matches(name, candidates, n=1, cutoff=0.5)
    return matches[0] if matches else ""


def without_latest(name: str) -> str:
    """The local or catalog's name that NAME:latest means; any other text as it is."""
    bare = name.removesuffix(":latest")
    return name if any(mark in bare for mark in "/:@") else bare


def validate_name(name: str, what: str) -> str:
    """Check a kernel, image or VM name (1 to NAME_MAX letters, digits, '.', '_', '-'); return it."""
    from banger.api.errors import BangerError, Code

    allowed = all(character.isascii() and (character.isalnum() or character in "._-") for character in name)
    if not (1 <= len(name) <= NAME_MAX and allowed and name[0].isalnum() and ".." not in name):
        raise BangerError(
            Code.INVALID,
            f"{name!r} is not a valid {what} name",
            hint=f"use 1 to {NAME_MAX} letters, digits, '.', '_' or '-', the first a letter or digit, without '..'",
        )
    return name
