"""Standard streams that are closed, full or unreadable."""

from __future__ import annotations

import contextlib
import errno
import io
import os
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING

from banger.api.errors import BangerError, Code

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer

STDIN, STDOUT, STDERR = 0, 1, 2
_NAMES = ("standard input", "standard output", "standard error")


def complete() -> None:
    """Open what the caller has closed of standard input, output and error, before another file gets its number.

    Input is at its end. What is written to standard output fails with EBADF, as it does without a file, so that it is
    not lost unnoticed; what is written to standard error is lost.
    """
    for number, flags in ((STDIN, os.O_RDONLY), (STDOUT, os.O_RDONLY), (STDERR, os.O_WRONLY)):
        try:
            os.fstat(number)
        except OSError:
            os.set_inheritable(os.open(os.devnull, flags), True)  # gets the lowest number that is free: this one
    # Python has none for what was closed
    sys.stdin = sys.stdin or open(STDIN, closefd=False)
    sys.stdout = sys.stdout or open(STDOUT, "w", closefd=False)
    sys.stderr = sys.stderr or open(STDERR, "w", closefd=False)


def guard() -> None:
    """Let a failure of standard output be one clear error, and what cannot be written to standard error be lost."""
    for name, kind, number in (("stdout", _Output, STDOUT), ("stderr", _Error, STDERR)):
        given = getattr(sys, name)
        text = kind(
            open(number, "wb", closefd=False),
            encoding=given.encoding,
            errors="backslashreplace",
            line_buffering=given.line_buffering or given.write_through,
        )
        setattr(sys, name, text)


def settle() -> None:
    """Forget what could not be written: the interpreter's own flush at exit must not complain."""
    for stream, number in ((sys.stdout, STDOUT), (sys.stderr, STDERR)):
        try:
            stream.buffer.flush()
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), number)


def write(descriptor: int, data: ReadableBuffer) -> int:
    """As os.write, to standard output or error; raises as `writing` does."""
    with writing(descriptor):
        return os.write(descriptor, data)


@contextlib.contextmanager
def writing(descriptor: int) -> Iterator[None]:
    """Raise INVALID for what fails in the block, which writes to a standard stream, but a pipe that nobody reads."""
    try:
        yield
    except BrokenPipeError:
        raise
    except OSError as error:
        raise _refused("write to", descriptor, error) from error


def read(size: int) -> bytes:
    """Up to `size` bytes of standard input, none at its end; raises INVALID for what cannot be read."""
    try:
        return os.read(STDIN, size)
    except OSError as error:
        if error.errno == errno.EIO:  # a terminal that went away
            return b""
        raise _refused("read", STDIN, error) from error


def _refused(what: str, descriptor: int, error: OSError) -> BangerError:
    return BangerError(Code.INVALID, f"cannot {what} {_NAMES[descriptor]}: {error.strerror}")


class _Output(io.TextIOWrapper):
    def write(self, text: str) -> int:
        with writing(STDOUT):
            return super().write(text)

    def flush(self) -> None:
        with writing(STDOUT):
            super().flush()


class _Error(io.TextIOWrapper):
    def write(self, text: str) -> int:
        with contextlib.suppress(OSError):
            super().write(text)
        return len(text)

    def flush(self) -> None:
        with contextlib.suppress(OSError):
            super().flush()
