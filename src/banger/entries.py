"""Entries of the local catalogs: a directory per kernel or image, valid when its manifest.json is."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal, TypeVar

from banger import system
from banger.api.errors import BangerError, Code
from banger.job import Job

MANIFEST = "manifest.json"

_MANIFEST_LIMIT = 1 << 20  # bytes

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


def load(entry: Path, kind: Kind, parse: Callable[[bytes], M], name: str = "") -> M:
    """The manifest of one entry; raises CORRUPT when there is none, `parse` refuses it or it is another entry's.

    `name` is what it must be called, '' for what its directory is called.
    """
    try:
        with open(entry / MANIFEST, "rb") as stream:
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
        return load_entry(entry)
    except BangerError as error:
        raise BangerError(
            Code.CORRUPT,
            f"the {kind} {name!r} is broken: {error.message}",
            hint=error.hint or f"pull or import it again with --force, or remove it with 'banger {kind} rm {name}'",
        ) from error


def read_all(catalog: Path, load_entry: Callable[[Path], M]) -> tuple[list[M], list[BrokenEntry]]:
    """All entries by name, and the directories that are not usable."""
    good: list[M] = []
    broken: list[BrokenEntry] = []
    for name in _names(catalog):
        try:
            good.append(load_entry(catalog / name))
        except BangerError as error:
            broken.append(BrokenEntry(name, error.message))
    return good, broken


def write(entry: Path, manifest: Manifest) -> None:
    """Write the manifest into the (staged) directory of its entry."""
    system.write_file_atomically(entry / MANIFEST, manifest.to_json().encode(), mode=0o644)


def delete(catalog: Path, kind: Kind, name: str) -> None:
    """Remove an entry, broken or not; raises NOT_FOUND with the nearest name."""
    system.remove_entry(_find(catalog, kind, name))


def sum_file(file: Path, job: Job) -> str:
    """The SHA-256 of a file in hexadecimal."""
    digest = hashlib.sha256()
    with open(file, "rb", buffering=0) as stream:
        while chunk := stream.read(1 << 20):
            job.check()
            digest.update(chunk)
    return digest.hexdigest()


def _find(catalog: Path, kind: Kind, name: str) -> Path:
    system.validate_name(name, kind)
    entry = catalog / name
    if entry.is_dir():
        return entry
    near = system.nearest(name, _names(catalog))
    hint = f"did you mean {near!r}?" if near else f"see 'banger {kind} list' and 'banger {kind} list --available'"
    raise BangerError(Code.NOT_FOUND, f"there is no {kind} {name!r}", hint=hint)


def _names(catalog: Path) -> list[str]:
    if not catalog.is_dir():
        return []
    return sorted(entry.name for entry in os.scandir(catalog) if entry.is_dir() and not entry.name.startswith("."))
