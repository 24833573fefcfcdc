"""Fetches a kernel from where a catalog entry says: a bundle over HTTP, Debian packages, or an image of a registry."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path

from banger import debian, download, system
from banger.api.errors import BangerError, Code
from banger.catalogs.format import origin_of, revision
from banger.hostpackages import Use
from banger.job import Job
from banger.kernelcat.archive import ARCHIVE_LIMIT
from banger.kernelcat.catalog import CatalogEntry
from banger.kernelcat.importer import Claims, Publishing, import_bundle, import_kernel, refuse_taken
from banger.kernelcat.manifest import KernelManifest
from banger.kernelcat.oci import fetch_oci
from banger.oci.reference import Reference, Registries


@dataclass(frozen=True)
class Environment:
    """What this host adds to an entry: `cache` stays between pulls, `debian_mirror` '' means the host's own."""

    cache: Path
    debian_mirror: str = ""
    registries: Registries = field(default_factory=Registries)


@dataclass(frozen=True)
class _Target:
    """Where a kernel goes; the arguments of the importer that do not depend on where it comes from."""

    kernels_dir: Path
    name: str
    replace: bool
    publishing: Publishing


def uses(kind: str) -> set[Use]:
    """What installing a kernel of an entry of that kind takes of the host."""
    return {Use.KERNEL, Use.DEBIAN_KERNEL} if kind == "deb" else {Use.KERNEL}


def fetch(
    kernels_dir: Path,
    name: str,
    entry: CatalogEntry,
    job: Job,
    *,
    environment: Environment,
    replace: bool = False,
    publishing: Publishing = nullcontext,
) -> KernelManifest:
    """Download the kernel of a catalog entry and install it under `name`.

    `publishing` and `replace` as for `import_kernel`. Raises DOWNLOAD when the source cannot be reached, CORRUPT when
    it is not what the entry says, and what `import_kernel` raises.
    """
    kind = _KINDS.get(entry.kind)
    if kind is None:
        raise BangerError(
            Code.UNSUPPORTED,
            f"the kernel {entry.name!r} is of the kind {entry.kind!r}, which this banger cannot pull",
            hint="upgrade banger",
        )
    refuse_taken(kernels_dir, name, replace)
    return kind(entry, environment, _Target(kernels_dir, name, replace, publishing), job)


def _fetch_bundle(entry: CatalogEntry, environment: Environment, target: _Target, job: Job) -> KernelManifest:
    source = f"pull:{download.public_url(entry.tarball_url)}"
    size, sha256 = entry.size_bytes, entry.tarball_sha256
    if entry.tarball_url.startswith("/"):  # of a catalog that is a file
        path = Path(entry.tarball_url)
        pieces = download.local(path, job, label=target.name, size=size, limit=ARCHIVE_LIMIT, sha256=sha256)
    else:
        urls = [entry.tarball_url, *entry.mirrors]
        pieces = download.stream(urls, job, label=target.name, size=size, limit=ARCHIVE_LIMIT, sha256=sha256)
    with contextlib.closing(pieces):
        return import_bundle(
            target.kernels_dir,
            target.name,
            pieces,
            job,
            claims=_claims(entry, source, revision(entry)),
            replace=target.replace,
            publishing=target.publishing,
        )


def _fetch_deb(entry: CatalogEntry, environment: Environment, target: _Target, job: Job) -> KernelManifest:
    with system.staging(environment.cache, target.name) as into:
        packages = debian.download(
            [entry.package],
            entry.suite,
            entry.arch,
            job,
            into=into,
            cache=environment.cache,
            mirror=debian.find_mirror(environment.debian_mirror),
        )
        image = next((path for path in packages if path.name.startswith("linux-image-")), packages[0])
        package, version, _ = image.name.split("_")
        release = f"{package}={version.replace('%3a', ':')}"
        return _import(packages, _claims(entry, f"deb:{release}", release), target, job)


def _fetch_oci(entry: CatalogEntry, environment: Environment, target: _Target, job: Job) -> KernelManifest:
    with system.staging(environment.cache, target.name) as into:
        reference = Reference.parse(entry.image)
        directories, digest, skipped = fetch_oci(reference, entry.arch, into, job, environment.registries)
        return _import(directories, replace(_claims(entry, f"oci:{reference}", digest), skipped=skipped), target, job)


def _claims(entry: CatalogEntry, source: str, release: str) -> Claims:
    # the version of a deb entry is that of its series; the others name the kernel's own, if any
    version = "" if entry.kind == "deb" else entry.kernel_version
    return Claims(entry.distro, entry.arch, version, source=source, origin=origin_of(entry), revision=release)


def _import(sources: list[Path], claims: Claims, target: _Target, job: Job) -> KernelManifest:
    return import_kernel(
        target.kernels_dir,
        target.name,
        sources,
        job,
        claims=claims,
        replace=target.replace,
        publishing=target.publishing,
    )


_KINDS: dict[str, Callable[[CatalogEntry, Environment, _Target, Job], KernelManifest]] = {
    "bundle": _fetch_bundle,
    "deb": _fetch_deb,
    "oci": _fetch_oci,
}
