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
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, Protocol

from banger.api.errors import BangerError, Code
from banger.decompress import MAGIC_SIZE, PieceReader, chunks, compression
from banger.disk import tar
from banger.disk.tar import Pieces, TarReader
from banger.job import Job, Progress
from banger.oci.blobs import BlobCache, no_space
from banger.oci.manifest import Descriptor
from banger.oci.source import Environment, Source, open_source
from banger.readahead import read_ahead

if TYPE_CHECKING:
    from collections.abc import Generator

    from _typeshed import WriteableBuffer

UNPACKED_LIMIT = 64 << 30  # bytes of all layers together

_PARALLEL = 4  # downloads at once; registries limit them too
_POLL = 0.1  # seconds after which a cancellation is noticed
_STEP = 1 << 20
_RESERVE = 256 << 20  # bytes to leave free on the disk
_CHECK_EVERY = 32 << 20


class Readable(Protocol):
    """A blob that can be read from its beginning as often as need be."""

    def open(self, job: Job) -> io.RawIOBase:
        """Its content; raises what obtaining it raises."""


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

    def open(self, job: Job) -> io.RawIOBase:
        return _BlobReader(self, job)

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


@dataclass(frozen=True)
class LocalBlob:
    """A blob of a source on this host, which is read there."""

    source: Source
    descriptor: Descriptor
    label: str

    def open(self, job: Job) -> io.RawIOBase:
        return PieceReader(self.source.blob(self.descriptor, self.label))


class Total:
    """Makes one progress of those of several downloads; other stages pass as they are."""

    def __init__(self, job: Job, message: str) -> None:
        self._job = job
        self._message = message
        self._lock = threading.Lock()
        self._done: dict[str, int] = {}
        self._total = 0

    def begin(self, descriptors: Sequence[Descriptor]) -> None:
        """What is reported from now on is of these blobs."""
        self._total = sum(descriptor.size for descriptor in descriptors)

    def report(self, progress: Progress) -> None:
        if progress.stage != "download" or not self._total:
            self._job.progress(progress.stage, progress.message, progress.done, progress.total, progress.unit)
            return
        with self._lock:
            self._done[progress.message] = progress.done or 0
            done = sum(self._done.values())
        self._job.progress("download", self._message, min(done, self._total), self._total)


class DamagedCache(Exception):
    """Blobs in the cache were wrong; they are gone, and the pull has to begin again."""


@dataclass(frozen=True)
class Opened:
    """A source that works with the job `part`, whose progress goes to `total`; `label` names the image."""

    source: Source
    part: Job
    total: Total
    label: str


@contextlib.contextmanager
def opened(text: str, environment: Environment, job: Job) -> Iterator[Opened]:
    """What `open_source` opens, for the block."""
    total = Total(job, text)
    with job.part(total.report) as part, open_source(text, part, environment) as source:
        yield Opened(source, part, total, text)


def local(opened: Opened, descriptors: Sequence[Descriptor]) -> list[LocalBlob]:
    """The blobs of a source on this host."""
    opened.total.begin(descriptors)
    return [LocalBlob(opened.source, descriptor, label) for descriptor, label in _labelled(descriptors)]


@contextlib.contextmanager
def downloading(opened: Opened, descriptors: Sequence[Descriptor], cache: BlobCache) -> Iterator[list[Blob]]:
    """Blobs that come from the cache or else from the source, a few at once, while the block runs.

    The source's job is cancelled with the block.
    """
    blobs = [Blob(descriptor, label) for descriptor, label in _labelled(descriptors)]
    opened.total.begin(descriptors)
    with ThreadPoolExecutor(_PARALLEL, "layer") as pool:
        try:
            for blob in reversed(blobs):  # as onepass reads them
                pool.submit(_obtain, blob, blobs, opened.source, cache, opened.part)
            yield blobs
        finally:
            opened.part.cancel()
            pool.shutdown(cancel_futures=True)
            for blob in blobs:
                blob.close()


def _labelled(descriptors: Sequence[Descriptor]) -> list[tuple[Descriptor, str]]:
    count = len(descriptors)
    return [(descriptor, f"layer {number} of {count}") for number, descriptor in enumerate(descriptors, 1)]


def _obtain(blob: Blob, all_blobs: Sequence[Blob], source: Source, cache: BlobCache, part: Job) -> None:
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


@dataclass
class Budget:
    """How many bytes layers may still unpack to, all together."""

    left: int


class Layer:
    """A layer's tar, which can be opened as often as need be; `label` names it in errors."""

    def __init__(self, blob: Readable, diff_id: str, label: str, budget: Budget) -> None:
        self._blob = blob
        self._diff_id = diff_id
        self._label = label
        self._budget = budget

    @contextlib.contextmanager
    def open(self, job: Job) -> Iterator[TarReader]:
        """Its members; raises CORRUPT at the end of the block when they are not those that the image was made of."""
        digest = hashlib.sha256()

        def hashed(job: Job) -> Iterator[bytes]:
            for piece in self._pieces(job):
                job.check()
                digest.update(piece)
                self._budget.left -= len(piece)
                if self._budget.left < 0:
                    raise BangerError(Code.EXHAUSTED, f"with {self._label} more than {UNPACKED_LIMIT:,} bytes come out")
                yield piece

        with job.part() as part, read_ahead(hashed(part)) as pieces:
            try:
                stream = Pieces(pieces)
                yield TarReader(
                    # its digest tells a whole layer from one that is cut off, and some tools leave the end mark out
                    stream,
                    self._label,
                    UNPACKED_LIMIT,
                    end_mark=False,
                )
                while stream.skip(tar.CHUNK):
                    pass
            except BaseException:
                part.cancel()  # the reading thread may wait for a download that goes nowhere
                raise
        if f"sha256:{digest.hexdigest()}" != self._diff_id:
            raise BangerError(
                Code.CORRUPT,
                f"{self._label} is not what its image was made of: it unpacks to sha256:{digest.hexdigest()}, "
                f"not {self._diff_id}",
                hint="the image was damaged or tampered with where it is published: ask its publisher",
            )

    def _pieces(self, job: Job) -> Generator[bytes, None, None]:
        with self._blob.open(job) as raw:
            head = b""
            while len(head) < MAGIC_SIZE and (more := raw.read(MAGIC_SIZE - len(head))):
                head += more
            kind = compression(head)
            rest = io.BufferedReader(raw, _STEP)
            if kind is not None:
                yield from chunks(rest, kind, concatenated=True, name=self._label, head=head)
            else:
                yield head
                yield from iter(lambda: rest.read(_STEP), b"")
