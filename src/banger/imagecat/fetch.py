"""Makes images of catalog entries: of Debian's packages, or of a bundle over HTTP."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

from banger import debian
from banger.api.errors import BangerError, Code
from banger.catalogs.format import origin_of
from banger.hostpackages import Use
from banger.imagecat.build import Publishing, find_present
from banger.imagecat.bundle import fetch_bundle
from banger.imagecat.catalog import CatalogEntry, revision
from banger.imagecat.debian import pull_debian
from banger.imagecat.manifest import ImageManifest
from banger.job import Job


@dataclass(frozen=True)
class Environment:
    """What this host adds to an entry: `debian_mirror` '' means the host's own."""

    debian_mirror: str = ""


@dataclass(frozen=True)
class _Target:
    """Where an image goes."""

    images_dir: Path
    name: str
    kernel: Path | None
    replace: bool
    publishing: Publishing


def uses(kind: str) -> set[Use]:
    """What making an image of an entry of that kind takes of the host."""
    return {Use.IMAGE, Use.DEBIAN_IMAGE} if kind == "debian" else {Use.IMAGE}


def fetch_image(
    images_dir: Path,
    name: str,
    entry: CatalogEntry,
    job: Job,
    *,
    environment: Environment,
    kernel: Path | None = None,
    replace: bool = False,
    publishing: Publishing = nullcontext,
) -> ImageManifest:
    """Make the image `name` of an entry of the kinds `debian` and `bundle`.

    One that is there already, of the same release of the entry, stays as it is unless `replace`. `kernel` is the entry
    of the installed kernel that it is to refer to; `publishing` and `replace` are as for `build_image`. Raises EXISTS
    for a name that is taken otherwise, UNSUPPORTED for other kinds, DOWNLOAD when the source cannot be reached, CORRUPT
    when it is not what the entry says, and what `build_image` raises.
    """
    kind = _KINDS.get(entry.kind)
    if kind is None:
        raise BangerError(
            Code.UNSUPPORTED,
            f"the image {entry.name!r} is of the kind {entry.kind!r}, which this banger cannot pull",
            hint="upgrade banger",
        )
    target = _Target(images_dir, name, kernel, replace, publishing)
    while True:
        if not replace and (there := _already_there(entry, target)):
            return there
        try:
            return kind(entry, environment, target, job)
        except BangerError as error:
            if error.code is not Code.EXISTS:
                raise  # else another pull was faster, perhaps of the same


def _already_there(entry: CatalogEntry, target: _Target) -> ImageManifest | None:
    def difference(there: ImageManifest) -> str:
        if there.arch != entry.arch:
            return f"it is for {there.arch}, not for {entry.arch}"
        return "" if there.revision == revision(entry) else "its catalog has another release of it"

    origin = origin_of(entry)
    return find_present(target.images_dir, target.name, target.kernel, lambda there: there.origin == origin, difference)


def _fetch_debian(entry: CatalogEntry, environment: Environment, target: _Target, job: Job) -> ImageManifest:
    return pull_debian(
        target.images_dir,
        entry,
        job,
        mirror=debian.find_mirror(environment.debian_mirror),
        name=target.name,
        kernel=target.kernel,
        replace=target.replace,
        publishing=target.publishing,
    )


def _fetch_bundle(entry: CatalogEntry, environment: Environment, target: _Target, job: Job) -> ImageManifest:
    return fetch_bundle(
        target.images_dir,
        target.name,
        entry,
        job,
        kernel=target.kernel,
        replace=target.replace,
        publishing=target.publishing,
    )


_KINDS: dict[str, Callable[[CatalogEntry, Environment, _Target, Job], ImageManifest]] = {
    "bundle": _fetch_bundle,
    "debian": _fetch_debian,
}
