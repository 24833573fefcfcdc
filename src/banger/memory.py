"""Gives memory that large work took back to the system, which Python and the C library would keep for the next."""

from __future__ import annotations

import ctypes
import gc
import os
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

A = TypeVar("A")
T = TypeVar("T")

_MUCH = 16 << 20  # bytes


def resident() -> int:
    """The memory of this process in bytes (statm in proc(5))."""
    return int(Path("/proc/self/statm").read_bytes().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def returned(work: Callable[[A], T], argument: A) -> T:
    """What `work` returns for its argument; the memory that it took and does not need any more is given back."""
    before = resident()
    try:
        return work(argument)
    except BaseException as error:
        # whoever hears of the error holds all that its functions had
        cause: BaseException | None = error
        while cause is not None:
            traceback.clear_frames(cause.__traceback__)
            cause = cause.__cause__ or cause.__context__
        raise
    finally:
        if resident() - before > _MUCH:
            gc.collect()  # empties the lists of freed objects as well, of which one alone holds 1 MiB
            if hasattr(libc := ctypes.CDLL(None), "malloc_trim"):  # glibc
                libc.malloc_trim(0)
