"""Catalogs of kernels that can be pulled: their format, finding an entry, and which have been pulled already."""

from __future__ import annotations

import importlib.resources
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime
from urllib.parse import SplitResult, unquote, urljoin, urlsplit

from banger import system
from banger.api.errors import BangerError, Code
from banger.fields import Fields
from banger.kernelcat.manifest import KernelManifest, is_version

VERSION = 1  # of the file format
EMBEDDED = "banger"  # the origin of the catalog that ships with banger
ENTRIES_LIMIT = 50_000

_TEXT_LIMIT = 2048  # characters
_SIZE_LIMIT = 1 << 40  # bytes


@dataclass(frozen=True)
class CatalogEntry:
    """A kernel that can be pulled, keyed by (name, arch).

    `kind` says how: `deb` takes the metapackage `package` of `suite`, `bundle` the archive at `tarball_url` or else at
    one of `mirrors`, `oci` the image `image` of a registry. `size_bytes` is what has to be downloaded, 0 when unknown:
    exactly of a bundle, about of the others. `origin` names the catalog, "banger" the embedded one. `tarball_url` is an
    http or https URL, or an absolute path when the catalog is a file.
    """

    name: str
    distro: str
    arch: str
    kernel_version: str
    kind: str
    description: str = ""
    size_bytes: int = 0
    suite: str = ""
    package: str = ""
    tarball_url: str = ""
    tarball_sha256: str = ""
    mirrors: tuple[str, ...] = ()
    image: str = ""
    origin: str = EMBEDDED


@dataclass(frozen=True)
class Catalog:
    """A catalog; `updated` is when it says that it was changed last (UTC, RFC 3339), '' when it does not say."""

    updated: str
    entries: list[CatalogEntry]


def embedded_catalog() -> Catalog:
    """The catalog that comes with banger."""
    text = importlib.resources.files("banger.kernelcat").joinpath("catalog.json").read_bytes()
    return parse_catalog(text, "the embedded kernel catalog")


def parse_catalog(text: str | bytes, where: str, *, origin: str = EMBEDDED, location: str = "") -> Catalog:
    """Read a catalog strictly; `where` names it in errors.

    Addresses are relative to `location`, the URL or absolute path that the catalog comes from ('': none may be).
    Unknown fields are ignored and unknown kinds kept, so that a catalog can serve several versions of banger. Raises
    CORRUPT naming the field that is wrong, UNSUPPORTED for a newer format.
    """
    fields = _open(text, where)
    items = fields.objects("entries")
    if len(items) > ENTRIES_LIMIT:
        raise BangerError(Code.CORRUPT, f"{where} has {len(items)} entries; at most {ENTRIES_LIMIT} are read")
    entries = [_entry(item, origin, location) for item in items]
    seen: set[tuple[str, str]] = set()
    for entry in entries:
        key = entry.name, entry.arch
        if key in seen:
            raise BangerError(Code.CORRUPT, f"{where} has two entries for {entry.name!r} on {entry.arch}")
        seen.add(key)
    return Catalog(_updated(fields), entries)


def updated_time(text: str | bytes, where: str) -> str:
    """`Catalog.updated` of a catalog whose entries need not be readable. Raises CORRUPT, UNSUPPORTED."""
    return _updated(_open(text, where))


def lookup(entries: Sequence[CatalogEntry], name: str, arch: str) -> CatalogEntry:
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
    if named:
        others = ", ".join(sorted({entry.arch for entry in named}))
        message = f"the kernel {name!r} can be had for {others}, not for {arch}"
        raise BangerError(Code.NOT_FOUND, message, hint="see 'banger kernel list --available'")
    candidates = [
        f"{entry.origin}/{entry.name}" if qualified else entry.name for entry in entries if entry.arch == arch
    ]
    near = system.nearest(name, candidates)
    hint = f"did you mean {near!r}?" if near else "see 'banger kernel list --available'"
    raise BangerError(Code.NOT_FOUND, f"no kernel {name!r} in the catalogs", hint=hint)


def annotate(
    entries: Sequence[CatalogEntry], local: Sequence[KernelManifest], candidate: Callable[[CatalogEntry], str]
) -> list[tuple[CatalogEntry, str]]:
    """Each entry with its state: `pulled` when a local kernel came from it, `outdated` when that was another release.

    `candidate` tells the release of a `deb` entry, '' when unknown, and is asked only for those that have been pulled.
    """
    pulled: dict[tuple[str, str], set[str]] = {}
    for manifest in local:
        if manifest.origin:
            pulled.setdefault((manifest.origin, manifest.arch), set()).add(manifest.revision)

    def state(entry: CatalogEntry) -> str:
        releases = pulled.get((f"{entry.origin}/{entry.name}", entry.arch))
        if releases is None:
            return "available"
        current = candidate(entry) if entry.kind == "deb" else revision(entry)
        return "pulled" if not current or current in releases else "outdated"

    return [(entry, state(entry)) for entry in entries]


def revision(entry: CatalogEntry) -> str:
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


def _entry(fields: Fields, origin: str, location: str) -> CatalogEntry:
    kind = _text(fields, "kind", "bundle")
    bundle = kind == "bundle"
    entry = CatalogEntry(
        name=_text(fields, "name"),
        distro=_text(fields, "distro"),
        arch=fields.arch(),
        kernel_version=_text(fields, "kernel_version"),
        kind=kind,
        description=_text(fields, "description", ""),
        size_bytes=fields.number("size_bytes", 0),
        suite=_text(fields, "suite", None if kind == "deb" else ""),
        package=_text(fields, "package", None if kind == "deb" else ""),
        tarball_url=_address(fields, "tarball_url", _text(fields, "tarball_url"), location) if bundle else "",
        tarball_sha256=fields.sha256("tarball_sha256") if bundle else "",
        mirrors=tuple(_mirror(fields, url, location) for url in fields.texts("mirrors")) if bundle else (),
        image=_text(fields, "image", None if kind == "oci" else ""),
        origin=origin,
    )
    try:
        system.validate_name(entry.name, "kernel")
    except BangerError as error:
        raise fields.wrong("name", f"a valid kernel name, not {entry.name[:80]!r}") from error
    if not is_version(entry.kernel_version):
        raise fields.wrong("kernel_version", "a kernel release, or the start of one")
    if not (1 if bundle else 0) <= entry.size_bytes < _SIZE_LIMIT:
        raise fields.wrong("size_bytes", "a positive number of bytes" if bundle else f"below {_SIZE_LIMIT}")
    return entry


def _text(fields: Fields, key: str, default: str | None = None) -> str:
    """A text that a terminal shows as it is."""
    value = fields.text(key, default)
    if not value.isprintable() or len(value) > _TEXT_LIMIT:
        raise fields.wrong(key, f"at most {_TEXT_LIMIT} printable characters")
    return value


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
