"""Pulls a kernel of the catalog: downloads it in the way of its kind, then imports it."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path

from banger import debian, system
from banger.api.errors import BangerError, Code
from banger.job import Job
from banger.kernelcat.catalog import CatalogEntry
from banger.kernelcat.importer import import_kernel, refuse_taken
from banger.kernelcat.manifest import KernelManifest


@dataclass(frozen=True)
class Fetched:
    """What a kind of entry was downloaded as: the sources to import, and where they are from."""

    sources: list[Path]
    source: str


@dataclass(frozen=True)
class Place:
    """Where downloads go and come from: `into` is temporary, `cache` stays; `debian_mirror` '' means the host's."""

    into: Path
    cache: Path
    debian_mirror: str


def pull_kernel(
    kernels_dir: Path,
    entry: CatalogEntry,
    job: Job,
    *,
    cache: Path,
    debian_mirror: str = "",
    replace: bool = False,
    publishing: Callable[[], AbstractContextManager[object]] = nullcontext,
) -> KernelManifest:
    """Download and install a kernel of the catalog under its name there.

    `cache` keeps package lists between pulls; `publishing` and `replace` as for `import_kernel`. Raises DOWNLOAD when
    the source cannot be reached or verified, and what `import_kernel` raises.
    """
    fetch = _KINDS.get(entry.kind)
    if fetch is None:
        raise BangerError(
            Code.UNSUPPORTED,
            f"the kernel {entry.name!r} is of the kind {entry.kind!r}, which this banger cannot pull",
            hint="upgrade banger",
        )
    refuse_taken(kernels_dir, entry.name, replace)
    with system.staging(cache, entry.name) as into:
        fetched = fetch(entry, Place(into, cache, debian_mirror), job)
        return import_kernel(
            kernels_dir,
            entry.name,
            fetched.sources,
            job,
            arch=entry.arch,
            distro=entry.distro,
            source=fetched.source,
            replace=replace,
            publishing=publishing,
        )


def _fetch_deb(entry: CatalogEntry, place: Place, job: Job) -> Fetched:
    packages = debian.download(
        [entry.package],
        entry.suite,
        entry.arch,
        job,
        into=place.into,
        cache=place.cache,
        mirror=debian.find_mirror(place.debian_mirror),
    )
    image = next((path for path in packages if path.name.startswith("linux-image-")), packages[0])
    name, version, _ = image.name.split("_")
    return Fetched(packages, f"deb:{name}={version.replace('%3a', ':')}")


_KINDS: dict[str, Callable[[CatalogEntry, Place, Job], Fetched]] = {"deb": _fetch_deb}
