"""What a program says of itself, such as its version: asked once for each file that it is."""

from __future__ import annotations

import functools
import subprocess
from pathlib import Path

_SECONDS = 10.0


def ask(path: str, argument: str, *more: str) -> str:
    """What the program prints for these arguments. Blocks unless it was asked before: not for the event loop.

    Raises OSError, or subprocess.SubprocessError when it fails or takes too long.
    """
    found = Path(path).stat()
    return _ask((path, argument, *more), (found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns))


@functools.lru_cache(maxsize=64)
def _ask(argv: tuple[str, ...], file: tuple[int, ...]) -> str:
    return subprocess.run(
        argv,
        capture_output=True,
        text=True,
        errors="replace",
        check=True,
        timeout=_SECONDS,
        stdin=subprocess.DEVNULL,
    ).stdout
