"""The newest events on disk, so that the next daemon knows them: a JSON document a line, in two capped files.

Nothing is synced, and a full disk loses events: they tell what happened, and decide nothing. A line that is damaged, or
of another version's shape, is skipped.
"""

from __future__ import annotations

import json
import os
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from banger.api import models as m
from banger.api.codec import decode, encode
from banger.process import boot_id
from banger.vmm.recorder import CappedFile

CAP = 1 << 20  # bytes of each of the two files; several thousand events


@dataclass(frozen=True)
class _Line:
    """`elapsed` is CLOCK_BOOTTIME when it happened, in seconds, of the boot of the host that `boot` names."""

    boot: str
    elapsed: float
    event: m.VmEvent


class EventLog:
    """The files `path` and `<path>.1`; one daemon at a time writes them."""

    def __init__(self, path: Path, cap: int = CAP) -> None:
        self._path = path
        self._cap = cap
        self._boot = boot_id()
        self._directory = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        self._file: CappedFile | None = None

    def read(self, count: int) -> list[tuple[float, m.VmEvent]]:
        """The newest `count` events, the oldest first, each with the CLOCK_BOOTTIME of its age."""
        newest: deque[bytes] = deque(maxlen=count)
        for path in (self._path.with_name(f"{self._path.name}.1"), self._path):
            try:
                newest.extend(line for line in path.read_bytes().splitlines() if line)
            except OSError:
                continue
        return list(self._parsed(newest))

    def append(self, elapsed: float, event: m.VmEvent) -> None:
        """Write an event down, if that is possible."""
        line = json.dumps(encode(_Line(self._boot, elapsed, event))).encode() + b"\n"
        if self._file is None:
            try:
                self._file = CappedFile(self._directory, self._path.stem, self._cap)
            except OSError:
                return
            line = b"\n" + line  # the last daemon may have been killed within a line
        self._file.write(line)

    def close(self) -> None:
        """Let go of the files."""
        os.close(self._directory)
        if self._file is not None:
            os.close(self._file.file)

    def _parsed(self, lines: deque[bytes]) -> Iterator[tuple[float, m.VmEvent]]:
        elapsed, now = time.clock_gettime(time.CLOCK_BOOTTIME), time.time()
        for text in lines:
            try:
                line = decode(_Line, json.loads(text))
                # of an earlier boot only the wall clock tells the age
                age = now - datetime.fromisoformat(line.event.time).timestamp()
            except (ValueError, OverflowError, RecursionError):
                continue
            yield (line.elapsed if line.boot == self._boot else elapsed - max(0.0, age)), line.event
