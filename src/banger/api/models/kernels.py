"""Requests and responses of the operations on kernels."""

from __future__ import annotations

from dataclasses import field

from banger.api.models.base import Model


class KernelInfo(Model):
    """An entry of the local kernel catalog; `problem` is '' for a usable one.

    `missing` names what one of the machine types would need and the kernel lacks, `unknown` that of which neither its
    configuration nor its modules tell. `origin` is the catalog and name that it was pulled by, '' for another source.
    """

    name: str
    distro: str = ""
    arch: str = ""
    kernel_version: str = ""
    sha256: str = ""
    source: str = ""
    origin: str = ""
    imported_at: str = ""
    size_bytes: int = 0
    modules: bool = False
    missing: list[str] = field(default_factory=list)
    unknown: list[str] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)
    problem: str = ""


class KernelList(Model):
    kernels: list[KernelInfo]


class CatalogKernel(Model):
    """Something that can be pulled, from the catalog `origin`; `state` is pulled, available or outdated."""

    name: str
    origin: str
    distro: str
    arch: str
    kernel_version: str
    kind: str
    description: str
    size_bytes: int
    state: str


class KernelCatalog(Model):
    entries: list[CatalogKernel]


class KernelDelete(Model):
    """`force` also removes one that images or VMs refer to; they keep their own copies of its files."""

    name: str
    force: bool = False


class KernelImport(Model):
    """`sources` are absolute paths of packages, directories or kernel files on the daemon's host, or only "host"."""

    name: str
    sources: list[str]
    distro: str = ""
    arch: str = ""
    kernel_version: str = ""
    force: bool = False


class KernelPull(Model):
    """`name` is a name in a catalog, perhaps with its origin, an OCI reference or the URL of a bundle.

    `sha256` is required for a URL, and what an entry's own must be else. `save_as` '' means the name that the entry,
    the reference or the file has. `arch` '' means the host's own.
    """

    name: str
    save_as: str = ""
    sha256: str = ""
    arch: str = ""
    force: bool = False


class KernelVerify(Model):
    """No `names` means all kernels."""

    names: list[str] = field(default_factory=list)


class KernelCheck(Model):
    """What re-reading a kernel found; `problem` is '' when all is well."""

    name: str
    problem: str = ""


class KernelChecks(Model):
    kernels: list[KernelCheck]


class KernelExport(Model):
    """`output` is the absolute path of the bundle to write on the daemon's host; `url` where it will be published."""

    name: str
    output: str
    url: str = ""
    force: bool = False


class BundleEntry(Model):
    """The catalog entry of an exported bundle, as it stands in a catalog file."""

    name: str
    kind: str
    distro: str
    arch: str
    kernel_version: str
    tarball_url: str
    tarball_sha256: str
    size_bytes: int
    description: str
