"""Requests and responses of the operations on VMs."""

from __future__ import annotations

from dataclasses import field

from banger.api.models.base import Model


class PublishedPort(Model):
    """TCP `address`:`host_port` on the host leads to `guest_port` in the guest."""

    address: str
    host_port: int
    guest_port: int


class VmInfo(Model):
    """A VM. `state` is created, starting, running, stopping, stopped, restarting, removing or broken.

    `reason` says why it is not running, `warnings` what it has lost while it runs.

    `exposed_ports` (8080/tcp) and `volumes` are those of its image. It stops when untouched for `auto_stop` seconds (0:
    never); `restarts` is how often in a row its restart policy has started it. `status` is how its main command ended,
    None while it has not. `pending` names the settings that apply at its next start, `next_vcpu`, `next_memory_bytes`
    and `next_ports` are their values (0 and None: as now). `balloon`: its guest gives back memory that it leaves idle.
    `init` is what was asked for, auto, agent, image or command, and `pid1` who was PID 1 at the last start ('' before).
    """

    id: str
    name: str
    state: str
    reason: str
    image: str
    kernel: str
    arch: str
    driver: str
    driver_reason: str
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
    warnings: list[str] = field(default_factory=list)
    labels: dict[str, str] = field(default_factory=dict)
    auto_stop: float = 0.0
    restart: str = "no"
    restarts: int = 0
    status: int | None = None
    pending: list[str] = field(default_factory=list)
    balloon: bool = False
    next_vcpu: int = 0
    next_memory_bytes: int = 0
    next_ports: list[PublishedPort] | None = None
    pid1: str = ""


class VmList(Model):
    vms: list[VmInfo]


class VmCreate(Model):
    """What `vm create` and `vm run` decide. Zero and '' mean the configured default.

    `env` holds NAME=VALUE, `publish` [[ADDR:]HOST:]GUEST[/tcp], ports or ranges of them, with free ones for HOST unless
    given; `publish_all` adds each TCP port that the image exposes. `command` empty: the image's own, else a login
    shell; `entrypoint` replaces the image's when it is not None; `shell` asks for a login shell whatever the image
    says. `stop_signal` is the name or number of what `vm stop` sends to the command first; '' means the image's, else
    SIGTERM. `vmm` is
    auto, firecracker or qemu, '' means as configured. `auto_stop`: it stops when untouched for so many seconds (0:
    never, None: as configured); `restart` is no, on-failure, on-failure:N or always, '' means no. `balloon`: its guest
    gives back memory that it leaves idle (None: as configured). `init` says who is PID 1: agent, image (an init of the
    image), command (the main command, in a PID namespace), or auto, which '' means unless the image says image.
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
    vmm: str = ""
    labels: dict[str, str] = field(default_factory=dict)
    auto_stop: float | None = None
    restart: str = ""
    balloon: bool | None = None


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
