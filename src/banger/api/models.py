"""Requests and responses of every operation: plain dataclasses, so that the CLI need not import pydantic."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Empty:
    """A request or response without content."""


# Kernels ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class KernelInfo:
    """An entry of the local kernel catalog; `problem` is '' for a usable one."""

    name: str
    distro: str = ""
    arch: str = ""
    kernel_version: str = ""
    sha256: str = ""
    source: str = ""
    imported_at: str = ""
    size_bytes: int = 0
    problem: str = ""


@dataclass(frozen=True)
class KernelList:
    kernels: list[KernelInfo]


@dataclass(frozen=True)
class CatalogKernel:
    """Something that can be pulled; `state` is pulled or available."""

    name: str
    distro: str
    arch: str
    kernel_version: str
    kind: str
    description: str
    size_bytes: int
    state: str


@dataclass(frozen=True)
class KernelCatalog:
    entries: list[CatalogKernel]


@dataclass(frozen=True)
class NameRequest:
    name: str


@dataclass(frozen=True)
class KernelImport:
    """`sources` are absolute paths of packages, directories or kernel files on the daemon's host."""

    name: str
    sources: list[str]
    distro: str = ""
    arch: str = ""
    kernel_version: str = ""
    force: bool = False


@dataclass(frozen=True)
class KernelPull:
    """`arch` '' means the host's own."""

    name: str
    arch: str = ""
    force: bool = False


# Images ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ImageInfo:
    """An entry of the local image catalog; `problem` is '' for a usable one."""

    name: str
    arch: str = ""
    distro: str = ""
    source: str = ""
    imported_at: str = ""
    sha256: str = ""
    size_bytes: int = 0
    kernel_ref: str = ""
    init: str = ""
    entrypoint: list[str] = field(default_factory=list)
    command: list[str] = field(default_factory=list)
    env: list[str] = field(default_factory=list)
    user: str = ""
    workdir: str = ""
    problem: str = ""


@dataclass(frozen=True)
class ImageList:
    images: list[ImageInfo]


@dataclass(frozen=True)
class CatalogImage:
    """Something that can be pulled; `state` is pulled or available."""

    name: str
    kind: str
    description: str
    state: str


@dataclass(frozen=True)
class ImageCatalog:
    entries: list[CatalogImage]


@dataclass(frozen=True)
class ImageImport:
    """`source` is the absolute path of a tar or a directory on the daemon's host."""

    name: str
    source: str
    kernel_ref: str = ""
    force: bool = False


@dataclass(frozen=True)
class ImagePull:
    name: str
    force: bool = False


# VMs -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PublishedPort:
    """TCP `address`:`host_port` on the host leads to `guest_port` in the guest."""

    address: str
    host_port: int
    guest_port: int


@dataclass(frozen=True)
class VmInfo:
    """A VM. `state` is created, starting, running, stopping or stopped; `reason` says why it is not running."""

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
    env: list[str]
    user: str
    workdir: str
    command: list[str]
    auto_remove: bool
    created_at: str
    started_at: str
    pid: int
    directory: str


@dataclass(frozen=True)
class VmList:
    vms: list[VmInfo]


@dataclass(frozen=True)
class VmCreate:
    """What `vm create` and `vm run` decide. Zero and '' mean the configured default.

    `env` holds NAME=VALUE, `publish` [ADDR:]HOST:GUEST. `command` empty: the image's own, else a login shell;
    `entrypoint` replaces the image's when it is not None; `shell` asks for a login shell whatever the image says.
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
    auto_remove: bool = False
    init: str = ""
    entrypoint: str | None = None
    shell: bool = False
    command: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class VmRef:
    """`vm` is a name, an id or a unique prefix of an id."""

    vm: str


@dataclass(frozen=True)
class Timing:
    """How long one stage took."""

    stage: str
    seconds: float


@dataclass(frozen=True)
class VmStarted:
    vm: VmInfo
    timings: list[Timing]


@dataclass(frozen=True)
class VmStop:
    """`grace` is in seconds; None means the configured default."""

    vm: str
    grace: float | None = None


@dataclass(frozen=True)
class VmStopped:
    """`forced`: the guest did not go down by itself within the grace period."""

    vm: VmInfo
    forced: bool


@dataclass(frozen=True)
class VmRemove:
    vm: str
    force: bool = False


@dataclass(frozen=True)
class VmRemoved:
    names: list[str]
    freed_bytes: int


@dataclass(frozen=True)
class GuestPath:
    """`follow`: a symbolic link at `path` is followed."""

    vm: str
    path: str
    follow: bool = True


@dataclass(frozen=True)
class GuestStat:
    """stat(2) of a path in a guest; `link` is the target of a symbolic link, else ''."""

    mode: int
    uid: int
    gid: int
    size: int
    mtime_ns: int
    link: str


# Streams: the first message of a WebSocket; the rest is described in operations.py ---------------------------------


@dataclass(frozen=True)
class Terminal:
    rows: int
    columns: int


@dataclass(frozen=True)
class VmExec:
    """Run a command in a running VM. `argv` empty: a login shell. `terminal` None: separate stdout and stderr."""

    vm: str
    argv: list[str]
    env: list[str] = field(default_factory=list)
    workdir: str = ""
    user: str = ""
    terminal: Terminal | None = None
    detach: bool = False


@dataclass(frozen=True)
class VmRun:
    """Create a VM, start it and run its command, attached unless `detach`. `env` goes to this command only."""

    create: VmCreate
    terminal: Terminal | None = None
    env: list[str] = field(default_factory=list)
    detach: bool = False


@dataclass(frozen=True)
class TreeWrite:
    """A tar stream follows as input and is extracted below `path`; `user` becomes the owner of all, '' keeps them."""

    vm: str
    path: str
    user: str = ""


@dataclass(frozen=True)
class TreeRead:
    """The tree at `path` comes as a tar stream; `contents`: its members without the directory itself."""

    vm: str
    path: str
    follow: bool = False
    contents: bool = False


@dataclass(frozen=True)
class VmLogs:
    """The main command's output, or the console's; `tail` lines from the end (None: all), then what comes."""

    vm: str
    console: bool = False
    follow: bool = False
    tail: int | None = None


# The daemon ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class DaemonStatus:
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


@dataclass(frozen=True)
class DaemonLogs:
    """`tail` lines from the end (None: all), then what comes."""

    follow: bool = False
    tail: int | None = None


@dataclass(frozen=True)
class Check:
    """One line of `banger doctor`: `status` is ok, warn or fail."""

    name: str
    status: str
    message: str
    fix: str = ""


@dataclass(frozen=True)
class Doctor:
    checks: list[Check]
