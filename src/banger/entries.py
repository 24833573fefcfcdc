"""Entries of the local catalogs: a directory per kernel or image, valid when its manifest.json is."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Generic, Literal, TypeVar

from banger import system
from banger.api.errors import BangerError, Code
from banger.job import Job

MANIFEST = "manifest.json"

_MANIFEST_LIMIT = 4 << 20  # bytes: an image may have the 2 MiB of environment that Linux takes

Kind = Literal["image", "kernel"]


@dataclass(frozen=True)
class Manifest:
    """What every manifest says; `name` is that of the entry's directory."""

    name: str

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=2) + "\n"


@dataclass(frozen=True)
class BrokenEntry:
    """A directory of the catalog that nothing may use, and why."""

    name: str
    reason: str


M = TypeVar("M", bound=Manifest)
T = TypeVar("T")
_Mark = tuple[int, ...]


def load(entry: Path, kind: Kind, parse: Callable[[bytes], M], name: str = "") -> M:
    """The manifest of one entry; raises CORRUPT when there is none, `parse` refuses it or it is another entry's.

    `name` is what it must be called, '' for what its directory is called.
    """
    try:
        with open(entry / MANIFEST, "rb", opener=system.open_regular) as stream:
            text = stream.read(_MANIFEST_LIMIT)
    except OSError as error:
        raise BangerError(Code.CORRUPT, f"{MANIFEST} cannot be read: {error.strerror}") from error
    manifest = parse(text)
    if manifest.name != (name or entry.name):
        article = "an" if kind == "image" else "a"
        raise BangerError(Code.CORRUPT, f"{MANIFEST} belongs to {article} {kind} called {manifest.name!r}")
    return manifest


def read(catalog: Path, kind: Kind, name: str, load_entry: Callable[[Path], M]) -> M:
    """The manifest of a named entry, which `load_entry` reads and checks.

    Raises NOT_FOUND with the nearest name, CORRUPT when the entry is broken.
    """
    entry = _find(catalog, kind, name)
    try:
        manifest = steadily(entry, load_entry)
    except (BangerError, OSError) as error:
        hint = error.hint if isinstance(error, BangerError) else ""
        raise BangerError(
            Code.CORRUPT,
            f"the {kind} {name!r} is broken: {_reason(error)}",
            hint=hint or f"pull or import it again with --force, or remove it with 'banger {kind} rm {name}'",
        ) from error
    if manifest is None:
        raise _absent(catalog, kind, name)
    return manifest


def read_all(catalog: Path, load_entry: Callable[[Path], M]) -> tuple[list[M], list[BrokenEntry]]:
    """All entries by name, and the directories that are not usable."""
    return Listing(catalog, load_entry).read()


class Listing(Generic[T]):
    """Reads all entries of a catalog, and again only those that have changed: hundreds are listed often."""

    def __init__(self, catalog: Path, load_entry: Callable[[Path], T]) -> None:
        self._catalog = catalog
        self._load = load_entry
        self._known: dict[str, tuple[_Mark, T]] = {}

    def read(self) -> tuple[list[T], list[BrokenEntry]]:
        """What `load_entry` makes of the usable entries, by name, and the others with the reason."""
        known: dict[str, tuple[_Mark, T]] = {}
        broken: list[BrokenEntry] = []
        for name in names(self._catalog):
            try:
                item = steadily(self._catalog / name, self._read)
            except (BangerError, OSError) as error:
                broken.append(BrokenEntry(name, _reason(error)))
            else:
                if item is not None:
                    known[name] = item
        self._known = known
        return [value for _, value in known.values()], broken

    def _read(self, entry: Path) -> tuple[_Mark, T]:
        mark = _mark(entry)
        before = self._known.get(entry.name)
        return before if before is not None and before[0] == mark else (mark, self._load(entry))


def steadily(entry: Path, work: Callable[[Path], T]) -> T | None:
    """What `work` makes of the files of one entry, None once that is gone.

    It is done again when another entry took its place meanwhile: then it may have seen files of both, or missed some.
    """
    while True:
        try:
            # held open, so that no later directory has the same inode number
            held = os.open(entry, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        except (FileNotFoundError, NotADirectoryError):
            return None
        try:
            result = work(entry)
        except (BangerError, OSError):
            if _is_there(entry, held):
                raise
        else:
            if _is_there(entry, held):
                return result
        finally:
            os.close(held)


def _is_there(entry: Path, held: int) -> bool:
    try:
        return os.path.samestat(entry.stat(), os.fstat(held))
    except FileNotFoundError:
        return False


def _reason(error: BangerError | OSError) -> str:
    return error.message if isinstance(error, BangerError) else f"{error.filename} cannot be read: {error.strerror}"


def _mark(entry: Path) -> _Mark:
    """What changes with an entry: the files that it has, and its manifest, also when that is missing."""
    directory = entry.stat()
    try:
        manifest = (entry / MANIFEST).stat()
    except OSError:
        return (directory.st_ino, directory.st_mtime_ns)
    return (directory.st_ino, directory.st_mtime_ns, manifest.st_ino, manifest.st_mtime_ns, manifest.st_size)


def write(entry: Path, manifest: Manifest) -> None:
    """Write the manifest into the (staged) directory of its entry; raises CORRUPT for one too large to be read."""
    data = manifest.to_json().encode()
    if len(data) >= _MANIFEST_LIMIT:
        raise BangerError(
            Code.CORRUPT,
            f"the manifest of {manifest.name!r} would have {len(data):,} bytes, not below {_MANIFEST_LIMIT:,}",
        )
    system.write_file_atomically(entry / MANIFEST, data, mode=0o644)


def delete(catalog: Path, kind: Kind, name: str) -> None:
    """Remove an entry, broken or not; raises NOT_FOUND with the nearest name."""
    system.remove_entry(_find(catalog, kind, name))


def sum_file(file: Path, job: Job) -> str:
    """The SHA-256 of a file in hexadecimal."""
    digest = hashlib.sha256()
    with open(file, "rb", buffering=0, opener=system.open_regular) as stream:
        while chunk := stream.read(1 << 20):
            job.check()
            digest.update(chunk)
    return digest.hexdigest()


def _find(catalog: Path, kind: Kind, name: str) -> Path:
    system.validate_name(name, kind)
    entry = catalog / name
    if entry.is_dir():
        return entry
    raise _absent(catalog, kind, name)


def _absent(catalog: Path, kind: Kind, name: str) -> BangerError:
    near = system.nearest(name, names(catalog))
    hint = f"did you mean {near!r}?" if near else f"see 'banger {kind} list' and 'banger {kind} list --available'"
    return BangerError(Code.NOT_FOUND, f"there is no {kind} {name!r}", hint=hint)


def names(catalog: Path) -> list[str]:
    """The names of all entries, usable or not."""
    if not catalog.is_dir():
        return []
    # of a link that leads to itself DirEntry.is_dir raises an error
    return sorted(
        entry.name
        for entry in os.scandir(catalog)
        if not entry.name.startswith(".") and (entry.is_dir(follow_symlinks=False) or (catalog / entry.name).is_dir())
    )
