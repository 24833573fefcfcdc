"""Makes work-seeds, the ext4 files that home disks are cloned from, out of images; puts keys into them; repairs them.

All of it without root and without mounting, and no owner or mode of the image is ever given to a file of the host: the
tree is staged as plain files of this user, mke2fs packs it, and debugfs sets owners, modes, times and xattrs by inode.
"""

from __future__ import annotations

import os
import stat
import struct
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO, cast

from banger import system
from banger.api.errors import BangerError, Code
from banger.disk import debugfs, tar
from banger.disk.ext4 import BYTES_PER_INODE, make_ext4
from banger.job import Job

# what prepared home disks are called: only others are looked at for a nested home, so that a ~/root of the user stays
LABEL = "banger-home"

# the lines that the guest's agent knows as banger's own: agent/keys.c
MANAGED_BEGIN = b"# banger: the keys from here on are written by banger"
MANAGED_END = b"# banger: your own keys may follow"

# each machine copies its seed: a larger home is copied by the guest, from the image, when it first starts
SIZE_LIMIT = 1 << 30  # bytes of content
FILES_LIMIT = 2_000

_BLOCK = 4096
_LEAST = 128 << 20  # bytes of a seed, holes included
_SLACK = 64 << 20  # journal and inode tables
_XATTRS_LIMIT = 3072  # bytes, of one file: they share one block
_KEYS_LIMIT = 1 << 20
_PATH_MAX = 4096  # <linux/limits.h>
_FILE = {tar.REGULAR: stat.S_IFREG, tar.DIRECTORY: stat.S_IFDIR, tar.SYMLINK: stat.S_IFLNK}


class _TooLarge(Exception):
    """A home that makes no seed."""


@dataclass
class _Home:
    """The content of a home directory, in the directory `tree`: `members` without hard links, the root first."""

    tree: Path
    members: list[tar.Member] = field(default_factory=list)
    directories: set[bytes] = field(default_factory=set)
    files: set[bytes] = field(default_factory=set)
    size: int = 0  # bytes of blocks


def make_work_seed(rootfs: Path, home: str, target: Path, keys: Sequence[str], job: Job) -> bool:
    """Make the new ext4 file `target` with the content of the directory `home` (absolute) of a squashfs.

    Owners, modes, times, links and xattrs are kept; devices, fifos and sockets are left out. Without such a directory
    it is an empty one of root's, mode 0700. `keys` are as for `write_seed_keys`. False, and no file, for a home above
    SIZE_LIMIT or FILES_LIMIT. Raises CORRUPT for a damaged squashfs, EXHAUSTED without disk space.
    """
    with system.staging(target.parent, "home") as staged:
        tree = staged / "tree"
        tree.mkdir()
        content = _Home(tree)
        try:
            if has_directory(rootfs, home, job):
                _unpack(rootfs, home, content, job)
            else:
                content.members.append(tar.Member(b"", tar.DIRECTORY, 0o700, 0, 0, 0))
            commands = _xattr_commands(content, staged)
        except _TooLarge:
            return False
        # each file carries its number as its time stamp: so it is found again as an inode
        for number, member in enumerate(content.members):
            os.utime(_place(content, member.path), (number, number), follow_symlinks=False)
        seed = staged / "seed"
        size = max(_LEAST, _SLACK + content.size * 5 // 4 + len(content.members) * BYTES_PER_INODE)
        make_ext4(seed, -(-size // (16 << 20)) * (16 << 20), LABEL, job, tree)
        inodes = _inodes(seed, len(content.members))
        if len(inodes) != len(content.members):
            raise BangerError(Code.CORRUPT, f"mke2fs left out files of {home} in {rootfs}")
        lines = [line for number, member in enumerate(content.members) for line in _inode_lines(inodes[number], member)]
        lines += [f"ea_set -f {file} <{inodes[number]}> {name}" for number, name, file in commands]
        debugfs.change(seed, lines, job, cwd=staged)
        if keys:
            write_seed_keys(seed, keys, job)
        seed.rename(target)
    return True


def has_directory(rootfs: Path, path: str, job: Job) -> bool:
    """Whether there is a directory, not a link to one, at a path of a squashfs."""
    with job.popen(["rdsquashfs", "--stat", path, rootfs], stderr=subprocess.DEVNULL) as child:
        output = cast(BinaryIO, child.stdout).read(4096)
    # the first such line: the target of a link, which comes after it, may hold another
    return b"directory" in next((line for line in output.split(b"\n") if line.startswith(b"Inode type:")), b"")


def _unpack(rootfs: Path, home: str, content: _Home, job: Job) -> None:
    prefix = os.fsencode(home.strip("/"))
    # --keep-as-dir: without it sqfs2tar 1.2 loses all that is in the directory
    argv: list[str | Path] = ["sqfs2tar", "--keep-as-dir", "--subdir", home.strip("/"), rootfs]
    with job.popen(argv, stderr=subprocess.DEVNULL) as child:
        reader = tar.TarReader(cast(BinaryIO, child.stdout), str(rootfs), 2 * SIZE_LIMIT)
        for number, member in enumerate(reader):
            if number % 1000 == 0:
                job.check()
            if member.path == prefix or member.path.startswith(prefix + b"/"):
                member.path = member.path[len(prefix) + 1 :]
                member.link = member.link[len(prefix) + 1 :] if member.kind == tar.HARD_LINK else member.link
                _stage(member, reader, content)
        if child.wait() != 0 or not content.members:
            raise BangerError(Code.CORRUPT, f"{home} in {rootfs} cannot be read")


def _stage(member: tar.Member, reader: tar.TarReader, content: _Home) -> None:
    """Make a file in the staged tree, below directories that were made here and are no links."""
    content.size += -(-member.size // _BLOCK) * _BLOCK + _BLOCK
    if content.size > SIZE_LIMIT or len(content.members) >= FILES_LIMIT:
        raise _TooLarge
    place, parent = _place(content, member.path), member.path.rpartition(b"/")[0]
    if len(os.fsencode(place)) >= _PATH_MAX:
        raise _TooLarge
    if member.path and parent not in content.directories:
        raise BangerError(
            Code.CORRUPT, f"the home directory of the image has a file below what is no directory: {member.path!r}"
        )
    if member.kind == tar.DIRECTORY:
        if member.path:
            place.mkdir(mode=0o700)
        content.directories.add(member.path)
    elif member.kind == tar.REGULAR:
        with open(place, "xb") as file:
            for chunk in reader.data():
                file.write(chunk)
        content.files.add(member.path)
    elif member.kind == tar.SYMLINK:
        place.symlink_to(os.fsdecode(member.link))
    elif member.kind == tar.HARD_LINK:
        if member.link in content.files:
            os.link(_place(content, member.link), place)
        return
    else:
        return
    content.members.append(member)


def _place(content: _Home, path: bytes) -> Path:
    return content.tree / os.fsdecode(path)


def _xattr_commands(content: _Home, staged: Path) -> list[tuple[int, str, str]]:
    """Number of the member, quoted name, and the file in `staged` with the value, of every extended attribute."""
    commands: list[tuple[int, str, str]] = []
    for number, member in enumerate(content.members):
        if sum(len(name) + len(value) for name, value in member.xattrs) > _XATTRS_LIMIT:
            raise _TooLarge
        for name, value in member.xattrs:
            word = debugfs.quoted(name)
            if word is None:
                raise _TooLarge
            file = f"xattr-{len(commands)}"
            (staged / file).write_bytes(value)
            commands.append((number, word, file))
    return commands


def _inode_lines(inode: int, member: tar.Member) -> list[str]:
    mode = _FILE[member.kind] | member.mode & 0o7777
    values = (("mode", f"0{mode:o}"), ("uid", member.uid), ("gid", member.gid), ("mtime", f"@{member.mtime}"))
    return [f"set_inode_field <{inode}> {name} {value}" for name, value in values]


def _inodes(disk: Path, count: int) -> list[int]:
    """The inodes of the root and of what has the modification times 1, 2 and so on below `count`, in this order.

    Of a filesystem that mke2fs has just made; its structures: Documentation/filesystems/ext4 of Linux.
    """
    found: dict[int, int] = {0: 2}
    with open(disk, "rb") as stream:
        stream.seek(1024)
        superblock = stream.read(1024)
        inodes = struct.unpack_from("<I", superblock)[0]
        per_group, size = struct.unpack_from("<I", superblock, 0x28)[0], struct.unpack_from("<H", superblock, 0x58)[0]
        wide = superblock[0x60] & 0x80  # INCOMPAT_64BIT
        descriptor = struct.unpack_from("<H", superblock, 0xFE)[0] if wide else 32
        stream.seek(_BLOCK)
        descriptors = stream.read(inodes // per_group * descriptor)
        for group in range(inodes // per_group):
            start = group * descriptor
            table = struct.unpack_from("<I", descriptors, start + 8)[0]
            if wide:
                table |= struct.unpack_from("<I", descriptors, start + 0x28)[0] << 32
            stream.seek(table * _BLOCK)
            data = stream.read(per_group * size)
            for index in range(per_group):
                time = struct.unpack_from("<I", data, index * size + 0x10)[0]
                if 0 < time < count:
                    found[time] = group * per_group + index + 1
    return [found[time] for time in sorted(found)]


def write_seed_keys(seed: Path, keys: Sequence[str], job: Job) -> None:
    """Put `keys` between banger's own lines of .ssh/authorized_keys in an ext4 file that holds a home directory.

    Other lines stay. What is in the way is replaced: nothing that a link names is read or written. Both belong to the
    owner of the home directory. The file is changed in place, so it must be one that nobody else uses. Raises CORRUPT
    when it cannot be changed.
    """
    home = debugfs.root(seed, job)
    commands: list[str] = []
    directory = debugfs.find(seed, "/.ssh", job)
    if directory is not None and not stat.S_ISDIR(directory.mode):
        commands.append("rm /.ssh")
        directory = None
    if directory is None:
        commands.append("mkdir /.ssh")
    file = debugfs.find(seed, "/.ssh/authorized_keys", job) if directory is not None else None
    old = b""
    reconnect = False
    if file is not None:
        if stat.S_ISREG(file.mode):
            old = debugfs.read(seed, file.number, _KEYS_LIMIT, job)
            if len(old) >= _KEYS_LIMIT:
                raise BangerError(Code.CORRUPT, f".ssh/authorized_keys in {seed} is larger than 1 MiB")
        # a directory is not empty, perhaps: e2fsck puts it into lost+found
        reconnect = stat.S_ISDIR(file.mode)
        commands.append(f"{'unlink' if reconnect else 'rm'} /.ssh/authorized_keys")
    new = replace_managed_lines(old, keys)
    commands += ["cd /.ssh", "write keys authorized_keys"]
    for path, mode in (("/.ssh", stat.S_IFDIR | 0o700), ("/.ssh/authorized_keys", stat.S_IFREG | 0o600)):
        values = (("mode", f"0{mode:o}"), ("uid", home.uid), ("gid", home.gid))
        commands += [f"set_inode_field {path} {name} {value}" for name, value in values]
    with system.staging(seed.parent, "keys") as staged:
        (staged / "keys").write_bytes(new)
        debugfs.change(seed, commands, job, cwd=staged)
    if reconnect:
        _check_filesystem(seed, job)
    _check_keys(seed, new, home, job)


def _check_keys(seed: Path, expected: bytes, home: debugfs.Inode, job: Job) -> None:
    directory = debugfs.find(seed, "/.ssh", job)
    file = debugfs.find(seed, "/.ssh/authorized_keys", job)
    if (
        directory is None
        or file is None
        or (directory.mode, directory.uid, directory.gid) != (stat.S_IFDIR | 0o700, home.uid, home.gid)
        or (file.mode, file.uid, file.gid) != (stat.S_IFREG | 0o600, home.uid, home.gid)
        or debugfs.read(seed, file.number, len(expected) + 1, job) != expected
    ):
        raise BangerError(
            Code.CORRUPT, f"the keys cannot be written into {seed}", hint=f"see what 'e2fsck -f {seed}' says"
        )


def replace_managed_lines(old: bytes, keys: Sequence[str]) -> bytes:
    """The lines of an authorized_keys file with `keys` as banger's own: as in the agent, agent/keys.c."""
    kept: list[bytes] = []
    managed = False
    for line in old.removesuffix(b"\n").split(b"\n") if old else []:
        managed = (managed or line == MANAGED_BEGIN) and line != MANAGED_END
        if not managed and line != MANAGED_END:
            kept.append(line)
    return b"".join(line + b"\n" for line in (*kept, MANAGED_BEGIN, *(key.encode() for key in keys), MANAGED_END))


def flatten_nested_work_home(disk: Path, job: Job) -> bool:
    """Repair a home disk in which the home was copied in as a directory `root`: its content moves to the top.

    Only when there is nothing else but an empty lost+found and a .ssh that banger has filled; on a disk that banger
    has made or repaired before, a directory `root` is the user's own. Owners, modes and all else stay, the home
    directory becomes what `root` was. The work is done on a copy that takes the disk's place when it is whole. True
    when there was something to repair; raises CORRUPT when the repair fails.
    """
    if _label(disk) == LABEL:
        return False
    found = _nested(disk, job)
    if found is None:
        return False
    nested, commands = found
    inside = debugfs.listing(disk, nested, job)
    with system.staging(disk.parent, "flatten") as staged:
        copy = staged / disk.name
        system.copy_file_prefer_clone(disk, copy)
        # the directory becomes the root itself, whatever the names in it; e2fsck mends what led to it and counts links
        commands += [
            f"copy_inode <{nested}> {debugfs.ROOT}",
            f"clri <{nested}>",
            f"set_super_value volume_name {LABEL}",
        ]
        debugfs.change(copy, commands, job)
        _check_filesystem(copy, job)
        after = debugfs.listing(copy, 2, job)
        if inside is not None and (after is None or not set(inside) <= set(after)):
            raise BangerError(Code.CORRUPT, f"the home in {disk} cannot be taken out of its directory 'root'")
        system.fsync_file(copy)
        copy.rename(disk)
        system.fsync_directory(disk.parent)
    return True


def _nested(disk: Path, job: Job) -> tuple[int, list[str]] | None:
    """The inode of the nested home and what removes all that is beside it; None when there is none."""
    top = debugfs.root(disk, job)
    entries = debugfs.listing(disk, top.number, job)
    if entries is None:
        return None
    names = {entry.split(b"/", 4)[4] for entry in entries}
    nested = debugfs.find(disk, "/root", job)
    if nested is None or not stat.S_ISDIR(nested.mode) or not names <= {b"root", b"lost+found", b".ssh"}:
        return None
    commands: list[str] = []
    for name in sorted(names - {b"root"}):
        where = f"/{name.decode()}"
        directory = debugfs.find(disk, where, job)
        if directory is None or not stat.S_ISDIR(directory.mode):
            return None
        inside = debugfs.listing(disk, directory.number, job)
        if inside != [] and not (name == b".ssh" and _only_managed(disk, inside, job)):
            return None
        commands += [*(["rm /.ssh/authorized_keys"] if inside else []), f"rmdir {where}"]
    return nested.number, commands


def _only_managed(disk: Path, entries: list[bytes] | None, job: Job) -> bool:
    """Whether a .ssh with these entries holds banger's own keys and nothing else."""
    file = debugfs.find(disk, "/.ssh/authorized_keys", job)
    if entries is None or len(entries) != 1 or file is None or not stat.S_ISREG(file.mode):
        return False
    text = debugfs.read(disk, file.number, _KEYS_LIMIT, job)
    return replace_managed_lines(text, ()) == replace_managed_lines(b"", ())


def prepare_home(disk: Path, keys: Sequence[str], job: Job) -> None:
    """Make a copy of somebody's work-seed fit for use: a nested home moves up, and the managed keys get in."""
    flatten_nested_work_home(disk, job)
    write_seed_keys(disk, keys, job)


def _label(disk: Path) -> str:
    with open(disk, "rb") as stream:
        stream.seek(1024 + 0x78)  # s_volume_name of the superblock
        return stream.read(16).rstrip(b"\0").decode(errors="replace")


def _check_filesystem(disk: Path, job: Job) -> None:
    """Let e2fsck mend a filesystem; raises CORRUPT when it cannot."""
    argv: list[str | Path] = ["e2fsck", "-fy", disk]
    with job.popen(argv, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as child:
        status = child.wait()
    if status > 1:  # 1: errors corrected, e2fsck(8)
        raise BangerError(Code.CORRUPT, f"e2fsck cannot mend {disk}: status {status}")
