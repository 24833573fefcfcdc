"""The format of catalogs: reading one strictly, finding an entry, and telling which have been pulled already.

Kernels and images share all of it; a `Format` says what is particular to one of them.
"""

from __future__ import annotations

import importlib.resources
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Generic, Protocol, TypeVar
from urllib.parse import SplitResult, unquote, urljoin, urlsplit

from banger import system
from banger.api.errors import BangerError, Code
from banger.fields import Fields

VERSION = 1  # of the file format
EMBEDDED = "banger"  # the origin of the catalogs that ship with banger
ENTRIES_LIMIT = 50_000

_TEXT_LIMIT = 2048  # characters
_SIZE_LIMIT = 1 << 40  # bytes


class Entry(Protocol):
    """What can be pulled, keyed by (name, arch); `origin` names its catalog, `kind` says how it is pulled."""

    @property
    def name(self) -> str: ...

    @property
    def arch(self) -> str: ...

    @property
    def kind(self) -> str: ...

    @property
    def description(self) -> str: ...

    @property
    def origin(self) -> str: ...


class Source(Protocol):
    """What entries of the kinds `bundle` and `oci` say besides."""

    @property
    def kind(self) -> str: ...

    @property
    def tarball_sha256(self) -> str: ...

    @property
    def image(self) -> str: ...


class Pulled(Protocol):
    """What local manifests say of the entry that they were pulled by."""

    @property
    def arch(self) -> str: ...

    @property
    def origin(self) -> str: ...

    @property
    def revision(self) -> str: ...


E = TypeVar("E", bound=Entry)


@dataclass(frozen=True)
class Catalog(Generic[E]):
    """A catalog; `updated` is when it says that it was changed last (UTC, RFC 3339), '' when it does not say."""

    updated: str
    entries: list[E]


@dataclass(frozen=True)
class Tarball:
    """Where a bundle is: an http or https URL, or an absolute path when the catalog is a file; and further URLs."""

    url: str = ""
    sha256: str = ""
    mirrors: tuple[str, ...] = ()


class Item:
    """One entry of a catalog while it is read, from the catalog `origin` at `location`."""

    def __init__(self, fields: Fields, noun: str, origin: str, location: str) -> None:
        self.fields = fields
        self.origin = origin
        self._noun = noun
        self._location = location
        self.kind = self.text("kind", "bundle")

    def text(self, key: str, default: str | None = None) -> str:
        """A text that a terminal shows as it is."""
        value = self.fields.text(key, default)
        if not value.isprintable() or len(value) > _TEXT_LIMIT:
            raise self.fields.wrong(key, f"at most {_TEXT_LIMIT} printable characters")
        return value

    def text_of(self, kind: str, key: str) -> str:
        """A text that entries of this kind must have."""
        return self.text(key, None if self.kind == kind else "")

    def name(self) -> str:
        name = self.text("name")
        try:
            return system.validate_name(name, self._noun)
        except BangerError as error:
            raise self.fields.wrong("name", f"a valid {self._noun} name, not {name[:80]!r}") from error

    def size(self) -> int:
        """The bytes to download, which every bundle tells."""
        size = self.fields.number("size_bytes", 0)
        bundle = self.kind == "bundle"
        if not (1 if bundle else 0) <= size < _SIZE_LIMIT:
            raise self.fields.wrong("size_bytes", "a positive number of bytes" if bundle else f"below {_SIZE_LIMIT}")
        return size

    def tarball(self) -> Tarball:
        """Where the bundle is, of entries of that kind."""
        if self.kind != "bundle":
            return Tarball()
        return Tarball(
            url=_address(self.fields, "tarball_url", self.text("tarball_url"), self._location),
            sha256=self.fields.sha256("tarball_sha256"),
            mirrors=tuple(_mirror(self.fields, url, self._location) for url in self.fields.texts("mirrors")),
        )


@dataclass(frozen=True)
class Format(Generic[E]):
    """What catalogs of one noun hold: `entry` reads one item, `package` has the embedded catalog.json."""

    noun: str
    package: str
    entry: Callable[[Item], E]

    def embedded(self) -> Catalog[E]:
        """The catalog that comes with banger."""
        text = importlib.resources.files(self.package).joinpath("catalog.json").read_bytes()
        return self.parse(text, f"the embedded {self.noun} catalog")

    def parse(self, text: str | bytes, where: str, *, origin: str = EMBEDDED, location: str = "") -> Catalog[E]:
        """Read a catalog strictly; `where` names it in errors.

        Addresses are relative to `location`, the URL or absolute path that the catalog comes from ('': none may be).
        Unknown fields are ignored and unknown kinds kept, so that a catalog can serve several versions of banger.
        Raises CORRUPT naming the field that is wrong, UNSUPPORTED for a newer format.
        """
        fields = _open(text, where)
        items = fields.objects("entries")
        if len(items) > ENTRIES_LIMIT:
            raise BangerError(Code.CORRUPT, f"{where} has {len(items)} entries; at most {ENTRIES_LIMIT} are read")
        entries = [self.entry(Item(item, self.noun, origin, location)) for item in items]
        seen: set[tuple[str, str]] = set()
        for entry in entries:
            key = entry.name, entry.arch
            if key in seen:
                raise BangerError(Code.CORRUPT, f"{where} has two entries for {entry.name!r} on {entry.arch}")
            seen.add(key)
        return Catalog(_updated(fields), entries)

    def lookup(self, entries: Sequence[E], name: str, arch: str) -> E:
        """The entry for `name` or `origin/name` and an architecture.

        Raises INVALID for a bare name that several catalogs have, NOT_FOUND with the nearest name that there is.
        """
        origin, qualified, bare = name.rpartition("/")
        named = [entry for entry in entries if entry.name == bare and (not qualified or entry.origin == origin)]
        found = [entry for entry in named if entry.arch == arch]
        if len(found) == 1:
            return found[0]
        if found:
            choices = " or ".join(f"{entry.origin}/{bare}" for entry in found)
            raise BangerError(Code.INVALID, f"{name!r} is in several catalogs", hint=f"say {choices}")
        see = f"see 'banger {self.noun} list --available'"
        if named:
            others = ", ".join(sorted({entry.arch for entry in named}))
            message = f"the {self.noun} {name!r} can be had for {others}, not for {arch}"
            raise BangerError(Code.NOT_FOUND, message, hint=see)
        candidates = [
            f"{entry.origin}/{entry.name}" if qualified else entry.name for entry in entries if entry.arch == arch
        ]
        near = system.nearest(name, candidates)
        hint = f"did you mean {near!r}?" if near else see
        raise BangerError(Code.NOT_FOUND, f"no {self.noun} {name!r} in the catalogs", hint=hint)


def updated_time(text: str | bytes, where: str) -> str:
    """`Catalog.updated` of a catalog whose entries need not be readable. Raises CORRUPT, UNSUPPORTED."""
    return _updated(_open(text, where))


def with_states(entries: Sequence[E], local: Sequence[Pulled], current: Callable[[E], str]) -> list[tuple[E, str]]:
    """Each entry with its state: `pulled` when something local came from it, `outdated` when that was another release.

    `current` tells the release of an entry, '' when unknown, and is asked only for those that have been pulled.
    """
    pulled: dict[tuple[str, str], set[str]] = {}
    for manifest in local:
        if manifest.origin:
            pulled.setdefault((manifest.origin, manifest.arch), set()).add(manifest.revision)

    def state(entry: E) -> str:
        releases = pulled.get((origin_of(entry), entry.arch))
        if releases is None:
            return "available"
        release = current(entry)
        return "pulled" if not release or release in releases else "outdated"

    return [(entry, state(entry)) for entry in entries]


def origin_of(entry: Entry) -> str:
    """What manifests call the entry that they were pulled by; '' when it stands in no catalog."""
    return f"{entry.origin}/{entry.name}" if entry.origin else ""


def revision(entry: Source) -> str:
    """What tells this release of a bundle or image from the next; '' when the entry does not say (a tag can move)."""
    if entry.kind == "bundle":
        return entry.tarball_sha256
    return entry.image.partition("@")[2] if entry.kind == "oci" else ""


def _open(text: str | bytes, where: str) -> Fields:
    fields = Fields.parse(text, where)
    version = fields.number("version", 0)
    if version > VERSION:
        raise BangerError(
            Code.UNSUPPORTED,
            f"{where} is of the format {str(version)[:20]} and needs a newer banger, this one reads {VERSION}",
            hint="upgrade banger",
        )
    if version != VERSION:
        raise fields.wrong("version", str(VERSION))
    return fields


def _updated(fields: Fields) -> str:
    if not fields.text("updated", ""):
        return ""
    updated = fields.utc_time("updated")
    try:
        datetime.fromisoformat(updated)
    except ValueError as error:
        raise fields.wrong("updated", f"a time that exists, not {updated!r}") from error
    return updated


def _mirror(fields: Fields, reference: str, location: str) -> str:
    resolved = _address(fields, "mirrors", reference, location)
    if resolved.startswith("/"):
        raise fields.wrong("mirrors", f"http or https URLs in a catalog that is a file, not {reference!r}")
    return resolved


def _address(fields: Fields, key: str, reference: str, location: str) -> str:
    """The URL or, beside a catalog that is a file, the absolute path that a reference means (RFC 3986, section 4.2)."""
    if not reference.isprintable() or " " in reference or len(reference) > _TEXT_LIMIT:
        raise fields.wrong(key, f"a URL of at most {_TEXT_LIMIT} characters without spaces")
    try:
        parts = urlsplit(reference)
        if location.startswith("/") and not parts.scheme and not parts.netloc:
            path = _path_beside(parts, location)
            if not path:
                raise fields.wrong(key, f"a URL, or a relative path that stays beside the catalog, not {reference!r}")
            return path
        resolved = urljoin(location, reference)
    except ValueError as error:
        raise fields.wrong(key, f"a URL, not {reference!r}") from error
    if not is_http_url(resolved):
        raise fields.wrong(key, f"an http or https URL, not {reference!r}")
    return resolved


def is_http_url(url: str) -> bool:
    """Whether this is an absolute http or https URL."""
    try:
        parts = urlsplit(url)
        return parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:  # a port that is none, half an IPv6 address
        return False


def _path_beside(parts: SplitResult, catalog: str) -> str:
    """The path that a relative reference means in the directory of a catalog, '' when it leads out of there."""
    path = unquote(parts.path)
    # pathlib would take half of the time that a catalog of 50,000 entries does
    names = [name for name in path.split("/") if name not in ("", ".")]
    if not names or path.startswith("/") or ".." in names or parts.query or parts.fragment or not path.isprintable():
        return ""
    return f"{catalog.rpartition('/')[0]}/{'/'.join(names)}"
