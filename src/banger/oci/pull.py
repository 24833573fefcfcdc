"""Downloads the layers of an image, several at once, and reads each while it still arrives."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import io
import os
import shutil
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, Protocol

from banger.api.errors import BangerError, Code
from banger.decompress import MAGIC_SIZE, chunks, compression
from banger.disk import tar
from banger.disk.tar import Pieces, TarReader
from banger.job import Job, Progress
from banger.oci.blobs import BlobCache, no_space
from banger.oci.manifest import Descriptor

if TYPE_CHECKING:
    from collections.abc import Generator

    from _typeshed import WriteableBuffer

UNPACKED_LIMIT = 64 << 30  # bytes of all layers together

_PARALLEL = 4  # downloads at once; registries limit them too
_POLL = 0.1  # seconds after which a cancellation is noticed
_STEP = 1 << 20
_RESERVE = 256 << 20  # bytes to leave free on the disk
_CHECK_EVERY = 32 << 20


class Blobs(Protocol):
    """Where blobs come from; see `oci.source`."""

    def blob(self, descriptor: Descriptor, label: str) -> Generator[bytes, None, None]: ...


class Blob:
    """A blob that is in the cache, or on its way there; it can be read from its beginning at once."""

    def __init__(self, descriptor: Descriptor, label: str) -> None:
        self.descriptor = descriptor
        self.label = label
        self.cached = False  # it was there before
        self._changed = threading.Condition()
        self._file: BinaryIO | None = None
        self._size = 0
        self._error: BaseException | None = None

    def opened(self, file: BinaryIO, size: int) -> None:
        """Read it from there from now on; `size` bytes are there already."""
        with self._changed:
            self._file, self._size = file, size
            self._changed.notify_all()

    def grown(self, count: int) -> None:
        with self._changed:
            self._size += count
            self._changed.notify_all()

    def failed(self, error: BaseException) -> None:
        with self._changed:
            self._error = self._error or error
            self._changed.notify_all()

    def close(self) -> None:
        if self._file is not None:
            self._file.close()

    def read(self, position: int, size: int, job: Job) -> bytes:
        """Up to `size` bytes, b"" at the end; waits for what is still to come, and raises what its download raised."""
        total = self.descriptor.size
        with self._changed:
            while self._size <= position < total and self._error is None:
                job.check()
                self._changed.wait(_POLL)
            if self._error is not None:
                raise self._error
            file, available = self._file, self._size
        if position >= total or file is None:
            return b""
        return os.pread(file.fileno(), min(size, available - position), position)


class _BlobReader(io.RawIOBase):
    """A blob as a file to read from its beginning."""

    def __init__(self, blob: Blob, job: Job) -> None:
        self._blob = blob
        self._job = job
        self._position = 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: WriteableBuffer, /) -> int:
        target = memoryview(buffer).cast("B")
        data = self._blob.read(self._position, len(target), self._job)
        target[: len(data)] = data
        self._position += len(data)
        return len(data)


class Total:
    """Makes one progress of those of several downloads; other stages pass as they are."""

    def __init__(self, job: Job, message: str) -> None:
        self._job = job
        self._message = message
        self._lock = threading.Lock()
        self._done: dict[str, int] = {}
        self._total = 0

    def begin(self, total: int) -> None:
        self._total = total

    def report(self, progress: Progress) -> None:
        if progress.stage != "download" or not self._total:
            self._job.progress(progress.stage, progress.message, progress.done, progress.total, progress.unit)
            return
        with self._lock:
            self._done[progress.message] = progress.done or 0
            done = sum(self._done.values())
        self._job.progress("download", self._message, min(done, self._total), self._total)


@contextlib.contextmanager
def downloading(
    source: Blobs, descriptors: Sequence[Descriptor], cache: BlobCache, part: Job, total: Total
) -> Iterator[list[Blob]]:
    """Blobs that come from the cache or else from `source`, in this order, a few at once, while the block runs.

    `part` is the job that `source` works with, whose progress goes to `total`; it is cancelled with the block.
    """
    count = len(descriptors)
    blobs = [Blob(descriptor, f"layer {number} of {count}") for number, descriptor in enumerate(descriptors, 1)]
    total.begin(sum(descriptor.size for descriptor in descriptors))
    # the same layer twice in one image waits for itself: it is read twice, but fetched once
    with ThreadPoolExecutor(_PARALLEL, "layer") as pool:
        try:
            for blob in blobs:
                pool.submit(_obtain, blob, blobs, source, cache, part)
            yield blobs
        finally:
            part.cancel()
            pool.shutdown(cancel_futures=True)
            for blob in blobs:
                blob.close()


def _obtain(blob: Blob, all_blobs: Sequence[Blob], source: Blobs, cache: BlobCache, part: Job) -> None:
    """Make a blob readable and complete it; whatever goes wrong is told to the readers of all."""
    descriptor = blob.descriptor
    try:
        with cache.fetching(descriptor.digest, part):
            there = cache.open(descriptor)
            if there is not None:
                blob.cached = True
                blob.opened(there, descriptor.size)
                part.progress("download", blob.label, descriptor.size, descriptor.size)
                return
            with cache.writing(descriptor.digest) as file:
                blob.opened(os.fdopen(os.dup(file.fileno()), "rb", buffering=0), 0)
                with contextlib.closing(source.blob(descriptor, blob.label)) as pieces:
                    _write(file, pieces, blob, cache.directory)
    except BaseException as error:  # noqa: BLE001 (raised again where the blobs are read)
        reason = _not_stored(cache.directory, error) if isinstance(error, OSError) else error
        for reading in all_blobs:
            reading.failed(reason)


def _not_stored(directory: Path, error: OSError) -> BangerError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return no_space(directory)
    return BangerError(Code.INVALID, f"{directory} cannot be written: {error.strerror}")


def _write(file: BinaryIO, pieces: Iterator[bytes], blob: Blob, directory: Path) -> None:
    # the last piece is held back until all have been checked: before, a reader could end with what is wrong
    unchecked, last = _CHECK_EVERY, b""
    for piece in pieces:
        blob.grown(len(last))
        unchecked += len(piece)
        if unchecked >= _CHECK_EVERY:
            unchecked = 0
            if shutil.disk_usage(directory).free < _RESERVE:
                raise no_space(directory)
        view = memoryview(piece)
        while view:
            view = view[file.write(view) :]
        last = piece
    blob.grown(len(last))


class Layer:
    """A layer's tar: opened as often as need be, its unpacked bytes checked by digest when it is read to its end."""

    def __init__(self, blob: Blob, diff_id: str, label: str, left: int) -> None:
        self.blob = blob
        self.diff_id = diff_id
        self.label = label
        self.unpacked = 0  # bytes, once it has been checked
        self._limit = left

    @contextlib.contextmanager
    def open(self, job: Job) -> Iterator[TarReader]:
        """Its members."""
        with contextlib.closing(self._pieces(job)) as pieces:
            yield self._reader(Pieces(pieces))

    @contextlib.contextmanager
    def checked(self, job: Job) -> Iterator[TarReader]:
        """Its members; raises CORRUPT at the end of the block when they are not those that the image was made of."""
        digest = hashlib.sha256()

        def hashed() -> Iterator[bytes]:
            for piece in self._pieces(job):
                digest.update(piece)
                self.unpacked += len(piece)
                yield piece

        stream = Pieces(hashed())
        yield self._reader(stream)
        while stream.skip(tar.CHUNK):
            if self.unpacked > self._limit:
                raise BangerError(Code.EXHAUSTED, f"{self.label} unpacks to more than {UNPACKED_LIMIT:,} bytes")
        if f"sha256:{digest.hexdigest()}" != self.diff_id:
            raise BangerError(
                Code.CORRUPT,
                f"{self.label} is not what its image was made of: it unpacks to sha256:{digest.hexdigest()}, "
                f"not {self.diff_id}",
                hint="the image was damaged or tampered with where it is published: ask its publisher",
            )

    def _reader(self, stream: Pieces) -> TarReader:
        # its digest tells a whole layer from one that is cut off, and some tools leave the end mark out
        return TarReader(stream, self.label, self._limit, end_mark=False)

    def _pieces(self, job: Job) -> Generator[bytes, None, None]:
        head = b""
        while len(head) < MAGIC_SIZE and (more := self.blob.read(len(head), MAGIC_SIZE - len(head), job)):
            head += more
        kind = compression(head)
        with io.BufferedReader(_BlobReader(self.blob, job), _STEP) as raw:
            if kind is not None:
                yield from chunks(raw, kind, concatenated=True, name=self.label)
            else:
                yield from iter(lambda: raw.read(_STEP), b"")
