"""Builds Debian images with mmdebstrap, streamed straight into squashfs, as root or in a user namespace."""

from __future__ import annotations

import contextlib
import functools
import os
import platform
import pwd
import selectors
import subprocess
import tempfile
import time
from collections.abc import Iterator
from importlib import resources
from pathlib import Path
from typing import IO, BinaryIO, cast

from banger import system
from banger.api.errors import BangerError, Code
from banger.catalogs.format import origin_of
from banger.debian import KEYRING, Mirror, archive_failed
from banger.hostpackages import Use
from banger.imagecat.build import Publishing, build_image
from banger.imagecat.catalog import CatalogEntry, revision
from banger.imagecat.manifest import ImageManifest
from banger.job import Job, require_tools
from banger.vmm.detect import host_arch

_MACHINES = {"amd64": "x86_64", "arm64": "aarch64"}  # uname -m
# As root mmdebstrap mounts /proc, /sys and more in the host's own namespace and leaves them there when killed; in a
# namespace of its own they go with it, and so do all of its processes. Without root it makes one itself.
_ISOLATED = ("unshare", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc")
_INSIDE = ("mmdebstrap", "--unshare-helper")  # runs a command in such a namespace
_BINFMT = Path("/proc/sys/fs/binfmt_misc")
_LOG_LIMIT = 1 << 20  # bytes
_REMOVAL_TRIES = 100  # at intervals of 50 ms
_NO_SECURITY_ARCHIVE = ("sid", "unstable", "experimental")


def pull_debian(
    images_dir: Path,
    entry: CatalogEntry,
    job: Job,
    *,
    mirror: Mirror,
    name: str | None = None,
    kernel: Path | None = None,
    replace: bool = False,
    publishing: Publishing = contextlib.nullcontext,
) -> ImageManifest:
    """Build the catalog's `entry` from Debian's archive at `mirror`, signatures checked, as the image `name`.

    SOURCE_DATE_EPOCH in the environment bounds the time stamps (reproducible-builds.org). Raises MISSING_TOOL or
    UNSUPPORTED when this host or user cannot build it, DOWNLOAD when mmdebstrap fails, and what `build_image` raises.
    """
    check_host(entry.arch)
    return build_image(
        images_dir,
        name or entry.name,
        job,
        functools.partial(_bootstrap, images_dir, entry, mirror, job),
        label=f"the {entry.suite} image",
        source=f"debian:{entry.suite}",
        origin=origin_of(entry),
        revision=revision(entry),
        kernel=kernel,
        replace=replace,
        publishing=publishing,
    )


def mmdebstrap_command(entry: CatalogEntry, mirror: Mirror) -> list[str]:
    """The command that writes the tree of `entry` as a tar archive to its standard output."""
    suites = [(mirror.main, entry.suite)]
    if mirror.security and entry.suite not in _NO_SECURITY_ARCHIVE:
        suites.append((mirror.security, f"{entry.suite}-security"))
    return [
        *([*_ISOLATED, "mmdebstrap", "--mode=root"] if os.geteuid() == 0 else ["mmdebstrap", "--mode=unshare"]),
        "--format=tar",
        f"--architectures={entry.arch}",
        f"--variant={entry.variant}",
        f"--include={','.join(entry.packages)}",
        '--aptopt=Acquire::Languages "none"',
        f"--customize-hook={resources.files(__package__).joinpath('customize.sh').read_text()}",
        entry.suite,
        "-",
        *(f"deb [signed-by={KEYRING}] {address} {suite} main" for address, suite in suites),
    ]


@contextlib.contextmanager
def _bootstrap(images_dir: Path, entry: CatalogEntry, mirror: Mirror, job: Job) -> Iterator[BinaryIO]:
    """Run mmdebstrap and give its standard output; raises its own error when it fails."""
    argv = mmdebstrap_command(entry, mirror)
    with (
        _build_directory(images_dir, job) as directory,
        tempfile.TemporaryFile() as log,
        # the users of the namespace may be unable to enter the working directory
        job.popen(argv, env=_environment() | {"TMPDIR": os.fspath(directory)}, cwd=Path("/")) as child,
    ):
        stdout, stderr = cast(BinaryIO, child.stdout), cast(IO[bytes], child.stderr)
        _report_until_output(stdout, stderr, log, job)

        def check_status() -> None:
            log.write(stderr.read(_LOG_LIMIT))
            if child.wait() != 0:
                job.check()
                log.seek(0)
                raise _failed(argv, child.returncode, log.read(_LOG_LIMIT), entry.suite)

        try:
            yield stdout
        except BangerError as error:
            # an archive that is cut off is the consequence; how mmdebstrap ended is the reason
            if error.code == Code.CORRUPT and not stdout.read(1):
                check_status()
            raise
        check_status()


def _report_until_output(stdout: BinaryIO, stderr: IO[bytes], log: IO[bytes], job: Job) -> None:
    """Pass on mmdebstrap's messages until it begins to write the archive, all its work done."""
    line = b""
    with selectors.DefaultSelector() as selector:
        selector.register(stdout, selectors.EVENT_READ)
        selector.register(stderr, selectors.EVENT_READ)
        while stdout not in (ready := [key.fileobj for key, _ in selector.select()]):
            assert ready == [stderr]
            data = os.read(stderr.fileno(), 1 << 16)
            if not data:
                return
            log.write(data)
            *lines, line = (line + data).split(b"\n")
            for text in lines:
                if text.startswith(b"I: ") and b"hook" not in text:
                    job.progress("bootstrap", text[3:].decode(errors="replace"))


@contextlib.contextmanager
def _build_directory(images_dir: Path, job: Job) -> Iterator[Path]:
    """Where mmdebstrap unpacks: a staging directory, so that nothing stays even when everything is killed.

    In a user namespace the files belong to subordinate users, who cannot enter the state directory and whose files
    only a namespace of the same kind can remove.
    """
    if os.geteuid() == 0:
        with system.staging(images_dir, "bootstrap") as directory:
            try:
                yield directory
            finally:
                _remove(directory)
        return
    directory = Path(tempfile.mkdtemp(prefix="banger-bootstrap-"))
    try:
        directory.chmod(0o711)
        yield directory
    finally:
        _remove(directory, [*_INSIDE, "rm", "--recursive", "--force"])


def _remove(directory: Path, inside: list[str] | None = None) -> None:
    """Delete a build directory, what is in it with the command `inside`; killed processes may still be ending in it."""
    for _ in range(_REMOVAL_TRIES):
        leftovers = [os.fspath(path) for path in directory.iterdir()] if inside else []
        if inside and leftovers:
            # not through the job: this has to happen after a cancellation too
            subprocess.run([*inside, *leftovers], env=_environment(), check=False, capture_output=True)
        system.remove_tree(directory)
        if not directory.exists():
            return
        time.sleep(0.05)


def check_host(arch: str) -> None:
    """Raise MISSING_TOOL or UNSUPPORTED with all that keeps this host and user from building images for `arch`."""
    if arch not in _MACHINES:
        raise BangerError(
            Code.INVALID, f"{arch!r} is no architecture of banger's images", hint=f"use {' or '.join(_MACHINES)}"
        )
    require_tools({Use.DEBIAN_IMAGE})
    machine = _MACHINES[arch]
    if platform.machine() != machine and not (_BINFMT / f"qemu-{machine}").exists():
        raise BangerError(
            Code.UNSUPPORTED,
            f"this host cannot run the {arch} programs that building a Debian image takes",
            hint="install qemu-user-static with binfmt support, or build the image on such a host and import it",
        )
    if os.geteuid() != 0:
        _check_subordinate_ids()


def try_namespace(job: Job) -> None:
    """Run a command that does nothing in the namespaces that mmdebstrap works in; raises what `check_host` does."""
    check_host(host_arch())
    job.run([*(_ISOLATED if os.geteuid() == 0 else _INSIDE), "true"], env=_environment(), code=Code.UNSUPPORTED)


def _check_subordinate_ids() -> None:
    """Without root, mmdebstrap needs a user namespace with many users (subuid(5), newuidmap(1))."""
    user = pwd.getpwuid(os.geteuid()).pw_name
    for file in (Path("/etc/subuid"), Path("/etc/subgid")):
        try:
            owners = [line.partition(":")[0] for line in file.read_text().splitlines()]
        except OSError:
            owners = []
        if user not in owners:
            raise BangerError(
                Code.UNSUPPORTED,
                f"{user} has no subordinate ids in {file}, which building a Debian image without root takes",
                hint=f"run 'sudo usermod --add-subuids 100000-165535 --add-subgids 100000-165535 {user}'",
            )


def _failed(argv: list[str], status: int, output: bytes, suite: str) -> BangerError:
    # what failed says so right before mmdebstrap's first complaint, which may repeat the whole hook
    before, mark, after = output.partition(b"\nE:")
    return archive_failed(argv, status, output, before + mark + after.partition(b"\n")[0], suite)


def _environment() -> dict[str, str]:
    """The caller's, which may name proxies; with the directories of system tools, which users often lack."""
    return {**os.environ, "PATH": f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin", "LC_ALL": "C"}
