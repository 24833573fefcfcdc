"""What the make-*-kernel scripts share: options, downloads, signatures, and a staged kernel that is never half done."""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import json
import os
import re
import signal
import sys
import textwrap
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.padding import PKCS1v15
from cryptography.hazmat.primitives.asymmetric.rsa import RSAPublicKey
from cryptography.hazmat.primitives.asymmetric.utils import Prehashed
from cryptography.hazmat.primitives.hashes import HashAlgorithm
from cryptography.hazmat.primitives.serialization import load_pem_public_key

from banger import download, system
from banger.api.errors import BangerError, Code
from banger.cli.errors import report_failure
from banger.cli.progress import Display
from banger.job import Job, Progress
from banger.kernelcat.manifest import is_version
from banger.kernelcat.packages import unpack
from banger.kernelcat.staged import METADATA, discover_paths
from banger.vmm.detect import host_arch

MANUAL = Path(__file__).resolve().parent.parent / "build" / "manual"

PACKAGE_LIMIT = 1 << 30  # bytes; a distribution's kernel with all modules has 150 MB


def options(distro: str, what: str, example: str) -> argparse.ArgumentParser:
    """A parser with the options that all make-*-kernel scripts have; `example` is what --help ends with."""
    parser = argparse.ArgumentParser(
        description=f"Stage {what} for 'banger kernel import NAME --from DIR'.",
        epilog=f"example:\n{textwrap.indent(textwrap.dedent(example).strip(), '  ')}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    default = MANUAL / f"{distro}-kernel"
    parser.add_argument(
        "--output", type=Path, default=default, metavar="DIR", help=f"where to (build/manual/{default.name})"
    )
    parser.add_argument("--arch", choices=("amd64", "arm64"), default=host_arch(), help="architecture (this host's)")
    return parser


def run(stage: Callable[[Job], Path | None]) -> int:
    """Call the function that stages a kernel and say where it is; errors become one line, signals clean up."""
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    try:
        with Display() as display:
            output = stage(Job(_reporter(display)))
    except BangerError as error:
        report_failure(error)
        return 1
    except OSError as error:
        report_failure(BangerError(Code.INVALID, f"{error.filename or 'the system'}: {error.strerror}"))
        return 1
    except KeyboardInterrupt:
        return 130
    if output is None:
        print("all that the kernel needs is there")
        return 0
    print(f"staged in {output}; import it with: banger kernel import NAME --from {output}")
    return 0


def _reporter(display: Display) -> Callable[[Progress], None]:
    """Bars on a terminal, else one line for each stage."""
    shown: list[str] = []

    def report(step: Progress) -> None:
        if sys.stderr.isatty():
            display.show("staging", step)
        elif shown[-1:] != [step.stage]:
            shown.append(step.stage)
            print(f"{step.stage} ...", file=sys.stderr)

    return report


@contextlib.contextmanager
def workspace(output: Path) -> Iterator[Path]:
    """A scratch directory beside `output`; what killed runs left there is removed first.

    Raises EXISTS when `output` is something else than a staged kernel.
    """
    if output.is_symlink() or (output.exists() and not (output / METADATA).is_file() and any(_entries(output))):
        raise BangerError(
            Code.EXISTS,
            f"{str(output)!r} exists and is no staged kernel, so it is not replaced",
            hint="choose another directory with --output",
        )
    output.parent.mkdir(parents=True, exist_ok=True)
    for leftover in output.parent.glob(f"{system.STAGING_PREFIX}{output.name}-{'?' * 8}"):  # as tempfile.mkdtemp does
        with contextlib.suppress(BlockingIOError), _locked(leftover):
            system.remove_tree(leftover)
    with system.staging(output.parent, output.name) as directory, _locked(directory):
        yield directory


@contextlib.contextmanager
def _locked(directory: Path) -> Iterator[None]:
    """Hold a lock on a directory, which ends with the process; raises BlockingIOError when another has it."""
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(fd)


def _entries(path: Path) -> list[Path]:
    return list(path.iterdir()) if path.is_dir() else [path]


def stage_packages(packages: Sequence[Path], work: Path, output: Path, distro: str, arch: str, job: Job) -> Path:
    """Unpack the packages of one kernel and publish it as `output`. Raises CORRUPT when they are not just that."""
    root = work / "root"
    for package in packages:
        found = unpack(package, root, work / "archive", job)
        if found is None or (work / "archive").exists():
            raise BangerError(Code.CORRUPT, f"{package.name} is no package of a kernel")
        if found.arch not in ("", arch):
            raise BangerError(Code.CORRUPT, f"{package.name} is for {found.arch}, not for {arch}")
    names = ", ".join(package.name for package in packages)
    parts = discover_paths(root, "")
    if parts.kernel is None:
        raise BangerError(Code.CORRUPT, f"there is no kernel in {names}")
    trees = [path.name for path in parts.modules.iterdir() if path.is_dir()] if parts.modules else []
    mark = parts.kernel.name.partition("-")[2]
    version = mark if mark in trees or not trees else trees[0]
    if (len(trees) > 1 and version != mark) or not is_version(version):
        raise BangerError(Code.CORRUPT, f"the files in {names} do not tell which version the kernel is")
    staged = work / "kernel"
    (staged / "boot").mkdir(parents=True)
    with open(parts.kernel, "rb") as kernel:
        name = "vmlinux" if kernel.read(4) == b"\x7fELF" else "vmlinuz"
    files = ((parts.kernel, name), (parts.initrd, "initrd.img"), (parts.config, "config"))
    for file, kind in files:
        if file:
            file.rename(staged / "boot" / f"{kind}-{version}")
    if parts.modules and trees:
        (staged / "lib/modules").mkdir(parents=True)
        (parts.modules / version).rename(staged / "lib/modules" / version)
    return publish(staged, output, distro, arch, version)


def publish(staged: Path, output: Path, distro: str, arch: str, version: str) -> Path:
    """Describe the kernel in `staged` by metadata.json, check that, and make it appear as `output`."""

    def relative(pattern: str) -> str:
        return next((path.relative_to(staged).as_posix() for path in staged.glob(pattern)), "")

    metadata = {
        "distro": distro,
        "arch": arch,
        "kernel_version": version,
        "kernel": relative(f"boot/vmlinu[xz]-{version}"),
        "initrd": relative(f"boot/initrd.img-{version}"),
        "modules": relative(f"lib/modules/{version}"),
    }
    (staged / METADATA).write_text(json.dumps(metadata, indent=2) + "\n")
    discover_paths(staged, version)
    system.publish(staged, output)
    return output


def fetch(url: str, target: Path, job: Job, *, size: int = 0, limit: int = PACKAGE_LIMIT, sha256: str = "") -> Path:
    """Download a file; raises DOWNLOAD, and CORRUPT when it has not this size or digest."""
    pieces = download.stream([url], job, label=target.name, size=size, limit=limit, sha256=sha256)
    with contextlib.closing(pieces), open(target, "xb") as output:
        for piece in pieces:
            output.write(piece)
    return target


def file_name(*parts: str) -> str:
    """The name of a file that an index of a repository names; raises CORRUPT for what is more than one name."""
    name = "".join(parts)
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9+._~-]{0,200}", name):
        raise BangerError(Code.CORRUPT, f"the index of the repository names the file {name[:80]!r}")
    return name


def public_key(pem: bytes, where: Path) -> RSAPublicKey:
    """The RSA key in a PEM file; raises INVALID."""
    try:
        key = load_pem_public_key(pem)
    except (ValueError, UnsupportedAlgorithm):
        key = None
    if not isinstance(key, RSAPublicKey):
        raise BangerError(Code.INVALID, f"{where} is not an RSA public key in PEM format")
    return key


def is_signed(key: RSAPublicKey, signature: bytes, data: bytes, algorithm: HashAlgorithm | Prehashed) -> bool:
    """Whether the key made this signature (PKCS #1 v1.5) of the data, or of the digest when that is prehashed."""
    try:
        key.verify(signature, data, PKCS1v15(), algorithm)
    except InvalidSignature:
        return False
    return True


def untrusted(what: str, keys: Path) -> BangerError:
    """The error for what no known key has signed."""
    return BangerError(
        Code.CORRUPT,
        f"{what} is not signed by a key in {str(keys)!r}",
        hint="give the distribution's keys with --keys, or --allow-untrusted if you trust the mirror and the way to it",
    )
