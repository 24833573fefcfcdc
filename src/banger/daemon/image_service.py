"""Images: the local catalog, importing, registering, pulling, removing."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Protocol

from banger import system
from banger.api import models as m
from banger.api.errors import BangerError, Code
from banger.api.operations import FETCHING
from banger.config import Config
from banger.daemon.jobs import Report, Shared, Workers
from banger.debian import find_mirror
from banger.imagecat import catalog as image_catalog
from banger.imagecat import manifest as images
from banger.imagecat.debian import pull_debian
from banger.imagecat.importer import import_image, register_image
from banger.imagecat.manifest import ImageManifest
from banger.job import Job, Progress
from banger.kernelcat import manifest as kernels
from banger.kernelcat.manifest import KernelManifest
from banger.paths import Layout, absolute_path
from banger.vmm.detect import host_arch


class ImageUsers(Protocol):
    """Who uses an image."""

    def vms_with_image(self, name: str) -> list[str]: ...


class Kernels(Protocol):
    """Where the kernels of images come from."""

    async def ensure(self, name: str, report: Report) -> KernelManifest: ...


class ImageService:
    """The operations on images.

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
    ) -> None:
        self._layout = layout
        self._config = config
        self._workers = workers
        self._publication = publication
        self._users = users
        self._kernels = kernels
        self._image_pulls: Shared[ImageManifest] = Shared(workers)

    # unmanaged files may lie on filesystems that are slow to answer: images are read by the workers

    async def image_list(self, request: m.Empty, report: Report) -> m.ImageList:
        good, broken = await self._workers.run(lambda job: images.list_local(self._layout.images))
        entries = [_image_info(manifest) for manifest in good]
        entries += [m.ImageInfo(entry.name, problem=entry.reason) for entry in broken]
        return m.ImageList(sorted(entries, key=lambda entry: entry.name))

    async def image_show(self, request: m.NameRequest, report: Report) -> m.ImageInfo:
        return _image_info(await self._read(request.name))

    async def _read(self, name: str) -> ImageManifest:
        return await self._workers.run(lambda job: images.read_local(self._layout.images, name))

    async def image_delete(self, request: m.NameRequest, report: Report) -> m.Empty:
        users = self._users.vms_with_image(request.name)
        if users:
            raise _in_use(request.name, users)

        def work(job: Job) -> None:
            with self._publication:
                images.delete_local(self._layout.images, request.name)

        await self._workers.run(work)
        return m.Empty()

    async def image_import(self, request: m.ImageImport, report: Report) -> m.ImageInfo:
        kernel = self._kernel_entry(request.kernel_ref) if request.kernel_ref else None
        manifest = await self._workers.run(
            lambda job: import_image(
                self._layout.images,
                request.name,
                absolute_path(request.source),
                job,
                kernel=kernel,
                replace=request.force,
                publishing=lambda: self._publication,
            ),
            report,
        )
        return _image_info(manifest)

    async def image_register(self, request: m.ImageRegister, report: Report) -> m.ImageInfo:
        kernel = self._kernel_entry(request.kernel_ref)
        manifest = await self._workers.run(
            lambda job: register_image(
                self._layout.images,
                request.name,
                absolute_path(request.rootfs),
                kernel,
                job,
                work_seed=absolute_path(request.work_seed) if request.work_seed else None,
                replace=request.force,
                publishing=lambda: self._publication,
            ),
            report,
        )
        return _image_info(manifest)

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
        return _image_info(await self._pull_image(request.name, request.force, report))

    async def _pull_image(self, name: str, force: bool, report: Report) -> ImageManifest:
        system.validate_name(name, "image")
        entry = image_catalog.embedded_catalog().find(name)
        report(Progress(FETCHING, f"the image {name}, which takes a minute or more"))
        return await self._image_pulls.run(
            name,
            lambda job: pull_debian(
                self._layout.images,
                entry,
                job,
                mirror=find_mirror(self._config.debian_mirror),
                arch=host_arch(),
                replace=force,
                publishing=lambda: self._publication,
            ),
            report,
        )

    async def image_catalog(self, request: m.Empty, report: Report) -> m.ImageCatalog:
        good, _ = await self._workers.run(lambda job: images.list_local(self._layout.images))
        return m.ImageCatalog(
            [
                m.CatalogImage(entry.name, "debian", entry.description, "pulled" if pulled else "available")
                for entry, pulled in image_catalog.embedded_catalog().annotated({image.name for image in good})
            ]
        )

    async def ensure_image(self, name: str, report: Report) -> ImageManifest:
        """The local image of that name, pulled from the catalog when it is missing."""
        try:
            return await self._read(name)
        except BangerError as error:
            if error.code is not Code.NOT_FOUND:
                raise
            hint = error.hint
        try:
            return await self._pull_image(name, False, report)
        except BangerError as error:
            if error.code is Code.NOT_FOUND and not error.hint:
                error.hint = hint
            raise

    async def kernel_for(self, image: ImageManifest, name: str, report: Report) -> tuple[KernelManifest, Path]:
        """The kernel that a VM of `image` boots, and the directory with its files: the one called `name`, else its own.

        A kernel that is missing is pulled from a catalog, unless the image has its own copy.
        """
        held = None if name else images.kernel_of(self._layout.images, self._layout.kernels, image)
        if held is not None:
            return held
        kernel = await self._kernels.ensure(name or image.kernel_ref or self._config.default_kernel, report)
        return kernel, self._layout.kernels / kernel.name


def _in_use(name: str, users: list[str]) -> BangerError:
    listed = ", ".join(users[:5]) + (f" and {len(users) - 5} more" if len(users) > 5 else "")
    return BangerError(
        Code.IN_USE,
        f"the image {name!r} is used by {listed}",
        hint=f"remove the VMs first: banger vm rm {' '.join(users[:5])}",
    )


def _image_info(manifest: ImageManifest) -> m.ImageInfo:
    return m.ImageInfo(
        name=manifest.name,
        arch=manifest.arch,
        distro=manifest.pretty_name or manifest.distro,
        source=manifest.source,
        imported_at=manifest.imported_at,
        sha256=manifest.rootfs_sha256,
        size_bytes=manifest.size_bytes,
        kernel_ref=manifest.kernel_ref,
        managed=manifest.managed,
        work_seed=manifest.work_seed,
        init=manifest.init,
        entrypoint=list(manifest.config.entrypoint),
        command=list(manifest.config.cmd),
        env=list(manifest.config.env),
        user=manifest.config.user,
        workdir=manifest.config.workdir,
    )
