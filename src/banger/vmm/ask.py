"""What a program says of itself, such as its version, or shows when it is tried: found out once for each file it is."""

from __future__ import annotations

import functools
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

_SECONDS = 10.0
_Answer = TypeVar("_Answer")


def once_per_file(question: Callable[[str], _Answer]) -> Callable[[str], _Answer]:
    """Remember the answers of a function of a program's path until another file is there. Errors are not remembered.

    The function raises OSError where there is no program.
    """

    @functools.lru_cache(maxsize=64)
    def answer(path: str, file: tuple[int, ...]) -> _Answer:
        return question(path)

    @functools.wraps(question)
    def remembered(path: str) -> _Answer:
        return answer(path, _file(path))

    return remembered


def ask(path: str, argument: str, *more: str) -> str:
    """What the program prints for these arguments. Blocks unless it was asked before: not for the event loop.

    Raises OSError, or subprocess.SubprocessError when it fails or takes too long.
    """
    return _ask((path, argument, *more), _file(path))


def _file(path: str) -> tuple[int, ...]:
    found = Path(path).stat()
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns


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
