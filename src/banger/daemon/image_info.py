"""How the API tells of an image."""

from __future__ import annotations

from pathlib import Path

from banger.api import models as m
from banger.imagecat import configuration, runtime
from banger.imagecat.manifest import ImageManifest


def image_info(images_dir: Path, manifest: ImageManifest, vms: list[str]) -> m.ImageInfo:
    """All there is to know about an image that `vms` use."""
    config = configuration.read(images_dir / manifest.name)
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
        own_kernel=manifest.own_kernel,
        home=manifest.home,
        origin=manifest.origin,
        digest=manifest.revision,
        layers=len(manifest.layers),
        created=configuration.created(config),
        volumes=list(manifest.config.volumes),
        exposed_ports=list(manifest.config.exposed_ports),
        stop_signal=manifest.config.stop_signal,
        labels=configuration.labels(config),
        vms=vms,
        warnings=runtime.warnings(manifest.config),
    )
