"""Lets the source of a stream work in a thread of its own, a little ahead of whoever takes the stream."""

from __future__ import annotations

import contextlib
import queue
import threading
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor

from banger.api.errors import BangerError

_AHEAD = 16  # pieces


@contextlib.contextmanager
def read_ahead(pieces: Iterable[bytes]) -> Iterator[Iterator[bytes]]:
    """Take the pieces in a thread of their own, a few ahead of the block; it has ended when the block has."""
    ready: queue.Queue[bytes | None] = queue.Queue(_AHEAD)
    left = threading.Event()
    ended = False

    def take() -> None:
        try:
            for piece in pieces:
                ready.put(piece)
                if left.is_set():
                    break
        finally:
            ready.put(None)

    def arriving() -> Iterator[bytes]:
        nonlocal ended
        while not ended:
            piece = ready.get()
            if piece is not None:
                yield piece
            else:
                ended = True
                taken.result()

    with ThreadPoolExecutor(1, "read-ahead") as thread:
        taken = thread.submit(take)
        try:
            yield arriving()
        except BangerError:
            if ended and (error := taken.exception()):
                raise error from None  # not what became of it on its way through the decompressor
            raise
        finally:
            left.set()
            while not ended:
                ended = ready.get() is None
