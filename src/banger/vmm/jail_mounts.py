"""Puts the files of a VM into its jail and becomes the jailer: run as a script, which imports nothing of banger.

    jail_mounts.py ROOT UID FILES_JSON -- JAILER...

FILES_JSON lists `[source, name, writable]`: each is bind-mounted as `name` in ROOT, in a mount namespace of our own
that ends with the VMM, so that nothing is left to undo. There a file belongs to UID (an idmapped mount,
mount_setattr(2)), and what is not writable is read-only: on disk, owner and mode stay as they are, which may be those
of an image that many VMs share or of a file that is not banger's. Where the kernel or the filesystem cannot do that, a
writable file is linked and given to UID, and the others are copied. A directory is mounted as it is.
"""

import ctypes
import json
import os
import shutil
import sys
from pathlib import Path

# unshare(2), mount(2), open_tree(2), move_mount(2), mount_setattr(2); the numbers are those of all architectures
_CLONE_NEWNS, _CLONE_NEWUSER = 0x20000, 0x10000000
_MS_BIND, _MS_REC, _MS_PRIVATE = 0x1000, 0x4000, 0x40000
_OPEN_TREE, _MOVE_MOUNT, _MOUNT_SETATTR = 428, 429, 442
_AT_FDCWD, _AT_EMPTY_PATH, _OPEN_TREE_CLONE, _OPEN_TREE_CLOEXEC = -100, 0x1000, 1, 0o2000000
_MOVE_MOUNT_F_EMPTY_PATH = 4
_RDONLY, _NOSUID, _NODEV, _NOEXEC, _IDMAP = 0x1, 0x2, 0x4, 0x8, 0x100000

_libc = ctypes.CDLL(None, use_errno=True)


class MountAttributes(ctypes.Structure):
    """struct mount_attr of linux/mount.h."""

    _fields_ = (
        ("set", ctypes.c_uint64),
        ("clear", ctypes.c_uint64),
        ("propagation", ctypes.c_uint64),
        ("userns", ctypes.c_uint64),
    )


def main() -> None:
    root, uid = sys.argv[1], int(sys.argv[2])
    files: list[tuple[str, str, bool]] = json.loads(sys.argv[3])
    jailer = sys.argv[5:]
    check(_libc.unshare(_CLONE_NEWNS))
    check(_libc.mount(None, b"/", None, _MS_REC | _MS_PRIVATE, None))
    for source, name, writable in files:
        target = Path(root, name)
        if Path(source).is_dir():
            target.mkdir(mode=0o700)
            check(_libc.mount(os.fsencode(source), bytes(target), None, _MS_BIND, None))
            continue
        try:
            bind(Path(source), target, uid, writable)
        except OSError as error:
            print(f"{name} is not mounted: {error.strerror}", file=sys.stderr)
            target.unlink()
            hand_over(Path(source), target, uid, writable)
    try:
        os.execvp(jailer[0], jailer)
    except OSError as error:
        sys.exit(f"{jailer[0]}: {error.strerror}")


def bind(source: Path, target: Path, uid: int, writable: bool) -> None:
    """Mount one file so that it seems to belong to `uid`."""
    os.close(os.open(target, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC, 0o600))
    tree = check(_libc.syscall(_OPEN_TREE, _AT_FDCWD, bytes(source), _OPEN_TREE_CLONE | _OPEN_TREE_CLOEXEC))
    owner = source.stat()
    userns = mapping(owner.st_uid, owner.st_gid, uid)
    flags = _NOSUID | _NODEV | _NOEXEC | _IDMAP | (0 if writable else _RDONLY)
    attributes = MountAttributes(set=flags, userns=userns)
    size = ctypes.c_size_t(ctypes.sizeof(attributes))
    try:
        check(_libc.syscall(_MOUNT_SETATTR, tree, b"", _AT_EMPTY_PATH, ctypes.byref(attributes), size))
        check(_libc.syscall(_MOVE_MOUNT, tree, b"", _AT_FDCWD, bytes(target), _MOVE_MOUNT_F_EMPTY_PATH))
    finally:
        os.close(tree)
        os.close(userns)


def mapping(owner: int, group: int, uid: int) -> int:
    """A descriptor of a user namespace that shows what belongs to `owner` and `group` as belonging to `uid`."""
    ready, readied = os.pipe()
    wait, waited = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(waited)
        if _libc.unshare(_CLONE_NEWUSER) == 0:
            os.write(readied, b"x")
        os.close(readied)
        os.read(wait, 1)
        os._exit(0)
    os.close(readied)
    os.close(wait)
    try:
        if not os.read(ready, 1):
            raise OSError("no user namespace")
        for name, inside in (("uid_map", owner), ("gid_map", group)):
            with open(f"/proc/{child}/{name}", "w") as file:
                file.write(f"{inside} {uid} 1")
        return os.open(f"/proc/{child}/ns/user", os.O_RDONLY | os.O_CLOEXEC)
    finally:
        os.close(ready)
        os.close(waited)
        os.waitpid(child, 0)


def hand_over(source: Path, target: Path, uid: int, writable: bool) -> None:
    if writable:
        os.link(source, target)
    else:
        shutil.copyfile(source, target)
    os.chown(target, uid, uid)


def check(result: int) -> int:
    if result == -1:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return result


if __name__ == "__main__":
    try:
        main()
    except OSError as error:
        sys.exit(f"{error.strerror}: {error.filename}" if error.filename else error.strerror)
