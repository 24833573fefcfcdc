"""Catalogs of images that can be pulled: what their entries say."""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass

from banger import system
from banger.api.errors import BangerError
from banger.catalogs import format as catalogs
from banger.catalogs.format import EMBEDDED, Format, Item

_VARIANTS = ("essential", "apt", "minbase", "important", "standard")  # mmdebstrap(1), "VARIANTS"
_SUITE = re.compile(r"[a-z][a-z0-9-]*")
_PACKAGE = re.compile(r"[a-z0-9][a-z0-9+.-]+")  # Debian Policy 5.6.1


@dataclass(frozen=True)
class CatalogEntry:
    """An image that can be pulled, keyed by (name, arch).

    `kind` says how: `debian` builds it of the `packages` of a `suite` of Debian's archive, `bundle` takes the archive
    at `tarball_url` or else at one of `mirrors`, `oci` the image `image` of a registry. `size_bytes` is what has to be
    downloaded, 0 when unknown: exactly of a bundle, about of the others. `kernel_ref` names the kernel that its VMs
    boot, '' for the default one; `origin` the catalog, "banger" the embedded one.
    """

    name: str
    distro: str
    arch: str
    kind: str
    description: str = ""
    size_bytes: int = 0
    kernel_ref: str = ""
    suite: str = ""
    variant: str = ""
    packages: tuple[str, ...] = ()
    tarball_url: str = ""
    tarball_sha256: str = ""
    mirrors: tuple[str, ...] = ()
    image: str = ""
    origin: str = EMBEDDED


def revision(entry: CatalogEntry) -> str:
    """What tells this release of an entry from the next; of a `debian` one, a digest of what it is built of."""
    if entry.kind != "debian":
        return catalogs.revision(entry)
    return hashlib.sha256("\n".join((entry.suite, entry.variant, *entry.packages)).encode()).hexdigest()


def _entry(item: Item) -> CatalogEntry:
    tarball = item.tarball()
    entry = CatalogEntry(
        name=item.name(),
        distro=item.text("distro"),
        arch=item.fields.arch(),
        kind=item.kind,
        description=item.text("description", ""),
        size_bytes=item.size(),
        kernel_ref=item.text("kernel_ref", ""),
        suite=item.text_of("debian", "suite"),
        variant=item.text_of("debian", "variant"),
        packages=item.fields.texts("packages") if item.kind == "debian" else (),
        tarball_url=tarball.url,
        tarball_sha256=tarball.sha256,
        mirrors=tarball.mirrors,
        image=item.text_of("oci", "image"),
        origin=item.origin,
    )
    if entry.kernel_ref:
        try:
            system.validate_name(entry.kernel_ref, "kernel")
        except BangerError as error:
            raise item.fields.wrong("kernel_ref", f"the name of a kernel, not {entry.kernel_ref[:80]!r}") from error
    if entry.kind == "debian":
        _check_debian(item, entry)
    return entry


def _check_debian(item: Item, entry: CatalogEntry) -> None:
    """All of it ends up on the command line of mmdebstrap."""
    if entry.variant not in _VARIANTS:
        raise item.fields.wrong("variant", " or ".join(_VARIANTS))
    if not _SUITE.fullmatch(entry.suite):
        raise item.fields.wrong("suite", "the name of a Debian suite")
    for package in entry.packages:
        if not _PACKAGE.fullmatch(package):
            raise item.fields.wrong("packages", f"names of Debian packages, not {package[:80]!r}")


IMAGES = Format("image", "banger.imagecat", _entry)
