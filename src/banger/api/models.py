"""Requests and responses of every operation: plain dataclasses, so that the CLI need not import pydantic."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import dataclass_transform


@dataclass_transform(frozen_default=True, field_specifiers=(field,))
class Model:
    """What makes its subclasses dataclasses: they count as frozen, which the type checker sees to.

    Only their constructors are generated. Every method of every class that is generated costs each start of the command
    line 0.1 ms, 15 ms in all.
    """

    def __init_subclass__(cls) -> None:
        dataclass(eq=False, repr=False)(cls)

    def __eq__(self, other: object) -> bool:
        return type(other) is type(self) and vars(other) == vars(self)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{name}={value!r}' for name, value in vars(self).items())})"


class Empty(Model):
    """A request or response without content."""


# Kernels ---------------------------------------------------------------------------------------------------------


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


class NameRequest(Model):
    name: str


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


class CatalogAdd(Model):
    """A further catalog: `location` is a URL or the absolute path of a file, `public_key` minisign's or ''."""

    location: str
    name: str = ""
    public_key: str = ""


class CatalogInfo(Model):
    """A catalog to pull from; `updated` is what it says of itself, `refreshed_at` when it was fetched."""

    name: str
    location: str
    public_key: str
    entries: int
    updated: str
    refreshed_at: str
    problem: str = ""


class CatalogList(Model):
    catalogs: list[CatalogInfo]


class CatalogRefresh(Model):
    """No `names` means all catalogs."""

    names: list[str] = field(default_factory=list)


# Images ----------------------------------------------------------------------------------------------------------


class ImageInfo(Model):
    """An entry of the local image catalog; `problem` is '' for a usable one.

    One that is not `managed` is the file `source`, registered where it is, with the work-seed at `work_seed` or ''.
    `size_bytes` is that of the root filesystem, `sha256` its digest. `own_kernel`: it boots a kernel that was given
    with it. `digest` is what its reference stood for in the registry, `layers` how many it was made of; `created` and
    `labels` come from its OCI configuration. `vms` are the VMs made of it.
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


# VMs -------------------------------------------------------------------------------------------------------------


class PublishedPort(Model):
    """TCP `address`:`host_port` on the host leads to `guest_port` in the guest."""

    address: str
    host_port: int
    guest_port: int


class VmInfo(Model):
    """A VM. `state` is created, starting, running, stopping or stopped; `reason` says why it is not running.

    `exposed_ports` (8080/tcp) and `volumes` are those of its image.
    """

    id: str
    name: str
    state: str
    reason: str
    image: str
    kernel: str
    arch: str
    driver: str
    accelerator: str
    machine: str
    vcpu: int
    memory_bytes: int
    disk_bytes: int
    home_bytes: int
    used_bytes: int
    init: str
    net: str
    ports: list[PublishedPort]
    exposed_ports: list[str]
    volumes: list[str]
    env: list[str]
    user: str
    workdir: str
    command: list[str]
    stop_signal: str
    auto_remove: bool
    created_at: str
    started_at: str
    pid: int
    directory: str


class VmList(Model):
    vms: list[VmInfo]


class VmCreate(Model):
    """What `vm create` and `vm run` decide. Zero and '' mean the configured default.

    `env` holds NAME=VALUE, `publish` [[ADDR:]HOST:]GUEST, with a free port for HOST unless given; `publish_all` adds
    each TCP port that the image exposes. `command` empty: the image's own, else a login shell; `entrypoint` replaces
    the image's when it is not None; `shell` asks for a login shell whatever the image says. `stop_signal` is the name
    or number of what `vm stop` sends to the command first; '' means the image's, else SIGTERM.
    """

    image: str = ""
    kernel: str = ""
    name: str = ""
    vcpu: int = 0
    memory_bytes: int = 0
    disk_bytes: int = 0
    home_bytes: int = 0
    env: list[str] = field(default_factory=list)
    workdir: str = ""
    user: str = ""
    net: str = ""
    publish: list[str] = field(default_factory=list)
    publish_all: bool = False
    auto_remove: bool = False
    init: str = ""
    entrypoint: str | None = None
    shell: bool = False
    command: list[str] = field(default_factory=list)
    stop_signal: str = ""


class VmRef(Model):
    """`vm` is a name, an id or a unique prefix of an id."""

    vm: str


class Timing(Model):
    """How long one stage took."""

    stage: str
    seconds: float


class VmStarted(Model):
    vm: VmInfo
    timings: list[Timing]


class VmStop(Model):
    """`grace` is in seconds; None means the configured default."""

    vm: str
    grace: float | None = None


class VmStopped(Model):
    """`forced`: the guest did not go down by itself within the grace period."""

    vm: VmInfo
    forced: bool


class VmRemove(Model):
    vm: str
    force: bool = False


class VmRemoved(Model):
    names: list[str]
    freed_bytes: int


class GuestPath(Model):
    """`follow`: a symbolic link at `path` is followed."""

    vm: str
    path: str
    follow: bool = True


class GuestStat(Model):
    """stat(2) of a path in a guest; `link` is the target of a symbolic link, else ''."""

    mode: int
    uid: int
    gid: int
    size: int
    mtime_ns: int
    link: str


# Streams: the first message of a WebSocket; the rest is described in operations.py ---------------------------------


class Terminal(Model):
    rows: int
    columns: int


class VmExec(Model):
    """Run a command in a running VM. `argv` empty: a login shell. `terminal` None: separate stdout and stderr."""

    vm: str
    argv: list[str]
    env: list[str] = field(default_factory=list)
    workdir: str = ""
    user: str = ""
    terminal: Terminal | None = None
    detach: bool = False


class VmRun(Model):
    """Create a VM, start it and run its command, attached unless `detach`. `env` goes to this command only."""

    create: VmCreate
    terminal: Terminal | None = None
    env: list[str] = field(default_factory=list)
    detach: bool = False


class TreeWrite(Model):
    """A tar stream follows as input and is extracted below `path`; `user` becomes the owner of all, '' keeps them."""

    vm: str
    path: str
    user: str = ""


class TreeRead(Model):
    """The tree at `path` comes as a tar stream; `contents`: its members without the directory itself."""

    vm: str
    path: str
    follow: bool = False
    contents: bool = False


class VmLogs(Model):
    """The main command's output, or the console's; `tail` lines from the end (None: all), then what comes."""

    vm: str
    console: bool = False
    follow: bool = False
    tail: int | None = None


# The daemon ------------------------------------------------------------------------------------------------------


class DaemonStatus(Model):
    """`uptime` in seconds; `resident_bytes` is the daemon's own memory."""

    pid: int
    socket: str
    version: str
    uptime: float
    resident_bytes: int
    state_directory: str
    log_file: str
    vms_running: int
    busy: int
    driver: str
    driver_reason: str


class DaemonLogs(Model):
    """`tail` lines from the end (None: all), then what comes."""

    follow: bool = False
    tail: int | None = None


class Check(Model):
    """One line of `banger doctor`: `status` is ok, warn or fail."""

    name: str
    status: str
    message: str
    fix: str = ""


class Doctor(Model):
    checks: list[Check]
