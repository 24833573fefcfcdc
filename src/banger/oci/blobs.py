"""The cache of blobs that images are pulled from, shared by all of them: a file per digest, never one that is wrong."""

from __future__ import annotations

import contextlib
import os
import re
import threading
from collections import Counter
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from banger import system
from banger.api.errors import BangerError, Code
from banger.entries import sum_file
from banger.job import Job
from banger.oci.manifest import Descriptor

_POLL = 0.1  # seconds after which a cancellation is noticed


@dataclass(frozen=True)
class CachedBlob:
    """A blob in the cache: `digest` is "sha256:...", `used_at` in seconds since 1970; one `in_use` is never removed."""

    digest: str
    size: int
    used_at: float
    in_use: bool


class BlobCache:
    """The blobs in `directory`, at most `limit` bytes of them besides what is in use.

    One process works with a cache at a time; any number of its threads do.
    """

    def __init__(self, directory: Path, limit: int) -> None:
        self.directory = directory
        self._limit = limit
        self._lock = threading.Lock()
        self._held: Counter[str] = Counter()
        self._fetching: set[str] = set()
        self._fetched = threading.Condition(self._lock)

    @contextlib.contextmanager
    def held(self, digests: Collection[str]) -> Iterator[None]:
        """Keep blobs in the cache, also those that are yet to come, until the block ends; then it is trimmed."""
        with self._lock:
            self._held.update(digests)
        try:
            yield
        finally:
            with self._lock:
                self._held.subtract(digests)
                self._held += Counter()  # forgets what nobody holds
            with contextlib.suppress(BangerError):  # whatever is wrong with it, the block has what it wanted
                self.prune(self._limit)

    def open(self, descriptor: Descriptor) -> BinaryIO | None:
        """A blob that is there, None without; opened so that it can be read to its end whatever happens to its name."""
        path = self._path(descriptor.digest)
        try:
            stream = open(path, "rb", buffering=0, opener=system.open_regular)
        except OSError:
            return None
        if os.fstat(stream.fileno()).st_size != descriptor.size:
            stream.close()
            return None
        with contextlib.suppress(OSError):  # another user's, or on a filesystem that is read-only
            os.utime(path)
        return stream

    @contextlib.contextmanager
    def fetching(self, digest: str, job: Job) -> Iterator[None]:
        """Keep others from downloading the same blob: they wait here for the end of the block."""
        with self._fetched:
            while digest in self._fetching:
                job.check()
                self._fetched.wait(_POLL)
            self._fetching.add(digest)
        try:
            yield
        finally:
            with self._fetched:
                self._fetching.discard(digest)
                self._fetched.notify_all()

    @contextlib.contextmanager
    def writing(self, digest: str) -> Iterator[BinaryIO]:
        """A file to write a blob to, which the cache has when the block ends; nothing stays when that fails.

        It is not synced: what a power cut leaves of it is found out by its digest. Raises EXHAUSTED on a full disk.
        """
        self.directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        with system.staging(self.directory, digest[-12:]) as staged:
            with open(staged / "blob", "x+b", buffering=0) as file:
                yield file
            if self._path(digest).is_dir():  # a stray one
                system.remove_tree(self._path(digest))
            (staged / "blob").rename(self._path(digest))

    def blobs(self) -> list[CachedBlob]:
        """All blobs, the least recently used first; raises INVALID for a directory that cannot be read."""
        with self._lock:
            return sorted(self._scan(), key=lambda blob: (blob.used_at, blob.digest))

    def prune(self, keep: int) -> list[CachedBlob]:
        """Remove the least recently used blobs until `keep` bytes are left, never one in use; returns the removed.

        Raises INVALID where that cannot be done.
        """
        removed = []
        with self._lock:
            blobs = sorted(self._scan(), key=lambda blob: (blob.used_at, blob.digest))
            size = sum(blob.size for blob in blobs)
            for blob in blobs:
                if size <= keep:
                    break
                if not blob.in_use:
                    self._remove(blob.digest)
                    size -= blob.size
                    removed.append(blob)
        return removed

    def verify(self, digests: Collection[str], job: Job) -> list[str]:
        """Read blobs again and remove those that are not what their names say; returns the digests of these.

        Raises INVALID where they cannot be removed.
        """
        wrong = []
        for digest in digests:
            job.progress("verify", digest)
            try:
                actual = sum_file(self._path(digest), job)
            except FileNotFoundError:
                continue  # removed meanwhile
            except OSError:
                actual = ""  # not even a file
            if f"sha256:{actual}" != digest:
                self._remove(digest)  # who has it open reads on
                wrong.append(digest)
        return wrong

    def _path(self, digest: str) -> Path:
        return self.directory / digest.removeprefix("sha256:")

    def _remove(self, digest: str) -> None:
        try:
            system.remove_tree(self._path(digest))
        except OSError as error:
            raise self._unusable("written", error) from error

    def _unusable(self, done: str, error: OSError) -> BangerError:
        return BangerError(
            Code.INVALID,
            f"{self.directory} cannot be {done}: {error.strerror}",
            hint="it is a cache: remove it, and banger makes it anew",
        )

    def _scan(self) -> Iterator[CachedBlob]:
        """The blobs; what is none is left alone."""
        try:
            entries = list(os.scandir(self.directory))
        except FileNotFoundError:
            return
        except OSError as error:
            raise self._unusable("read", error) from error
        for entry in entries:
            if not re.fullmatch(r"[0-9a-f]{64}", entry.name) or not entry.is_file(follow_symlinks=False):
                continue
            digest = f"sha256:{entry.name}"
            with contextlib.suppress(FileNotFoundError):
                status = entry.stat(follow_symlinks=False)
                yield CachedBlob(digest, status.st_size, status.st_mtime, self._held[digest] > 0)


def no_space(directory: Path) -> BangerError:
    """The error for a disk that has no room for downloads."""
    return BangerError(
        Code.EXHAUSTED,
        f"not enough disk space in {directory} for what is downloaded",
        hint="free some: 'banger image cache prune', 'banger image prune', 'banger vm prune'",
    )
