"""Roots of Debian's releases, made by mmdebstrap, in which commands run as they would on a host of that release.

    with fresh_root("trixie", directory) as root:
        root.run("apt-get --version")                # as root
        root.add_user("ada")
        root.run("id", user="ada")

Each command has namespaces of its own and leaves no process and no mount: see the script `enter` beside this file. The
kernel is this host's. Only root can make and enter them.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

from banger import hostpackages
from banger.debian import KEYRING, find_mirror

SOURCE = Path(__file__).parents[2]
_ENTER = Path(__file__).with_name("enter")
# what the README asks a fresh machine to have, and what lets apt and pip trust its hosts
_PACKAGES = "ca-certificates,git,make,python3,python3-pip"
_SECURITY = {"bookworm", "trixie"}  # releases; the next one has no archive of security updates yet
_TIMEOUT = 1200  # seconds that only a hang takes
# what tells where packages come from; the rest of this host's environment stays outside
_PASSED_ON = re.compile(r"PATH|LANG|PIP_(CERT|INDEX_URL|EXTRA_INDEX_URL|TRUSTED_HOST)|(https?|no)_proxy", re.IGNORECASE)


def host_release() -> str:
    """The code name of the release that this host runs, or ''."""
    return hostpackages.read_os_release().get("VERSION_CODENAME", "")


class Root:
    """A root directory that can be entered."""

    def __init__(self, directory: Path, cache: Path) -> None:
        self.directory = directory
        self._cache = cache

    def run(self, script: str, *, user: str = "root", timeout: float = _TIMEOUT) -> str:
        """Run a shell script to its end, which must be a success; what it wrote to both of its streams."""
        done = self.attempt(script, user=user, timeout=timeout)
        assert done.returncode == 0, f"{script}: status {done.returncode}\n{done.stdout}"
        return done.stdout

    def attempt(
        self, script: str, *, user: str = "root", timeout: float = _TIMEOUT
    ) -> subprocess.CompletedProcess[str]:
        """Run a shell script to its end."""
        variables = {name: value for name, value in os.environ.items() if _PASSED_ON.fullmatch(name)}
        command = ["bash", "-euo", "pipefail", "-c", f"cd\n{script}"]
        if user != "root":
            kept = ",".join([*variables, "PIP_CACHE_DIR"])
            command = ["su", "--login", user, "--whitelist-environment", kept, "-c", shlex.join(command)]
        return subprocess.run(
            [_ENTER, self.directory, *command],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            env={**variables, "BANGER_DISTRO_CACHE": str(self._cache)},
            timeout=timeout,
        )

    def add_user(self, name: str) -> None:
        """Make an ordinary user with a home directory."""
        self.run(f"useradd --create-home --shell /bin/bash {name}")

    def clone(self, home: str, owner: str = "root") -> None:
        """Put a clean clone of this source tree into a home directory: what is committed, and nothing else."""
        target = self.directory / home / "banger"
        subprocess.run(["git", "clone", "--quiet", "--no-hardlinks", SOURCE, target], check=True)
        self.run(f"chown -R {owner}: /{home}/banger")


@contextlib.contextmanager
def fresh_root(suite: str, directory: Path) -> Iterator[Root]:
    """The root of a release as it is right after its installation, in `directory` until the block ends."""
    cache = _cache()
    directory.mkdir()
    try:
        unpack = ["tar", "--extract", "--numeric-owner", "--xattrs", "--xattrs-include=*", f"--directory={directory}"]
        subprocess.run([*unpack, f"--file={_archive(suite, cache)}"], check=True)
        (cache / suite).mkdir(exist_ok=True)
        yield Root(directory, cache / suite)
    finally:
        shutil.rmtree(directory)


def _cache() -> Path:
    """What is kept for all test runs of this machine; raises PermissionError where somebody else has made it."""
    cache = Path(tempfile.gettempdir()) / f"banger-test-distros-{os.getuid()}"
    cache.mkdir(mode=0o755, exist_ok=True)
    if cache.lstat().st_uid != os.getuid():
        raise PermissionError(f"{cache} belongs to another user")
    return cache


def _archive(suite: str, cache: Path) -> Path:
    """The root of a release as a tar file, made once."""
    archive = cache / f"{suite}.tar"
    with open(cache / f"{suite}.lock", "wb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not archive.exists():
            unfinished = archive.with_suffix(".unfinished.tar")
            bootstrap(suite, str(unfinished), f"--include={_PACKAGES}")
            unfinished.rename(archive)
    return archive


def bootstrap(suite: str, target: str, *options: str) -> None:
    """Make the smallest Debian of a release with mmdebstrap, in namespaces that its mounts end with."""
    mirror = find_mirror()
    sources = [f"deb [signed-by={KEYRING}] {mirror.main} {suite} main"]
    if suite in _SECURITY and mirror.security:
        sources.append(f"deb [signed-by={KEYRING}] {mirror.security} {suite}-security main")
    isolated = ["unshare", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc"]
    command = [*isolated, "mmdebstrap", "--quiet", "--mode=root", "--variant=minbase", *options, suite, target]
    subprocess.run([*command, *sources], check=True)
