"""Firecracker and its jailer on this host: where they are, and whether banger can work with their version."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from dataclasses import dataclass

from banger.api.errors import BangerError, Code
from banger.config import Config
from banger.reasons import in_words
from banger.vmm.ask import ask
from banger.vmm.detect import emulator, host_arch

# what the API client was written for: before 1.5 it lacks requests, and 2 may change any of them
OLDEST, NEWEST = (1, 5), (1, 99)
OLDEST_QEMU = (7, 2)  # has the stream network that passt is connected by
NO_JAILER = "off"  # what config.jailer says where Firecracker is to stay root


@dataclass(frozen=True)
class Program:
    """A program and its version, such as (1, 12, 1)."""

    path: str
    version: tuple[int, ...]

    def __str__(self) -> str:
        return f"{self.path} {'.'.join(map(str, self.version))}"


def firecracker(config: Config) -> Program:
    """The Firecracker to use. Raises BangerError: MISSING_TOOL, or UNSUPPORTED for a version out of the range."""
    return _find("firecracker", config.firecracker)


def jailer(config: Config) -> Program:
    """The jailer to use; raises as `firecracker` does."""
    return _find("jailer", config.jailer)


def wants_jailer(config: Config) -> bool:
    """Whether Firecracker runs in the jail of its jailer: as root, unless config.toml says otherwise."""
    return os.geteuid() == 0 and config.jailer != NO_JAILER


def look_up(config: Config, driver: str) -> None:
    """Have the programs of a driver asked for their versions before the event loop needs them; blocks.

    Raises as `firecracker` does; UNSUPPORTED for a QEMU that is too old.
    """
    if driver == "firecracker":
        firecracker(config)
        if wants_jailer(config):
            jailer(config)
    elif driver == "qemu":
        _check_qemu()


def _check_qemu() -> None:
    """One that is not there, or does not say its version, is for others to complain about."""
    path = shutil.which(emulator(host_arch()))
    if path is None:
        return
    try:
        found = re.search(r"version (\d{1,4})\.(\d{1,4})", ask(path, "--version"))
    except (OSError, subprocess.SubprocessError):
        return
    if found and (int(found[1]), int(found[2])) < OLDEST_QEMU:
        oldest = ".".join(map(str, OLDEST_QEMU))
        raise BangerError(
            Code.UNSUPPORTED,
            f"{path} has version {found[1]}.{found[2]}, and banger works with {oldest} and newer",
            hint="install a newer QEMU, or a newer release of the distribution",
        )


def _find(name: str, configured: str) -> Program:
    path = shutil.which(configured or name)
    if path is None:
        raise BangerError(
            Code.MISSING_TOOL,
            f"{configured} is not a program" if configured else f"{name} is not installed",
            hint=f'put a released {name} on PATH, or its path into config.toml: {name} = "/path/to/{name}"',
        )
    try:
        said = ask(path, "--version")
    except (OSError, subprocess.SubprocessError) as error:
        raise BangerError(Code.UNSUPPORTED, f"{path} cannot be run: {in_words(error)}") from error
    match = re.match(rf"{name} v(\d{{1,4}}(?:\.\d{{1,4}}){{1,3}})", said, re.IGNORECASE)
    if match is None:
        raise BangerError(Code.UNSUPPORTED, f"{path} does not say its version as {name} does: {said[:80]!r}")
    version = tuple(map(int, match[1].split(".")))
    if not OLDEST <= version[:2] <= NEWEST:
        raise BangerError(
            Code.UNSUPPORTED,
            f"{path} has version {match[1]}, and banger works with {OLDEST[0]}.{OLDEST[1]} to {NEWEST[0]}.{NEWEST[1]}",
            hint=f"install a newer {name}" if version[:2] < OLDEST else "upgrade banger",
        )
    return Program(path, version)
