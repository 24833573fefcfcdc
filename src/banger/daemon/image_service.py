"""Images: the local catalog, importing, registering, pulling, copying, exporting, removing."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Protocol

from banger import archives, entries, system
from banger.api import models as m
from banger.api.errors import BangerError, Code
from banger.catalogs.format import with_states
from banger.catalogs.local import Catalogs
from banger.config import Config
from banger.daemon.catalog_service import CatalogService
from banger.daemon.image_info import image_info
from banger.daemon.image_pulls import BundleFetch, ImagePulls, Kernels
from banger.daemon.jobs import Report, Workers
from banger.hostpackages import Use
from banger.imagecat import configuration, fetch, oci
from banger.imagecat import manifest as images
from banger.imagecat.build import finalize_rootfs
from banger.imagecat.bundle import bundle_entry, write_image_bundle
from banger.imagecat.catalog import IMAGES, CatalogEntry, revision
from banger.imagecat.copies import hold_image, promote_image, tag_image
from banger.imagecat.export import export_oci
from banger.imagecat.importer import import_image
from banger.imagecat.manifest import ImageManifest
from banger.imagecat.register import KernelFiles, register_image
from banger.job import Job
from banger.kernelcat import manifest as kernels
from banger.kernelcat.manifest import KernelManifest
from banger.oci.blobs import BlobCache
from banger.paths import Layout, absolute_path


class ImageUsers(Protocol):
    """Who uses an image."""

    def vms_with_image(self, name: str) -> list[str]: ...


class ImageService:
    """The operations on images; those on their catalogs are those of `catalogs`.

    `pull_and_flatten`, `finalize_pulled_rootfs` and `bundle_fetch` reach beyond this host: tests put their own there.
    `publication` is the publication window: held while names are resolved and entries renamed, never during downloads
    and builds.
    """

    def __init__(
        self,
        layout: Layout,
        config: Config,
        workers: Workers,
        publication: threading.Lock,
        users: ImageUsers,
        kernels: Kernels,
        *,
        pull_and_flatten: oci.Flatten = oci.pull_and_flatten,
        finalize_pulled_rootfs: oci.Finalize = finalize_rootfs,
        bundle_fetch: BundleFetch = fetch.fetch_image,
    ) -> None:
        self._layout = layout
        self._config = config
        self._workers = workers
        self._publication = publication
        self._users = users
        self._kernels = kernels
        self._catalogs = Catalogs(IMAGES, layout.image_catalogs)
        self.catalogs = CatalogService(self._catalogs, workers)
        self._cache = BlobCache(layout.blobs, config.cache_size)
        self._pulls = ImagePulls(
            layout,
            config,
            workers,
            publication,
            kernels,
            self._catalogs,
            self._cache,
            pull_and_flatten=pull_and_flatten,
            finalize_pulled_rootfs=finalize_pulled_rootfs,
            bundle_fetch=bundle_fetch,
        )

    # unmanaged files may lie on filesystems that are slow to answer: images are read by the workers

    async def image_list(self, request: m.Empty, report: Report) -> m.ImageList:
        def work(job: Job) -> m.ImageList:
            good, broken = images.list_local(self._layout.images)
            listed = [self._info(manifest) for manifest in good]
            listed += [m.ImageInfo(entry.name, problem=entry.reason, vms=self._vms(entry.name)) for entry in broken]
            return m.ImageList(sorted(listed, key=lambda image: image.name))

        return await self._workers.run(work)

    async def image_show(self, request: m.NameRequest, report: Report) -> m.ImageInfo:
        return await self._workers.run(lambda job: self._info(images.read_local(self._layout.images, request.name)))

    async def image_history(self, request: m.NameRequest, report: Report) -> m.ImageHistory:
        def work(job: Job) -> m.ImageHistory:
            manifest = images.read_local(self._layout.images, request.name)
            steps = configuration.history(configuration.read(self._layout.images / request.name), manifest)
            return m.ImageHistory([m.ImageStep(**asdict(step)) for step in steps])

        return await self._workers.run(work)

    async def image_verify(self, request: m.ImageVerify, report: Report) -> m.ImageChecks:
        def work(job: Job) -> m.ImageChecks:
            directory = self._layout.images
            if request.names:
                return m.ImageChecks(
                    [m.ImageCheck(name, images.verify_local(directory, name, job)) for name in request.names]
                )
            checks = []
            for name in entries.names(directory):
                with _absent_ignored():  # it was removed meanwhile
                    checks.append(m.ImageCheck(name, images.verify_local(directory, name, job)))
            return m.ImageChecks(checks)

        return await self._workers.run(work, report)

    async def image_delete(self, request: m.ImageDelete, report: Report) -> m.Empty:
        def work(job: Job) -> None:
            with self._publication:
                users = self._users.vms_with_image(request.name)
                exists = (self._layout.images / request.name).exists()  # they may name one that is gone
                if exists and users and not request.force:
                    raise _in_use(request.name, users)
                images.delete_local(self._layout.images, request.name)

        await self._workers.run(work)
        return m.Empty()

    async def image_prune(self, request: m.ImagePrune, report: Report) -> m.ImagesRemoved:
        def work(job: Job) -> m.ImagesRemoved:
            removed, freed = [], 0
            for name in entries.names(self._layout.images):
                with self._publication, _absent_ignored():
                    if self._users.vms_with_image(name) or not (request.all or self._is_broken(name)):
                        continue
                    size = images.own_bytes(self._layout.images / name)
                    if not request.dry_run:
                        images.delete_local(self._layout.images, name)
                    removed.append(name)
                    freed += size
            return m.ImagesRemoved(removed, freed)

        return await self._workers.run(work)

    def _is_broken(self, name: str) -> bool:
        try:
            images.read_local(self._layout.images, name)
        except BangerError as error:
            if error.code is not Code.CORRUPT:
                raise
            return True
        return False

    async def image_promote(self, request: m.NameRequest, report: Report) -> m.ImageInfo:
        return await self._workers.run(
            lambda job: self._info(
                promote_image(self._layout.images, request.name, job, publishing=lambda: self._publication)
            ),
            report,
        )

    async def image_tag(self, request: m.ImageTag, report: Report) -> m.ImageInfo:
        return await self._workers.run(
            lambda job: self._info(
                tag_image(
                    self._layout.images,
                    request.source,
                    request.target,
                    job,
                    replace=request.force,
                    publishing=lambda: self._publication,
                )
            ),
            report,
        )

    async def image_export(self, request: m.ImageExport, report: Report) -> m.ImageExported:
        output = absolute_path(request.output)
        if request.format not in ("oci", "bundle"):
            raise BangerError(Code.INVALID, f"{request.format!r} is not a format of exports", hint="use oci or bundle")

        def work(job: Job) -> m.ImageExported:
            with system.staging(self._layout.images, "export") as staged:
                held = staged / "entry"
                manifest = hold_image(self._layout.images, request.name, held)
                if request.format == "bundle":
                    with archives.new_file(output, request.force) as stream:
                        write_image_bundle(held, manifest, stream, job)
                    entry = bundle_entry(manifest, output, request.url, job)
                    return m.ImageExported(str(output), f"sha256:{entry.tarball_sha256}", entry.size_bytes, entry)
                exported = export_oci(held, manifest, output, job, replace=request.force)
            return m.ImageExported(str(output), exported.digest, exported.size_bytes)

        return await self._workers.run(work, report)

    async def image_import(self, request: m.ImageImport, report: Report) -> m.ImageInfo:
        def work(job: Job) -> m.ImageInfo:
            kernel = self._kernel_entry(request.kernel_ref) if request.kernel_ref else None
            return self._info(
                import_image(
                    self._layout.images,
                    request.name,
                    absolute_path(request.source),
                    job,
                    kernel=kernel,
                    replace=request.force,
                    publishing=lambda: self._publication,
                )
            )

        return await self._workers.run(work, report)

    async def image_register(self, request: m.ImageRegister, report: Report) -> m.ImageInfo:
        return await self._workers.run(
            lambda job: self._info(
                register_image(
                    self._layout.images,
                    request.name,
                    absolute_path(request.rootfs),
                    self._kernel_of(request),
                    job,
                    work_seed=absolute_path(request.work_seed) if request.work_seed else None,
                    replace=request.force,
                    publishing=lambda: self._publication,
                )
            ),
            report,
        )

    def _kernel_of(self, request: m.ImageRegister) -> Path | KernelFiles:
        """The kernel that a registered image is to boot: the directory of an installed one, or the files of its own."""
        files = (request.kernel, request.initrd, request.modules)
        if request.kernel_ref and any(files):
            raise BangerError(
                Code.INVALID, "kernel_ref excludes kernel, initrd and modules", hint="use one kernel or the other"
            )
        if request.kernel_ref:
            return self._kernel_entry(request.kernel_ref)
        if not request.kernel:
            raise BangerError(
                Code.INVALID,
                f"the image {request.name!r} needs a kernel: kernel_ref or kernel",
                hint="see 'banger kernel list', or give the file of one",
            )
        kernel, initrd, modules = (absolute_path(file) if file else None for file in files)
        assert kernel is not None
        return KernelFiles(kernel, initrd, modules)

    def _kernel_entry(self, name: str) -> Path:
        """The directory of an installed kernel that an image is to refer to."""
        try:
            kernels.read_local(self._layout.kernels, name)
        except BangerError as error:
            if error.code is Code.NOT_FOUND:
                nearest = f"{error.hint} " if error.hint.startswith("did you mean") else ""
                error.hint = f"{nearest}run 'banger kernel list'"
            raise
        return self._layout.kernels / name

    async def image_pull(self, request: m.ImagePull, report: Report) -> m.ImageInfo:
        manifest = await self._pulls.pull(request, report)
        return await self._workers.run(lambda job: self._info(manifest))

    async def image_cache_list(self, request: m.Empty, report: Report) -> m.BlobList:
        def work(job: Job) -> m.BlobList:
            users = images.images_by_layer(self._layout.images)
            return m.BlobList(
                [
                    m.BlobInfo(blob.digest, blob.size, blob.used_at, blob.in_use, users.get(blob.digest, []))
                    for blob in self._cache.blobs()
                ]
            )

        return await self._workers.run(work)

    async def image_cache_prune(self, request: m.CachePrune, report: Report) -> m.CachePruned:
        removed = await self._workers.run(lambda job: self._cache.prune(request.keep_bytes))
        return m.CachePruned(len(removed), sum(blob.size for blob in removed))

    async def image_cache_verify(self, request: m.Empty, report: Report) -> m.CacheVerified:
        def work(job: Job) -> m.CacheVerified:
            digests = [blob.digest for blob in self._cache.blobs()]
            return m.CacheVerified(len(digests), self._cache.verify(digests, job))

        return await self._workers.run(work, report)

    async def image_catalog(self, request: m.Empty, report: Report) -> m.ImageCatalog:
        def work(job: Job) -> m.ImageCatalog:
            good, _ = images.list_local(self._layout.images)
            entries, _ = self._catalogs.merged()
            return m.ImageCatalog(
                [_catalog_info(entry, state) for entry, state in with_states(entries, good, revision)]
            )

        return await self._workers.run(work)

    async def ensure_image(self, name: str, report: Report) -> ImageManifest:
        """The local image that a name or a reference means, pulled when it is missing."""
        return await self._pulls.ensure(name, report)

    async def uses(self, image: str, kernel: str) -> set[Use]:
        """What having an image and the kernel of its VM here takes of the host: nothing where both are."""

        def work(job: Job) -> set[Use]:
            there, entry = self._pulls.look(image)
            uses: set[Use] = set() if there else fetch.uses(entry.kind if entry else "oci")
            if there and not kernel and images.kernel_of(self._layout.images, self._layout.kernels, there):
                return uses
            found = there or entry
            own = found.kernel_ref if found else ""
            fetched = {kernel or own or self._config.default_kernel} | ({own} if entry and own else set())
            return uses.union(*map(self._kernels.uses, fetched))

        return await self._workers.run(work)

    async def kernel_for(self, image: ImageManifest, name: str, report: Report) -> tuple[KernelManifest, Path]:
        """The kernel that a VM of `image` boots, and the directory with its files: the one called `name`, else its own.

        A kernel that is missing is pulled from a catalog, unless the image has its own copy.
        """
        held = await self._workers.run(
            lambda job: None if name else images.kernel_of(self._layout.images, self._layout.kernels, image)
        )
        if held is not None:
            return held
        kernel = await self._kernels.ensure(name or image.kernel_ref or self._config.default_kernel, report)
        return kernel, self._layout.kernels / kernel.name

    def _info(self, manifest: ImageManifest) -> m.ImageInfo:
        return image_info(self._layout.images, manifest, self._vms(manifest.name))

    def _vms(self, image: str) -> list[str]:
        return sorted(self._users.vms_with_image(image))


def _in_use(name: str, users: list[str]) -> BangerError:
    listed = ", ".join(users[:5]) + (f" and {len(users) - 5} more" if len(users) > 5 else "")
    return BangerError(
        Code.IN_USE,
        f"the image {name!r} is used by {listed}",
        hint=f"remove the VMs first: banger vm rm {' '.join(users[:5])}; "
        f"they keep their own copies: 'banger image rm --force {name}' removes it all the same",
    )


@contextlib.contextmanager
def _absent_ignored() -> Iterator[None]:
    try:
        yield
    except BangerError as error:
        if error.code is not Code.NOT_FOUND:
            raise


def _catalog_info(entry: CatalogEntry, state: str) -> m.CatalogImage:
    return m.CatalogImage(
        name=entry.name,
        origin=entry.origin,
        distro=entry.distro,
        arch=entry.arch,
        kind=entry.kind,
        description=entry.description,
        size_bytes=entry.size_bytes,
        state=state,
    )
