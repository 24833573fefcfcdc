"""A Debian that nobody has used yet: a root made by mmdebstrap, entered by pivot_root. Needs root."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from banger.debian import KEYRING, find_mirror

# git, make and python3 with pip are what README.md takes for given
_PACKAGES = ("ca-certificates", "git", "make", "python3", "python3-pip")
_CERTIFICATES = Path("/etc/ssl/certs/ca-certificates.crt")
# what tells where packages come from
_PASSED_ON = ("http_proxy", "https_proxy", "no_proxy", "PIP_CERT", "PIP_INDEX_URL", "PIP_TRUSTED_HOST")
# processes, mounts and the host's /dev and /sys, with which user namespaces and KVM work as outside; not so in a chroot
_ISOLATED = ("unshare", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc", "--ipc", "--uts")
_ENTER = """
set -eu
mount --bind "$1" "$1"
cd "$1"
shift
mount -t proc proc proc
mount --rbind /sys sys
mount --rbind /dev dev
mount -t tmpfs -o mode=755 run run
pivot_root . mnt
cd /
umount -l /mnt
exec "$@"
"""


@contextmanager
def clean_root(suite: str) -> Iterator[Path]:
    """The root directory of a small Debian of `suite`, with the package sources and certificates of this host."""
    with tempfile.TemporaryDirectory(prefix="banger-root-", dir="/var/tmp") as directory:
        root = Path(directory, "root")
        bootstrap(suite, os.fspath(root), *_PACKAGES)
        for file in ("/etc/resolv.conf", "/etc/hosts", _CERTIFICATES):
            shutil.copy(file, f"{root}{file}")
        yield root


def bootstrap(suite: str, target: str, *packages: str) -> None:
    """Make a Debian of `suite` with mmdebstrap; `target` is as mmdebstrap's."""
    mirror = find_mirror()
    sources = [f"deb [signed-by={KEYRING}] {mirror.main} {suite} main"]
    if mirror.security:
        sources.append(f"deb [signed-by={KEYRING}] {mirror.security} {suite}-security main")
    include = [f"--include={','.join(packages)}"] if packages else []
    argv = [*_ISOLATED, "mmdebstrap", "--quiet", "--mode=root", "--variant=minbase", *include, suite, target, *sources]
    subprocess.run(argv, check=True)


def enter(root: Path, *command: str) -> list[str]:
    """The command line that runs a command in a root; what it starts ends with it."""
    variables = {name: os.environ[name] for name in _PASSED_ON if name in os.environ}
    variables |= {"HOME": "/root", "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"}
    assignments = [f"{name}={value}" for name, value in variables.items()]
    return [*_ISOLATED, "sh", "-c", _ENTER, "enter", os.fspath(root), "env", "-i", *assignments, *command]


def run(root: Path, *command: str) -> None:
    """Run a command in a root, which must succeed."""
    subprocess.run(enter(root, *command), check=True)


def size(root: Path) -> int:
    """Bytes of disk that a root takes."""
    said = subprocess.run(["du", "-sxB1", root], check=True, stdout=subprocess.PIPE, text=True).stdout
    return int(said.split()[0])
