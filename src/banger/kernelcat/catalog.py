"""The catalog of kernels that can be pulled: the embedded catalog.json and any that the user adds."""

from __future__ import annotations

import importlib.resources
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from banger import system
from banger.api.errors import BangerError, Code
from banger.fields import Fields
from banger.kernelcat.manifest import KernelManifest

VERSION = 1  # of the file format
EMBEDDED = "banger"  # the origin of the catalog that ships with banger

_FILE_LIMIT = 16 << 20  # bytes


@dataclass(frozen=True)
class CatalogEntry:
    """A kernel that can be pulled, keyed by (name, arch).

    `kind` says how: `deb` takes the metapackage `package` of `suite`, `bundle` the archive at `tarball_url` or else at
    one of `mirrors`, `oci` the image `image` of a registry. `size_bytes` is what has to be downloaded, 0 when unknown:
    exactly of a bundle, about of the others. `origin` names the catalog, "banger" the embedded one.
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


def parse_catalog(text: str | bytes, where: str) -> list[CatalogEntry]:
    """Read a catalog strictly; `where` names it in errors. Raises CORRUPT, UNSUPPORTED for another version."""
    fields = Fields.parse(text, where)
    if fields.number("version", 0) != VERSION:
        raise BangerError(
            Code.UNSUPPORTED, f"{where} is not a catalog of version {VERSION}", hint="it may need a newer banger"
        )
    return [_entry(item) for item in fields.objects("entries")]


def load_catalog(additions: Sequence[Path] = ()) -> list[CatalogEntry]:
    """The embedded catalog and the user's own, sorted; of two entries with one (name, arch) the last counts."""
    embedded = importlib.resources.files("banger.kernelcat").joinpath("catalog.json").read_bytes()
    entries = parse_catalog(embedded, "the embedded kernel catalog")
    for file in additions:
        try:
            with open(file, "rb") as stream:
                entries += parse_catalog(stream.read(_FILE_LIMIT), str(file))
        except OSError as error:
            raise BangerError(Code.NOT_FOUND, f"the kernel catalog {file} cannot be read: {error.strerror}") from error
    by_key = {(entry.name, entry.arch): entry for entry in entries}
    return [by_key[key] for key in sorted(by_key)]


def lookup(catalog: Sequence[CatalogEntry], name: str, arch: str) -> CatalogEntry:
    """The entry for a name and architecture; raises NOT_FOUND with the nearest name that there is."""
    for entry in catalog:
        if (entry.name, entry.arch) == (name, arch):
            return entry
    others = sorted(entry.arch for entry in catalog if entry.name == name)
    if others:
        message = f"the kernel {name!r} can be had for {', '.join(others)}, not for {arch}"
        raise BangerError(Code.NOT_FOUND, message, hint="see 'banger kernel list --available'")
    near = system.nearest(name, [entry.name for entry in catalog if entry.arch == arch])
    hint = f"did you mean {near!r}?" if near else "see 'banger kernel list --available'"
    raise BangerError(Code.NOT_FOUND, f"no kernel {name!r} in the catalog", hint=hint)


def annotate(catalog: Sequence[CatalogEntry], local: Sequence[KernelManifest]) -> list[tuple[CatalogEntry, str]]:
    """Each entry with its state: `pulled` when a local kernel has its name and architecture, else `available`."""
    installed = {(manifest.name, manifest.arch) for manifest in local}
    return [(entry, "pulled" if (entry.name, entry.arch) in installed else "available") for entry in catalog]


def _entry(fields: Fields) -> CatalogEntry:
    kind = fields.text("kind", "bundle")
    entry = CatalogEntry(
        name=fields.text("name"),
        distro=fields.text("distro"),
        arch=fields.arch(),
        kernel_version=fields.text("kernel_version"),
        kind=kind,
        description=fields.text("description", ""),
        size_bytes=fields.number("size_bytes", 0),
        suite=fields.text("suite", None if kind == "deb" else ""),
        package=fields.text("package", None if kind == "deb" else ""),
        tarball_url=fields.text("tarball_url", None if kind == "bundle" else ""),
        tarball_sha256=fields.text("tarball_sha256", None if kind == "bundle" else ""),
    )
    system.validate_name(entry.name, "kernel")
    return entry
