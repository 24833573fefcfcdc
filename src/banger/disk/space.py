"""Tells when a disk is full, or about to be."""

from __future__ import annotations

import errno
import shutil
from pathlib import Path

RESERVE = 256 << 20  # bytes to leave free


def is_short(directory: Path) -> bool:
    """Whether the filesystem of a directory has no more free space than is to be left."""
    return shutil.disk_usage(directory).free < RESERVE


def means_full(error: OSError) -> bool:
    """Whether an error of the system says that no space is left, or no more is allowed."""
    return error.errno in (errno.ENOSPC, errno.EDQUOT)
