"""Kernels: the local catalog, importing, pulling, removing, publishing, and the catalogs that they are pulled from."""

from __future__ import annotations

import os
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from banger import archives, debian, download, system
from banger.api import models as m
from banger.api.errors import BangerError, Code
from banger.api.operations import FETCHING
from banger.catalogs.format import revision
from banger.catalogs.local import Catalogs
from banger.config import Config
from banger.daemon.catalog_service import CatalogService
from banger.daemon.jobs import Report, Shared, Workers
from banger.entries import Listing, steadily, sum_file
from banger.hostpackages import Use
from banger.imagecat.manifest import images_with_kernel
from banger.job import Job, Progress, require_tools
from banger.kernelcat import fetch as fetching
from banger.kernelcat import manifest as kernels
from banger.kernelcat.bundle import write_bundle
from banger.kernelcat.catalog import KERNELS, CatalogEntry, annotate
from banger.kernelcat.importer import Claims, import_kernel, refuse_taken
from banger.kernelcat.manifest import KernelManifest
from banger.kernelcat.sources import HOST
from banger.oci.reference import Reference, local_name
from banger.paths import Layout, absolute_path
from banger.recognise import refuse_path
from banger.vmm.detect import host_arch

_BUNDLE_SUFFIXES = (".tar.zst", ".tar.gz", ".tar.xz", ".tzst", ".tgz", ".tar")


class KernelUsers(Protocol):
    """Who boots a kernel."""

    def vms_with_kernel(self, name: str) -> list[str]: ...


class KernelService:
    """The operations on kernels; those on their catalogs are those of `catalogs`.

    `publication` is the publication window: held while names are resolved and entries renamed, never during downloads
    and builds.
    """

    def __init__(
        self, layout: Layout, config: Config, workers: Workers, publication: threading.Lock, users: KernelUsers
    ) -> None:
        self._layout = layout
        self._config = config
        self._workers = workers
        self._publication = publication
        self._users = users
        self._catalogs = Catalogs(KERNELS, layout.kernel_catalogs)
        self.catalogs = CatalogService(self._catalogs, workers)
        self._pulls: Shared[KernelManifest] = Shared(workers)
        self._listing = Listing(layout.kernels, lambda entry: self._info(kernels.read_at(entry, entry.name)))

    async def list(self, request: m.Empty, report: Report) -> m.KernelList:
        def work(job: Job) -> m.KernelList:
            good, broken = self._listing.read()
            infos = good + [m.KernelInfo(entry.name, problem=entry.reason) for entry in broken]
            return m.KernelList(sorted(infos, key=lambda info: info.name))

        return await self._workers.run(work)

    async def show(self, request: m.NameRequest, report: Report) -> m.KernelInfo:
        return await self._workers.run(lambda job: self._info(kernels.read_local(self._layout.kernels, request.name)))

    async def delete(self, request: m.KernelDelete, report: Report) -> m.Empty:
        def work(job: Job) -> None:
            with self._publication:
                vms = self._users.vms_with_kernel(request.name)
                images = images_with_kernel(self._layout.images, request.name)
                exists = (self._layout.kernels / request.name).exists()  # they may name one that is gone
                if exists and (vms or images) and not request.force:
                    raise _in_use(request.name, vms, images)
                kernels.delete_local(self._layout.kernels, request.name)

        await self._workers.run(work)
        return m.Empty()

    async def import_(self, request: m.KernelImport, report: Report) -> m.KernelInfo:
        sources = [_source(source) for source in request.sources]
        if HOST in sources and len(sources) > 1:
            raise BangerError(
                Code.INVALID, "the host's kernel is a whole kernel by itself", hint="use --from host alone"
            )
        claims = Claims(request.distro, request.arch, request.kernel_version)
        manifest = await self._workers.run(
            lambda job: import_kernel(
                self._layout.kernels,
                request.name,
                sources,
                job,
                claims=claims,
                replace=request.force,
                publishing=lambda: self._publication,
            ),
            report,
        )
        return self._info(manifest)

    async def pull(self, request: m.KernelPull, report: Report) -> m.KernelInfo:
        await self._workers.run(lambda job: refuse_path(request.name, "a kernel"))
        arch = request.arch or host_arch()
        entry = await self._workers.run(lambda job: self._resolve(request, arch))
        try:
            name = system.validate_name(request.save_as or entry.name, "kernel")
        except BangerError as error:
            error.hint = error.hint if request.save_as else "say what it is to be called here: --as NAME"
            raise
        return self._info(await self._pull(entry, name, request.force, report))

    async def ensure(self, name: str, report: Report, arch: str = "") -> KernelManifest:
        """The local kernel of that name, pulled from a catalog when it is missing: for `arch`, '' for this host's."""
        try:
            return kernels.read_local(self._layout.kernels, name)
        except BangerError as error:
            if error.code is not Code.NOT_FOUND:
                raise
            hint = error.hint
        try:
            entry = await self._workers.run(lambda job: self._catalogs.find(name, arch or host_arch()))
            return await self._pull(entry, entry.name, False, report)
        except BangerError as error:
            if error.code is Code.NOT_FOUND and not error.hint:
                error.hint = hint
            raise

    def uses(self, name: str, arch: str = "") -> set[Use]:
        """What having a kernel here takes of the host: nothing where it is installed, or unknown. Blocks."""
        if (self._layout.kernels / name).exists():
            return set()
        try:
            return fetching.uses(self._catalogs.find(name, arch or host_arch()).kind)
        except BangerError as error:
            if error.code is not Code.NOT_FOUND:
                raise
            return set()

    async def _pull(self, entry: CatalogEntry, name: str, force: bool, report: Report) -> KernelManifest:
        refuse_taken(self._layout.kernels, name, force)
        await self._workers.run(lambda job: require_tools(fetching.uses(entry.kind)))
        report(Progress(FETCHING, f"the kernel {name}"))
        environment = fetching.Environment(self._layout.cache, self._config.debian_mirror, self._config.registries)
        while True:
            try:
                return await self._pulls.run(
                    f"{name} {entry!r}",
                    lambda job: fetching.fetch(
                        self._layout.kernels,
                        name,
                        entry,
                        job,
                        environment=environment,
                        replace=force,
                        publishing=lambda: self._publication,
                    ),
                    report,
                )
            except BangerError as error:
                if not (force and error.code is Code.EXISTS):  # of a pull without force that this one joined
                    raise

    def _resolve(self, request: m.KernelPull, arch: str) -> CatalogEntry:
        """What is to be pulled, by the form of its name: a URL, a name in a catalog, or an OCI reference."""
        name, sha256 = request.name, request.sha256.lower().removeprefix("sha256:")
        if "://" in name:
            return _url_entry(name, sha256, request.arch)
        entry = self._catalogs.resolve(name, arch, self._config.default_registry)
        if entry is None:
            reference = Reference.parse(name, self._config.default_registry)
            entry = CatalogEntry(local_name(reference), "", arch, "", "oci", image=str(reference), origin="")
        if sha256 and sha256 != revision(entry).removeprefix("sha256:"):
            raise BangerError(
                Code.INVALID,
                f"{name!r} does not have the SHA-256 {sha256!r} that you ask for",
                hint="give --sha256 with the URL of a bundle; in a reference write NAME@sha256:...",
            )
        return entry

    async def catalog(self, request: m.Empty, report: Report) -> m.KernelCatalog:
        def work(job: Job) -> m.KernelCatalog:
            good, _ = kernels.list_local(self._layout.kernels)
            entries, _ = self._catalogs.merged()
            annotated = annotate(entries, good, self._candidate)
            return m.KernelCatalog([_catalog_info(entry, state) for entry, state in annotated])

        return await self._workers.run(work)

    def _candidate(self, entry: CatalogEntry) -> str:
        return debian.candidate(entry.package, entry.suite, entry.arch, self._layout.cache)

    async def verify(self, request: m.KernelVerify, report: Report) -> m.KernelChecks:
        return await self._workers.run(lambda job: self._verify(request.names, job), report)

    def _verify(self, names: Sequence[str], job: Job) -> m.KernelChecks:
        if names:
            return m.KernelChecks(
                [m.KernelCheck(name, kernels.verify_local(self._layout.kernels, name, job)) for name in names]
            )
        good, broken = kernels.list_local(self._layout.kernels)
        checks = [m.KernelCheck(entry.name, entry.reason) for entry in broken]
        for manifest in good:
            try:
                problem = kernels.verify_local(self._layout.kernels, manifest.name, job)
            except BangerError as error:
                if error.code is not Code.NOT_FOUND:  # else it was removed meanwhile
                    raise
            else:
                checks.append(m.KernelCheck(manifest.name, problem))
        return m.KernelChecks(sorted(checks, key=lambda check: check.name))

    async def export(self, request: m.KernelExport, report: Report) -> m.BundleEntry:
        output = absolute_path(request.output)

        def work(job: Job) -> m.BundleEntry:
            with system.staging(self._layout.kernels, "export") as staged:
                held = staged / "entry"
                with self._publication:
                    manifest = kernels.hold(self._layout.kernels, request.name, held)
                with archives.new_file(output, request.force) as stream:
                    write_bundle(held, stream, job)
            return m.BundleEntry(
                name=manifest.name,
                kind="bundle",
                distro=manifest.distro,
                arch=manifest.arch,
                kernel_version=manifest.kernel_version,
                tarball_url=request.url or output.name,
                tarball_sha256=sum_file(output, job),
                size_bytes=output.stat().st_size,
                description="",
            )

        return await self._workers.run(work, report)

    def _info(self, manifest: KernelManifest) -> m.KernelInfo:
        return m.KernelInfo(
            name=manifest.name,
            distro=manifest.distro,
            arch=manifest.arch,
            kernel_version=manifest.kernel_version,
            sha256=manifest.sha256,
            source=manifest.source,
            origin=manifest.origin,
            imported_at=manifest.imported_at,
            size_bytes=steadily(self._layout.kernels / manifest.name, _disk_usage) or 0,
            modules=manifest.modules,
            missing=[*manifest.missing],
            unknown=[*manifest.unknown],
            skipped=[*manifest.skipped],
        )


def _url_entry(url: str, sha256: str, arch: str) -> CatalogEntry:
    """What stands for a catalog entry when a bundle is pulled by its address; `arch` '' accepts any."""
    shown = download.public_url(url)
    if not url.startswith(("http://", "https://")):
        raise BangerError(
            Code.INVALID,
            f"{shown!r} is not an http or https URL",
            hint="write images without a scheme, as ghcr.io/org/kernel:6.12, and give files to 'banger kernel import'",
        )
    if len(sha256) != 64 or sha256.strip("0123456789abcdef"):
        raise BangerError(
            Code.INVALID,
            f"{sha256!r} is not the SHA-256 of a bundle"
            if sha256
            else f"{shown!r} cannot be checked without a SHA-256",
            hint="give what its publisher says: --sha256 with 64 hexadecimal digits",
        )
    file = shown.partition("?")[0].partition("#")[0].rpartition("/")[2]
    name = next((file.removesuffix(suffix) for suffix in _BUNDLE_SUFFIXES if file.endswith(suffix)), file)
    return CatalogEntry(name, "", arch, "", "bundle", tarball_url=url, tarball_sha256=sha256, origin="")


def _catalog_info(entry: CatalogEntry, state: str) -> m.CatalogKernel:
    return m.CatalogKernel(
        name=entry.name,
        origin=entry.origin,
        distro=entry.distro,
        arch=entry.arch,
        kernel_version=entry.kernel_version,
        kind=entry.kind,
        description=entry.description,
        size_bytes=entry.size_bytes,
        state=state,
    )


def _in_use(name: str, vms: list[str], images: list[str]) -> BangerError:
    users = [
        f"the {what}{'s' if len(names) > 1 else ''} {_listed(names)}"
        for what, names in (("VM", vms), ("image", images))
        if names
    ]
    return BangerError(
        Code.IN_USE,
        f"the kernel {name!r} is used by {' and '.join(users)}",
        hint=f"they keep their own copies: remove it all the same with 'banger kernel rm --force {name}'",
    )


def _disk_usage(entry: Path) -> int:
    return sum(file.stat().st_blocks * 512 for file in os.scandir(entry) if file.is_file())


def _listed(names: list[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def _source(path: str) -> Path:
    return HOST if path == str(HOST) else absolute_path(path)
