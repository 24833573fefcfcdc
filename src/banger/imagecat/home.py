"""Tells where the home directory of an image's user is, without mounting the image."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import BinaryIO, cast

from banger.disk.work_seed import has_directory
from banger.job import Job

ROOT_HOME = "/root"

_PASSWD_LIMIT = 1 << 20
_HOME_LIMIT = 255  # bytes
# no home disk goes on top of these or below them; on or above those that follow none goes either
_SYSTEM = ("bin", "boot", "dev", "etc", "lib", "lib32", "lib64", "libx32", "proc", "run", "sbin", "sys", "tmp", "usr")
_SHARED = (
    "",
    "home",
    "media",
    "mnt",
    "opt",
    "srv",
    "var",
    "var/cache",
    "var/lib",
    "var/log",
    "var/mail",
    "var/run",
    "var/spool",
    "var/tmp",
)


def home_of(rootfs: Path, user: str, job: Job) -> str:
    """The directory that home disks of an image belong on: that of its user, a name or uid with or without a group.

    ROOT_HOME for root, for a user without an entry in the image's /etc/passwd, and where the home is no directory of
    the user's own in the image.
    """
    name = user.partition(":")[0]
    if name in ("", "root", "0"):
        return ROOT_HOME
    home = _home_in(_read_passwd(rootfs, job), name)
    return home if home and has_directory(rootfs, home, job) else ROOT_HOME


def _home_in(passwd: bytes, user: str) -> str:
    """The home that a passwd(5) file gives a user, a name before a number, as the agent looks it up; '' without one."""
    found = ""
    for line in passwd.decode(errors="replace").splitlines():
        entry = line.split(":")
        if len(entry) < 7 or user not in (entry[0], entry[2]):
            continue
        if entry[0] == user:
            return usable(entry[5])
        found = found or usable(entry[5])
    return found


def usable(home: str) -> str:
    """A home directory as a normalised path; '' for one that no disk may be mounted on."""
    parts = [part for part in home.split("/") if part not in ("", ".")]
    path = "/".join(parts)
    if not home.startswith("/") or ".." in parts or path in _SHARED or parts[0] in _SYSTEM:
        return ""
    return f"/{path}" if path.isprintable() and "\ufffd" not in path and len(path.encode()) < _HOME_LIMIT else ""


def _read_passwd(rootfs: Path, job: Job) -> bytes:
    argv: list[str | Path] = ["rdsquashfs", "--cat", "/etc/passwd", rootfs]
    with job.popen(argv, stderr=subprocess.DEVNULL) as child:
        return cast(BinaryIO, child.stdout).read(_PASSWD_LIMIT)
