"""Builds banger's wheels and source distribution, the same bytes for the same sources and tools."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import build_agent

ROOT = Path(__file__).resolve().parent.parent
DIST = ROOT / "dist"


def source_date() -> int:
    """The time that everything in a package gets: $SOURCE_DATE_EPOCH, else that of the last commit (Unix time)."""
    given = os.environ.get("SOURCE_DATE_EPOCH")
    return int(given or _git("log", "-1", "--format=%ct"))


@contextlib.contextmanager
def sources() -> Iterator[Path]:
    """A copy of the source tree without anything that was built in it, gone afterwards."""
    with tempfile.TemporaryDirectory(prefix="banger-sources-") as directory:
        for name in _git("ls-files", "-z", "--cached", "--others", "--exclude-standard").split("\0"):
            if name and (ROOT / name).is_file():  # not what was deleted and is not committed yet
                (Path(directory) / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(ROOT / name, Path(directory) / name)
        yield Path(directory)


def build_wheel(source: Path, arch: str, target: Path) -> Path:
    """Build the wheel for amd64 or arm64 into the directory `target`; returns the file."""
    if build_agent.system_compiler(arch) is None and importlib.util.find_spec("ziglang") is None:
        subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", build_agent.ZIGLANG], check=True)
    return _build(source, "wheel", target, {"BANGER_ARCH": arch})


def build_sdist(source: Path, target: Path) -> Path:
    """Build the source distribution into the directory `target`; returns the file."""
    return _build(source, "sdist", target, {})


def _build(source: Path, kind: str, target: Path, variables: dict[str, str]) -> Path:
    environment = {**os.environ, "SOURCE_DATE_EPOCH": str(source_date()), **variables}
    target.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".building-", dir=target) as directory:
        command = [sys.executable, "-m", "hatchling", "build", "--target", kind, "--directory", directory]
        subprocess.run(command, cwd=source, env=environment, check=True, stdout=sys.stderr)
        (made,) = Path(directory).iterdir()
        return made.rename(target / made.name)


def _git(*arguments: str) -> str:
    return subprocess.run(["git", "-C", ROOT, *arguments], check=True, stdout=subprocess.PIPE, text=True).stdout
