"""Requests and responses of the operations on images."""

from __future__ import annotations

from dataclasses import field

from banger.api.models.base import Model


class ImageInfo(Model):
    """An entry of the local image catalog; `problem` is '' for a usable one.

    One that is not `managed` is the file `source`, registered where it is, with the work-seed at `work_seed` or ''.
    `size_bytes` is that of the root filesystem, `sha256` its digest. `own_kernel`: it boots a kernel that was given
    with it. `digest` is what its reference stood for in the registry, `layers` how many it was made of; `created` and
    `labels` come from its OCI configuration. `vms` are the VMs made of it. `warnings` tell what VMs leave out of `env`.
    """

    name: str
    arch: str = ""
    distro: str = ""
    source: str = ""
    imported_at: str = ""
    sha256: str = ""
    size_bytes: int = 0
    kernel_ref: str = ""
    managed: bool = True
    work_seed: str = ""
    init: str = ""
    entrypoint: list[str] = field(default_factory=list)
    command: list[str] = field(default_factory=list)
    env: list[str] = field(default_factory=list)
    user: str = ""
    workdir: str = ""
    problem: str = ""
    own_kernel: bool = False
    home: str = ""
    origin: str = ""
    digest: str = ""
    layers: int = 0
    created: str = ""
    volumes: list[str] = field(default_factory=list)
    exposed_ports: list[str] = field(default_factory=list)
    stop_signal: str = ""
    labels: dict[str, str] = field(default_factory=dict)
    vms: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)


class ImageList(Model):
    images: list[ImageInfo]


class CatalogImage(Model):
    """Something that can be pulled, from the catalog `origin`; `state` is pulled, available or outdated."""

    name: str
    origin: str
    distro: str
    arch: str
    kind: str
    description: str
    size_bytes: int
    state: str


class ImageCatalog(Model):
    entries: list[CatalogImage]


class ImageImport(Model):
    """`source` is the absolute path of a tar or a directory on the daemon's host."""

    name: str
    source: str
    kernel_ref: str = ""
    force: bool = False


class ImageRegister(Model):
    """`rootfs` (ext4 or squashfs) and `work_seed` (ext4, or '') are absolute paths on the daemon's host.

    The kernel is either an installed one, `kernel_ref`, or made of the files at the absolute paths `kernel`, `initrd`
    and `modules` (a lib/modules/<version> directory), of which only the first is needed.
    """

    name: str
    rootfs: str
    kernel_ref: str = ""
    work_seed: str = ""
    force: bool = False
    kernel: str = ""
    initrd: str = ""
    modules: str = ""


class ImageDelete(Model):
    """`force` also removes one that VMs use; they keep their own copies of its files."""

    name: str
    force: bool = False


class ImageTag(Model):
    """Give the image `source` the further name `target`."""

    source: str
    target: str
    force: bool = False


class ImageStep(Model):
    """A step of an image's history; `created` is RFC 3339 or '', `size_bytes` that of the layer as it was pulled."""

    created: str
    created_by: str
    size_bytes: int
    comment: str


class ImageHistory(Model):
    """The steps that an image was made by, the last first."""

    steps: list[ImageStep]


class ImagePrune(Model):
    """Remove broken images, or with `all` every one, but for those that VMs use. `dry_run` only tells which."""

    all: bool = False
    dry_run: bool = False


class ImagesRemoved(Model):
    names: list[str]
    freed_bytes: int


class ImageVerify(Model):
    """No `names` means all images."""

    names: list[str] = field(default_factory=list)


class ImageCheck(Model):
    """What re-reading an image found; `problem` is '' when all is well."""

    name: str
    problem: str = ""


class ImageChecks(Model):
    images: list[ImageCheck]


class ImageExport(Model):
    """`output` is an absolute path on the daemon's host; `format` is oci or bundle.

    Of `oci` a directory becomes an OCI layout, a file that ends in .tar an archive of one. `url` is where a bundle will
    be published.
    """

    name: str
    output: str
    format: str = "oci"
    url: str = ""
    force: bool = False


class ImageBundleEntry(Model):
    """The catalog entry of an exported image bundle, as it stands in a catalog file."""

    name: str
    kind: str
    distro: str
    arch: str
    kernel_ref: str
    tarball_url: str
    tarball_sha256: str
    size_bytes: int
    description: str


class ImageExported(Model):
    """What was written; `digest` is that of the OCI manifest or of the bundle, of which there is an `entry` too."""

    output: str
    digest: str
    size_bytes: int
    entry: ImageBundleEntry | None = None


class ImagePull(Model):
    """`name` is a name in a catalog, perhaps with its origin, a reference to an image of a registry, or an image in
    files: oci:DIR[:TAG], oci-archive:FILE[:TAG] or docker-archive:FILE[:REF] with absolute paths.

    `save_as` '' means the name that follows from it; `platform` (linux/arm64/v8) '' the host's own. `kernel_ref` names
    the kernel that the image is to refer to.
    """

    name: str
    save_as: str = ""
    platform: str = ""
    kernel_ref: str = ""
    force: bool = False


class BlobInfo(Model):
    """A layer in the cache, `used_at` in seconds since 1970; `images` were made of it, and need it no more."""

    digest: str
    size_bytes: int
    used_at: float
    in_use: bool
    images: list[str]


class BlobList(Model):
    """The least recently used first."""

    blobs: list[BlobInfo]


class CachePrune(Model):
    """The least recently used blobs go until `keep_bytes` are left; never those that are being read."""

    keep_bytes: int = 0


class CachePruned(Model):
    blobs: int
    freed_bytes: int


class CacheVerified(Model):
    """How many blobs were read, and the digests of those that were damaged and have been removed."""

    blobs: int
    removed: list[str]
