"""Pulling images: from catalogs, registries, layouts and archives; equal pulls share one download."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from banger import system
from banger.api import models as m
from banger.api.errors import BangerError, Code
from banger.api.operations import FETCHING
from banger.catalogs.format import origin_of
from banger.catalogs.local import Catalogs
from banger.config import Config
from banger.daemon.jobs import Report, Shared, Workers
from banger.fields import ARCHITECTURES
from banger.hostpackages import Use
from banger.imagecat import fetch, oci
from banger.imagecat import manifest as images
from banger.imagecat.build import other_arch
from banger.imagecat.catalog import CatalogEntry
from banger.imagecat.debian import check_host
from banger.imagecat.manifest import ImageManifest
from banger.job import Job, Progress, require_tools
from banger.kernelcat.manifest import KernelManifest
from banger.oci.blobs import BlobCache
from banger.oci.location import Location
from banger.oci.platform import Platform
from banger.oci.reference import Reference
from banger.oci.source import Environment, default_name
from banger.paths import Layout
from banger.recognise import refuse_path


class Kernels(Protocol):
    """Where the kernels of images come from."""

    async def ensure(self, name: str, report: Report, arch: str = "") -> KernelManifest: ...

    def uses(self, name: str, arch: str = "") -> set[Use]: ...


class BundleFetch(Protocol):
    """As `fetch.fetch_image`."""

    def __call__(
        self,
        images_dir: Path,
        name: str,
        entry: CatalogEntry,
        job: Job,
        *,
        environment: fetch.Environment,
        kernel: Path | None,
        replace: bool,
        publishing: Callable[[], threading.Lock],
    ) -> ImageManifest: ...


class ImagePulls:
    """Finds out what a name means, and pulls it."""

    def __init__(
        self,
        layout: Layout,
        config: Config,
        workers: Workers,
        publication: threading.Lock,
        kernels: Kernels,
        catalogs: Catalogs[CatalogEntry],
        cache: BlobCache,
        *,
        pull_and_flatten: oci.Flatten,
        finalize_pulled_rootfs: oci.Finalize,
        bundle_fetch: BundleFetch,
    ) -> None:
        self._layout = layout
        self._config = config
        self._workers = workers
        self._publication = publication
        self._kernels = kernels
        self._catalogs = catalogs
        self._cache = cache
        self._pull_and_flatten = pull_and_flatten
        self._finalize_pulled_rootfs = finalize_pulled_rootfs
        self._bundle_fetch = bundle_fetch
        self._flights: Shared[ImageManifest] = Shared(workers)

    async def pull(self, request: m.ImagePull, report: Report) -> ImageManifest:
        """Pull what a request names; see `ImagePull`."""
        name = await self._workers.run(lambda job: _plain(request.name))
        request = dataclasses.replace(request, name=name)
        if _is_bare(request.name):
            system.validate_name(request.name, "image")
        platform = Platform.parse(request.platform) if request.platform else Platform.host()
        if platform.architecture not in ARCHITECTURES:
            raise BangerError(
                Code.UNSUPPORTED,
                f"no VM can run an image for {platform}",
                hint=f"use one for {' or '.join(f'linux/{name}' for name in ARCHITECTURES)}",
            )
        try:
            entry = await self._workers.run(lambda job: self._resolve(request.name, platform))
        except BangerError as error:
            if error.code is not Code.NOT_FOUND or not _is_bare(request.name):
                raise
            return await self._pull_unknown(request, platform, error, report)
        if entry is None:
            return await self._pull_oci(request, self._canonical(request.name), platform, report)
        wanted = m.ImagePull(
            name=request.name,
            save_as=request.save_as or entry.name,
            kernel_ref=request.kernel_ref or entry.kernel_ref,
            force=request.force,
        )
        if entry.kind == "oci":
            return await self._pull_oci(wanted, self._canonical(entry.image), platform, report, origin_of(entry))
        return await self._pull_entry(wanted, entry, report)

    async def ensure(self, name: str, report: Report) -> ImageManifest:
        """The local image that a name or a reference means, pulled when it is missing."""
        there = await self._workers.run(lambda job: self._find_local(_plain(name)))
        return there or await self.pull(m.ImagePull(name), report)

    def look(self, name: str) -> tuple[ImageManifest | None, CatalogEntry | None]:
        """The local image that a name or a reference means, else its entry in a catalog if it has one. Blocks."""
        name = _plain(name)
        if there := self._find_local(name):
            return there, None
        try:
            return None, self._resolve(name, Platform.host())
        except BangerError as error:
            if error.code is not Code.NOT_FOUND:
                raise
            return None, None

    def _find_local(self, name: str) -> ImageManifest | None:
        if _is_bare(name):
            return self._read_local(system.validate_name(name, "image"))
        # one of that name from elsewhere is told of when this one is pulled
        entry = self._resolve(name, Platform.host())
        if entry is not None:
            there = self._read_local(entry.name)
            return there if there is not None and there.origin == origin_of(entry) else None
        text = self._canonical(name)
        local = default_name(text, self._config.registries)
        there = self._read_local(local) if _is_name(local) else None
        return there if there is not None and there.source == oci.source_of(text) else None

    def _read_local(self, name: str) -> ImageManifest | None:
        try:
            return images.read_local(self._layout.images, name)
        except BangerError as error:
            if error.code is not Code.NOT_FOUND:
                raise
            return None

    def _resolve(self, name: str, platform: Platform) -> CatalogEntry | None:
        return self._catalogs.resolve(name, platform.architecture, self._config.default_registry)

    def _canonical(self, text: str) -> str:
        """The same for however it was written."""
        location = Location.parse(text)
        return str(location or Reference.parse(text, self._config.default_registry))

    async def _pull_unknown(
        self, request: m.ImagePull, platform: Platform, unknown: BangerError, report: Report
    ) -> ImageManifest:
        """Pull what no catalog has from the default registry."""
        try:
            return await self._pull_oci(request, self._canonical(request.name), platform, report)
        except BangerError as error:
            if error.code in (Code.NOT_FOUND, Code.DOWNLOAD):
                hint = unknown.hint if unknown.hint.startswith("did you mean") else error.hint
                raise BangerError(error.code, f"{unknown.message}, and {error.message}", hint=hint) from error
            raise

    async def _pull_oci(
        self, request: m.ImagePull, text: str, platform: Platform, report: Report, origin: str = ""
    ) -> ImageManifest:
        name = system.validate_name(request.save_as or default_name(text, self._config.registries), "image")
        await self._workers.run(lambda job: self._require_tools({Use.IMAGE}, name, request, platform.architecture))
        environment = Environment(self._layout.cache, self._config.registries)
        if request.kernel_ref and not (self._layout.kernels / request.kernel_ref).exists():
            # no kernel is pulled for an image that cannot be had
            await self._workers.run(lambda job: oci.check_image(text, platform, environment, job), report)
        kernel = await self._kernel(name, request.kernel_ref, platform.architecture, report)
        report(Progress(FETCHING, f"the image {name}"))
        return await self._flights.run(
            f"{name} {text} {platform} {kernel} {origin} {request.force}",
            lambda job: oci.pull_oci(
                self._layout.images,
                name,
                text,
                job,
                platform=platform,
                environment=environment,
                cache=self._cache,
                kernel=kernel,
                origin=origin,
                replace=request.force,
                publishing=lambda: self._publication,
                flatten=self._pull_and_flatten,
                finalize=self._finalize_pulled_rootfs,
            ),
            report,
        )

    async def _pull_entry(self, request: m.ImagePull, entry: CatalogEntry, report: Report) -> ImageManifest:
        name = system.validate_name(request.save_as, "image")
        await self._workers.run(lambda job: self._require_tools(fetch.uses(entry.kind), name, request, entry.arch))
        kernel = await self._kernel(name, request.kernel_ref, entry.arch, report)
        slow = ", which takes a minute or more" if entry.kind == "debian" else ""
        report(Progress(FETCHING, f"the image {name}{slow}"))
        return await self._flights.run(
            f"{name} {entry!r} {kernel} {request.force}",
            lambda job: self._bundle_fetch(
                self._layout.images,
                name,
                entry,
                job,
                environment=fetch.Environment(self._config.debian_mirror),
                kernel=kernel,
                replace=request.force,
                publishing=lambda: self._publication,
            ),
            report,
        )

    def _require_tools(self, uses: set[Use], name: str, request: m.ImagePull, arch: str) -> None:
        """Raise when this host cannot make an image or its kernel; not for an image that stays as it is."""
        if request.force or not (self._layout.images / name).exists():
            require_tools(uses | (self._kernels.uses(request.kernel_ref, arch) if request.kernel_ref else set()))
            if Use.DEBIAN_IMAGE in uses:
                check_host(arch)

    async def _kernel(self, image: str, name: str, arch: str, report: Report) -> Path | None:
        """The directory of a kernel that an image is to refer to, which is pulled when it is missing."""
        if not name:
            return None
        kernel = await self._kernels.ensure(name, report, arch)
        if kernel.arch != arch:
            raise other_arch(image, arch, kernel.name, kernel.arch)
        return self._layout.kernels / kernel.name


def _plain(name: str) -> str:
    """The name without a tag that says nothing; raises INVALID, NOT_FOUND for the path of a file."""
    refuse_path(name, "an image")
    return name if Location.parse(name) else system.without_latest(name)


def _is_bare(name: str) -> bool:
    return not any(character in name for character in "/:@")


def _is_name(name: str) -> bool:
    try:
        system.validate_name(name, "image")
    except BangerError:
        return False
    return True
