"""The daemon's own log: what goes to standard error, in a file that is renamed to `<name>.1` at its cap."""

from __future__ import annotations

import logging
import os
import sys
import time
from pathlib import Path

CAP = 4 << 20


class LogFormatter(logging.Formatter):
    """Lines that begin with the time in UTC as events have it, RFC 3339."""

    converter = staticmethod(time.gmtime)
    default_time_format = "%Y-%m-%dT%H:%M:%S"
    default_msec_format = "%s.%03dZ"

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)s %(name)s: %(message)s")


class CappedHandler(logging.StreamHandler):  # type: ignore[type-arg]  # generic in the type stubs alone
    """Logs to standard error, and starts a new file whenever that is `path` and has reached the cap.

    Whoever starts the daemon opens the file; where its standard error is something else, nothing is ever renamed.
    """

    def __init__(self, path: Path, cap: int = CAP) -> None:
        super().__init__(sys.stderr)
        self._path = path
        self._cap = cap

    def emit(self, record: logging.LogRecord) -> None:
        super().emit(record)
        try:
            if self._is_full():
                self._rotate()
        except OSError:
            return  # a full disk: what comes later may fit again

    def _is_full(self) -> bool:
        descriptor = sys.stderr.fileno()
        open_file = os.fstat(descriptor)
        if open_file.st_size < self._cap:
            return False
        try:
            return os.path.samestat(open_file, self._path.stat())
        except FileNotFoundError:  # renamed already, but then the disk was full
            return self._path.with_name(f"{self._path.name}.1").exists()

    def _rotate(self) -> None:
        if self._path.exists():
            self._path.replace(self._path.with_name(f"{self._path.name}.1"))
        renewed = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        # standard output is the same file; commands that the daemon runs inherit neither
        for stream in (sys.stdout, sys.stderr):
            os.dup2(renewed, stream.fileno(), inheritable=True)
        os.close(renewed)
