"""The user's further catalogs: added, refreshed and removed on disk, and merged with the embedded one."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
import stat
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Generic
from urllib.parse import urlsplit

from banger import download, entries, minisign, system
from banger.api.errors import BangerError, Code
from banger.catalogs.format import EMBEDDED, E, Format, is_http_url, updated_time
from banger.fields import Fields
from banger.job import Job

_CATALOG, _SOURCE = "catalog.json", "source.json"
_CATALOG_LIMIT = 16 << 20  # bytes
_SMALL_LIMIT = 64 << 10  # bytes, of source.json and of signatures


@dataclass(frozen=True)
class Origin:
    """A catalog: its own name, where it comes from, the minisign key that signs it ('': none), how many entries.

    `updated` is what it says of itself, `refreshed_at` when it was fetched; both are UTC, RFC 3339, or ''. `problem` is
    '' for one that can be used.
    """

    name: str
    location: str
    public_key: str
    entries: int = 0
    updated: str = ""
    refreshed_at: str = ""
    problem: str = ""


@dataclass(frozen=True)
class _Source:
    """What source.json holds."""

    location: str
    public_key: str
    refreshed_at: str


@dataclass(frozen=True)
class Catalogs(Generic[E]):
    """The catalogs of one noun: the embedded one, and those that the user added in `directory`."""

    format: Format[E]
    directory: Path

    def merged(self) -> tuple[list[E], list[Origin]]:
        """The entries of the embedded and all further catalogs by name, and the catalogs that cannot be used."""
        found, broken = self.format.embedded().entries, []
        for origin, own in self._read_all():
            found += own
            if origin.problem:
                broken.append(origin)
        return sorted(found, key=lambda entry: (entry.name, entry.arch, entry.origin != EMBEDDED, entry.origin)), broken

    def list_all(self) -> list[Origin]:
        """The embedded catalog and the further ones by name, also those that cannot be used."""
        embedded = Origin(EMBEDDED, "", "", len(self.format.embedded().entries))
        return [embedded, *(origin for origin, _ in self._read_all())]

    def names(self) -> list[str]:
        """The names of the further catalogs, usable or not."""
        return entries.names(self.directory)

    def find(self, name: str, arch: str) -> E:
        """The entry for `name` or `origin/name`; raises as `Format.lookup`, and CORRUPT for a broken catalog."""
        found, broken = self.merged()
        for origin in broken:
            if name.startswith(f"{origin.name}/"):
                raise BangerError(
                    Code.CORRUPT,
                    origin.problem,
                    hint=f"try 'banger {self.format.noun} catalog refresh {origin.name}'",
                )
        return self.format.lookup(found, name, arch)

    def resolve(self, name: str, arch: str, registry: str) -> E | None:
        """The entry that a name means by its form, None for what can only be a reference to an image of a registry.

        Raises as `find`, and NOT_FOUND for the name of a catalog that is not there: what strangers publish under it in
        the default `registry` must never be taken instead.
        """
        if ":" in name or "@" in name:
            return None
        origin, slash, _ = name.rpartition("/")
        if not slash or origin in {EMBEDDED, *self.names()}:
            return self.find(name, arch)
        first = name.partition("/")[0]
        if "." in first or first == "localhost":
            return None
        raise BangerError(
            Code.NOT_FOUND,
            f"there is no catalog {origin!r}",
            hint=f"see 'banger {self.format.noun} catalog list'; for an image say '{registry}/{name}'",
        )

    def add(self, location: str, name: str, public_key: str, job: Job) -> Origin:
        """Fetch a catalog from a URL or an absolute path and keep it under `name`, '' for one made from its location.

        With a `public_key` (minisign's format) it must be signed, now and whenever it is refreshed. Raises EXISTS for a
        name that is taken, INVALID for a wrong location, name or key, DOWNLOAD or NOT_FOUND when it cannot be had,
        CORRUPT when it or its signature is wrong.
        """
        if not location.startswith("/") and not is_http_url(location):
            raise BangerError(
                Code.INVALID, f"{location[:200]!r} is neither a URL with http or https nor an absolute path"
            )
        if not location.isprintable() or (" " in location and not location.startswith("/")):
            raise BangerError(Code.INVALID, f"{location[:200]!r} has characters that a location cannot have")
        name = system.validate_name(name or _default_name(location), "catalog")
        key = str(minisign.PublicKey.parse(public_key)) if public_key.strip() else ""
        self._refuse_taken(name)
        source = _Source(location, key, _now())
        content = self._fetch(name, source, job)
        with _locked(self.directory):
            self._refuse_taken(name)
            _write(self.directory, name, content, source)
            return self._read(self.directory / name)[0]

    def remove(self, name: str) -> None:
        """Remove a catalog, usable or not; what was pulled from it stays. Raises NOT_FOUND with the nearest name."""
        with _locked(self.directory):
            system.remove_entry(self._at(name))

    def refresh(self, which: Sequence[str], job: Job) -> None:
        """Fetch catalogs again, all when `which` is empty; where that fails the copy at hand stays in use.

        A failure does not stop the others, and is raised at the end: as for `add`, and CORRUPT for a catalog that is
        older than the copy at hand.
        """
        chosen = list(dict.fromkeys(which)) or self.names()
        for name in chosen:
            self._at(name)
        failures: list[BangerError] = []
        for name in chosen:
            try:
                self._refresh(name, job)
            except BangerError as error:
                if error.code is Code.CANCELLED:
                    raise
                failures.append(error)
        if len(failures) > 1:
            message = "; ".join(error.message for error in failures)
            raise BangerError(failures[0].code, message, hint=failures[0].hint)
        if failures:
            raise failures[0]

    def _refresh(self, name: str, job: Job) -> None:
        with _locked(self.directory):
            source = replace(self._read_source(self._at(name), name), refreshed_at=_now())
        content = self._fetch(name, source, job)
        with _locked(self.directory):
            entry = self._at(name)
            current = self._read_source(entry, name)
            if (current.location, current.public_key) != (source.location, source.public_key):
                raise BangerError(
                    Code.IN_USE, f"the catalog {name!r} was replaced by another meanwhile", hint="try again"
                )
            # what this version of banger cannot read any more is no reason to accept an older one, but damage is
            old = b""
            with contextlib.suppress(BangerError):
                old = _read_file(entry / _CATALOG, _CATALOG_LIMIT)
            self._refuse_rollback(name, source, old, content)
            _write(self.directory, name, content, source)

    def _fetch(self, name: str, source: _Source, job: Job) -> bytes:
        """The content of a catalog, its signature checked when a key is pinned, and readable."""
        shown = download.public_url(source.location)
        job.progress("catalog", f"{name} from {shown}")
        content = _obtain(source.location, name, _CATALOG_LIMIT, job)
        if source.public_key:
            _check_signature(name, source, content, job)
        where = f"the catalog {shown}"
        catalog = self.format.parse(content, where, origin=name, location=source.location)
        if source.public_key and not catalog.updated:
            raise BangerError(
                Code.CORRUPT,
                f"{where} does not say when it was updated, which signed catalogs must",
                hint=f"its publisher sets 'updated', as scripts/publish-{self.format.noun} does",
            )
        return content

    def _refuse_rollback(self, name: str, source: _Source, old: bytes, new: bytes) -> None:
        """A catalog never goes back in time; one with a pinned key does not change within a moment of it either."""
        try:
            before = updated_time(old, _CATALOG)
        except BangerError:
            return
        now = updated_time(new, _CATALOG)
        if not before or not now:
            return
        earlier, later = datetime.fromisoformat(before), datetime.fromisoformat(now)
        shown = f"the catalog {name!r} at {download.public_url(source.location)}"
        again = f"if that is meant: 'banger {self.format.noun} catalog rm {name}', then add it again"
        if later < earlier:
            raise BangerError(Code.CORRUPT, f"{shown} is of {now}, older than the copy at hand of {before}", hint=again)
        if source.public_key and later == earlier and old != new:
            raise BangerError(
                Code.CORRUPT,
                f"{shown} is of {now} and differs from the copy at hand of {before}, the same time",
                hint=again,
            )

    def _read_all(self) -> Iterator[tuple[Origin, list[E]]]:
        """The catalogs at hand by name, without those that are removed meanwhile."""
        for name in self.names():
            found = entries.steadily(self.directory / name, self._read)
            if found is not None:
                yield found

    def _read(self, directory: Path) -> tuple[Origin, list[E]]:
        """A catalog at hand and its entries: none when something is wrong with it, which the Origin tells."""
        name = directory.name
        origin = Origin(name, "", "")
        try:
            _check_name(name)
            source = self._read_source(directory, name)
            origin = Origin(
                name, download.public_url(source.location), source.public_key, refreshed_at=source.refreshed_at
            )
            content = _read_file(directory / _CATALOG, _CATALOG_LIMIT)
            catalog = self.format.parse(content, f"the catalog {name!r}", origin=name, location=source.location)
        except BangerError as error:
            return replace(origin, problem=error.message), []
        return replace(origin, entries=len(catalog.entries), updated=catalog.updated), catalog.entries

    def _read_source(self, entry: Path, name: str) -> _Source:
        try:
            fields = Fields.parse(_read_file(entry / _SOURCE, _SMALL_LIMIT), _SOURCE)
            source = _Source(fields.text("location"), fields.text("public_key", ""), fields.utc_time("refreshed_at"))
            if not source.location.startswith("/") and not is_http_url(source.location):
                raise fields.wrong("location", "a URL or an absolute path")
        except BangerError as error:
            raise BangerError(
                Code.CORRUPT,
                f"the catalog {name!r} is broken: {error.message}",
                hint=f"remove it with 'banger {self.format.noun} catalog rm {name}' and add it again",
            ) from error
        return source

    def _at(self, name: str) -> Path:
        if name == EMBEDDED:
            raise BangerError(Code.INVALID, f"the catalog {name!r} comes with banger, and changes with it")
        known = self.names()
        if name in known:
            return self.directory / name
        near = system.nearest(name, known)
        hint = f"did you mean {near!r}?" if near else f"see 'banger {self.format.noun} catalog list'"
        raise BangerError(Code.NOT_FOUND, f"there is no catalog {name!r}", hint=hint)

    def _refuse_taken(self, name: str) -> None:
        _check_name(name)
        if name in self.names():
            remove = f"banger {self.format.noun} catalog rm {name}"
            raise BangerError(
                Code.EXISTS,
                f"there is a catalog {name!r} already",
                hint=f"choose another name with --name, or remove it with '{remove}'",
            )


def _check_signature(name: str, source: _Source, content: bytes, job: Job) -> None:
    location = _signature_location(source.location)
    try:
        signature = _obtain(location, f"{name}.minisig", _SMALL_LIMIT, job)
    except BangerError as error:
        if error.code is Code.CANCELLED:
            raise
        raise BangerError(
            error.code,
            f"the catalog {name!r} has a pinned key, and its signature cannot be had: {error.message}",
            hint=f"its publisher puts the signature at {download.public_url(location)}",
        ) from error
    try:
        minisign.verify(
            content, signature.decode("utf-8", "surrogateescape"), minisign.PublicKey.parse(source.public_key)
        )
    except BangerError as error:
        raise BangerError(
            error.code,
            f"the catalog {name!r} at {download.public_url(source.location)} is refused: {error.message}",
            hint="its publisher may be changing it just now: try again; else ask which key is right",
        ) from error


def _write(directory: Path, name: str, content: bytes, source: _Source) -> None:
    with system.staging(directory, name) as staged:
        entry = staged / "entry"
        entry.mkdir(mode=0o700)
        (entry / _CATALOG).write_bytes(content)
        (entry / _SOURCE).write_text(json.dumps(asdict(source), indent=2) + "\n")
        system.sync_tree(entry)
        system.publish(entry, directory / name)


def _check_name(name: str) -> None:
    system.validate_name(name, "catalog")
    if name == EMBEDDED:
        raise BangerError(
            Code.EXISTS, f"{name!r} is the catalog that comes with banger", hint="choose another name with --name"
        )


def _default_name(location: str) -> str:
    text = Path(location).stem if location.startswith("/") else urlsplit(location).hostname or ""
    name = re.sub(r"\.\.+", ".", re.sub(r"[^A-Za-z0-9._-]", "-", text)).lstrip("._-")[:64]
    if not name:
        raise BangerError(Code.INVALID, f"no name can be made from {location[:200]!r}", hint="give one with --name")
    return name


def _signature_location(location: str) -> str:
    """The address of the signature: the catalog's own, ".minisig" behind its path."""
    if location.startswith("/"):
        return f"{location}.minisig"
    parts = urlsplit(location)
    return parts._replace(path=f"{parts.path}.minisig", fragment="").geturl()


def _obtain(location: str, label: str, limit: int, job: Job) -> bytes:
    if location.startswith("/"):
        return _read_file(Path(location), limit)
    return download.fetch_small(location, job, label=label, limit=limit)


def _read_file(path: Path, limit: int) -> bytes:
    """The content of a regular file of at most `limit` bytes; raises NOT_FOUND, CORRUPT for what is none."""
    try:
        # opening a pipe waits for its other end otherwise
        with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as stream:
            if not stat.S_ISREG(os.fstat(stream.fileno()).st_mode):
                raise BangerError(Code.CORRUPT, f"{path} is not a regular file")
            content = stream.read(limit + 1)
    except OSError as error:
        raise BangerError(Code.NOT_FOUND, f"{path} cannot be read: {error.strerror}") from error
    if len(content) > limit:
        raise BangerError(Code.CORRUPT, f"{path} is larger than {system.human_size(limit)}")
    return content


@contextlib.contextmanager
def _locked(directory: Path) -> Iterator[None]:
    """Keeps others from publishing catalogs: held while what is there is compared and renamed, never in downloads."""
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _now() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
