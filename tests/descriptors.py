"""What the descriptors of a process lead to."""

import contextlib
from pathlib import Path


def open_files(pid: int) -> set[str]:
    """What the descriptors of a process lead to, but for those that it closes meanwhile."""
    found: set[str] = set()
    for entry in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):
            found.add(str(entry.readlink()))
    return found
