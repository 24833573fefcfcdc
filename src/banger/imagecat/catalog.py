"""The catalog of images that can be pulled, and which of them are there already."""

from __future__ import annotations

import re
from dataclasses import dataclass
from importlib import resources

from banger import system
from banger.api.errors import BangerError, Code
from banger.fields import Fields

DEFAULT_IMAGE = "debian-bookworm"

_VERSION = 1
_VARIANTS = ("essential", "apt", "minbase", "important", "standard")  # mmdebstrap(1), "VARIANTS"
_SUITE = re.compile(r"[a-z][a-z0-9-]*")
_PACKAGE = re.compile(r"[a-z0-9][a-z0-9+.-]+")  # Debian Policy 5.6.1


@dataclass(frozen=True)
class CatalogEntry:
    """One image of the catalog, of kind `debian`: built from the packages of a suite of Debian's archive."""

    name: str
    distro: str
    suite: str
    variant: str
    packages: tuple[str, ...]
    description: str


@dataclass(frozen=True)
class Catalog:
    """The entries that can be pulled, by name."""

    entries: tuple[CatalogEntry, ...]

    def find(self, name: str) -> CatalogEntry:
        """The entry of that name; raises NOT_FOUND with the nearest one."""
        for entry in self.entries:
            if entry.name == name:
                return entry
        near = system.nearest(name, [entry.name for entry in self.entries])
        hint = f"did you mean {near!r}?" if near else "see 'banger image list --available'"
        raise BangerError(Code.NOT_FOUND, f"the catalog has no image {name!r}", hint=hint)

    def annotated(self, local_names: set[str]) -> list[tuple[CatalogEntry, bool]]:
        """Every entry with whether it has been pulled."""
        return [(entry, entry.name in local_names) for entry in self.entries]


def embedded_catalog() -> Catalog:
    """The catalog that comes with banger."""
    return parse_catalog(resources.files(__package__).joinpath("catalog.json").read_bytes(), "the embedded catalog")


def parse_catalog(text: str | bytes, where: str) -> Catalog:
    """Read a catalog strictly; raises `BangerError(CORRUPT)` naming the field that is wrong."""
    fields = Fields.parse(text, where)
    if fields.number("version", 0) != _VERSION:
        raise fields.wrong("version", str(_VERSION))
    entries = tuple(_entry(entry) for entry in fields.objects("entries"))
    names = [entry.name for entry in entries]
    for name in names:
        if names.count(name) > 1:
            raise BangerError(Code.CORRUPT, f"{where} has two images called {name!r}")
    return Catalog(entries)


def _entry(fields: Fields) -> CatalogEntry:
    kind = fields.text("kind")
    if kind != "debian":
        raise fields.wrong("kind", "'debian'")
    entry = CatalogEntry(
        name=fields.text("name"),
        distro=fields.text("distro"),
        suite=fields.text("suite"),
        variant=fields.text("variant"),
        packages=fields.texts("packages"),
        description=fields.text("description", ""),
    )
    try:
        system.validate_name(entry.name, "image")
    except BangerError as error:
        raise fields.wrong("name", "a valid image name") from error
    if entry.variant not in _VARIANTS:
        raise fields.wrong("variant", " or ".join(_VARIANTS))
    if not _SUITE.fullmatch(entry.suite):
        raise fields.wrong("suite", "the name of a Debian suite")
    for package in entry.packages:
        if not _PACKAGE.fullmatch(package):
            raise fields.wrong("packages", f"names of Debian packages, not {package!r}")
    return entry
