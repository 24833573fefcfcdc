"""Catalogs of kernels that can be pulled: what their entries say."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from banger.catalogs.format import EMBEDDED, Format, Item, revision, with_states
from banger.kernelcat.manifest import KernelManifest, is_version


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


def annotate(
    entries: Sequence[CatalogEntry], local: Sequence[KernelManifest], candidate: Callable[[CatalogEntry], str]
) -> list[tuple[CatalogEntry, str]]:
    """Each entry with its state; `candidate` tells the release of a `deb` entry, '' when unknown."""
    return with_states(entries, local, lambda entry: candidate(entry) if entry.kind == "deb" else revision(entry))


def _entry(item: Item) -> CatalogEntry:
    tarball = item.tarball()
    entry = CatalogEntry(
        name=item.name(),
        distro=item.text("distro"),
        arch=item.fields.arch(),
        kernel_version=item.text("kernel_version"),
        kind=item.kind,
        description=item.text("description", ""),
        size_bytes=item.size(),
        suite=item.text_of("deb", "suite"),
        package=item.text_of("deb", "package"),
        tarball_url=tarball.url,
        tarball_sha256=tarball.sha256,
        mirrors=tarball.mirrors,
        image=item.text_of("oci", "image"),
        origin=item.origin,
    )
    if not is_version(entry.kernel_version):
        raise item.fields.wrong("kernel_version", "a kernel release, or the start of one")
    return entry


KERNELS = Format("kernel", "banger.kernelcat", _entry)
