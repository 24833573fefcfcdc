"""Turns a request for a VM into its record: everything decided, checked, and written down once."""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable, Container, Sequence, Set
from datetime import UTC, datetime

from banger import system
from banger.api.errors import BangerError, Code
from banger.api.models import PublishedPort, VmCreate
from banger.config import Config
from banger.daemon.host_network import HostNetwork
from banger.daemon.vm_policy import parse_restart
from banger.durations import MAX_SECONDS
from banger.guest import agent as guest
from banger.guest.arguments import check_words
from banger.guest.protocol import DiskRole, InitMode
from banger.imagecat import runtime
from banger.imagecat.home import ROOT_HOME
from banger.imagecat.manifest import ImageManifest
from banger.kernelcat.manifest import KernelManifest
from banger.labels import MAX_LABELS, check_label
from banger.net.publish import LOOPBACK, free_ports, parse_publish
from banger.signals import signal_number
from banger.store.records import VmRecord
from banger.vmm import firecracker, qemu
from banger.vmm.choice import FIRECRACKER, QEMU, Choice
from banger.vmm.detect import host_arch
from banger.vmm.machine import Disk, Forward, Machine

KERNEL, BOOT_ARCHIVE, ROOTFS, MODULES = "kernel", "boot.cpio", "rootfs", "modules.squashfs"
OVERLAY, HOME = "overlay.ext4", "work.ext4"

# The least that Debian's kernel and agent boot in; below it the kernel panics for want of memory.
MIN_MEMORY = 128 << 20
MAX_VCPU = 64
_MAX_PUBLISHED = 100
# directories that must not lie on overlayfs: container engines put overlays of their own there
_VOLUMES = ("/var/lib/docker", "/var/lib/containers")

HARDWARE = {QEMU: qemu.hardware, FIRECRACKER: firecracker.hardware}
INIT_MODES = tuple(mode.name.lower() for mode in InitMode)
ROLES = {
    "image": DiskRole.IMAGE,
    "overlay": DiskRole.OVERLAY,
    "home": DiskRole.HOME,
    "modules": DiskRole.MODULES,
}


def check_request(request: VmCreate) -> None:
    """Find what is wrong with a request before anything is fetched or made. Raises BangerError(INVALID)."""
    if request.name:
        system.validate_name(request.name, "VM")
    check_size(request.vcpu, request.memory_bytes)
    if request.init not in ("", *INIT_MODES):
        raise BangerError(Code.INVALID, f"{request.init!r} is not an init mode", hint=f"use {', '.join(INIT_MODES)}")
    for variable in request.env:
        if "=" not in variable or variable.startswith("="):
            raise BangerError(Code.INVALID, f"{variable!r} is not an environment variable", hint="write NAME=VALUE")
    check_words(request.command, request.env)
    for label, value in request.labels.items():
        try:
            check_label(label, value)
        except ValueError as error:
            raise BangerError(Code.INVALID, str(error), hint="write --label NAME=VALUE") from error
    if len(request.labels) > MAX_LABELS:
        raise BangerError(Code.INVALID, f"{len(request.labels)} labels are too many", hint=f"use at most {MAX_LABELS}")
    if request.auto_stop is not None and not 0 <= request.auto_stop <= MAX_SECONDS:
        raise BangerError(
            Code.INVALID, f"a VM cannot stop after {request.auto_stop:g} s", hint="use 0 for never, or up to ten years"
        )
    check_restart(request.restart or "no", request.auto_remove)
    if request.stop_signal:
        try:
            signal_number(request.stop_signal)
        except ValueError as error:
            raise BangerError(Code.INVALID, str(error), hint="use a name or a number: SIGQUIT, 3, RTMIN+3") from error
    places = [(port.address, port.host_port) for port in asked_for(request.publish) if port.host_port]
    for address, host_port in places:
        if places.count((address, host_port)) > 1:
            raise BangerError(
                Code.INVALID, f"port {host_port} on {address} is published twice", hint="publish each port once"
            )


def check_size(vcpu: int, memory_bytes: int) -> None:
    """Raise BangerError(INVALID) when no VM of this host can have so many virtual CPUs or so much memory; 0 is fine."""
    most = min(MAX_VCPU, os.cpu_count() or 1)
    if not 0 <= vcpu <= most:
        why = f"this host has {os.cpu_count()}" if 0 < vcpu <= MAX_VCPU else "that is not possible"
        raise BangerError(Code.INVALID, f"{vcpu} virtual CPUs: {why}", hint=f"use 1 to {most}")
    if memory_bytes and memory_bytes < MIN_MEMORY:
        raise BangerError(
            Code.INVALID,
            f"{memory_bytes >> 20} MiB of memory are less than a kernel needs",
            hint=f"use at least --memory {MIN_MEMORY >> 20}M",
        )
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if memory_bytes > total:
        raise BangerError(
            Code.INVALID,
            f"{system.human_size(memory_bytes)} of memory: this host has {system.human_size(total)}",
            hint=f"use less than --memory {total >> 20}M",
        )


def check_restart(policy: str, auto_remove: bool) -> None:
    """Raise BangerError(INVALID) for what is no restart policy, or is none for a VM that goes when it stops."""
    if parse_restart(policy).kind != "no" and auto_remove:
        raise BangerError(
            Code.INVALID,
            f"a VM that is removed when it stops cannot be restarted ({policy})",
            hint="leave out --rm or --restart",
        )


def plan(
    request: VmCreate,
    config: Config,
    image: ImageManifest,
    kernel: KernelManifest,
    network: HostNetwork,
    taken_names: Container[str],
    taken_uids: Container[int],
    taken_ports: Set[int],
    name: str,
    as_root: bool,
    choice: Choice,
) -> VmRecord:
    """The record of a new VM. Raises BangerError when image, kernel and host do not fit together."""
    arch = host_arch()
    for what, its_name, its_arch in (("image", image.name, image.arch), ("kernel", kernel.name, kernel.arch)):
        if its_arch != arch:
            raise BangerError(
                Code.UNSUPPORTED,
                f"the {what} {its_name!r} is for {its_arch}, this host runs {arch}",
                hint=f"use another one: see 'banger {what} list'",
            )
    machine_type, cpu, firmware, command_line = HARDWARE[choice.driver](arch, choice.accelerator)
    command, image_env = resolve_command(request, image), runtime.environment(image.config)
    check_environment(command, [*image_env, *request.env])
    init = _init_mode(request, image)
    if init in ("image", "auto"):
        # without udev in the image systemd would wait 90 s for this console's device
        command_line += " systemd.mask=serial-getty@ttyS0.service"
    ports = _published(request, image, taken_ports)
    disks = [
        _disk("image", ROOTFS, True, image.filesystem, 0),
        _disk("overlay", OVERLAY, False, "ext4", 1),
        _disk("home", HOME, False, "ext4", 2),
    ]
    if kernel.modules:
        disks.append(_disk("modules", MODULES, True, "squashfs", 3))
    machine = Machine(
        driver=choice.driver,
        accelerator=choice.accelerator,
        arch=arch,
        type=machine_type,
        cpu=cpu,
        firmware=firmware,
        vcpu=request.vcpu or config.vcpu or _usual_vcpu(choice.accelerator),
        memory_bytes=(request.memory_bytes or config.memory) >> 20 << 20,
        memory_backend="ram0",
        kernel=KERNEL,
        initrd=BOOT_ARCHIVE,
        command_line=command_line,
        disks=disks,
        nics=network.plan(request.net or "user", ports, qemu.FIRST_FREE_SLOT + len(disks)),
        forwards=[Forward(port.address, port.host_port, port.guest_port) for port in ports],
        uid=free_uid(config, taken_uids) if as_root else -1,
    )
    return VmRecord(
        id=secrets.token_hex(6),
        name=name,
        state="created",
        reason="",
        image=image.name,
        image_sha256=image.rootfs_sha256,
        kernel=kernel.name,
        created_at=now(),
        started_at="",
        init=init,
        net=request.net or "user",
        ports=ports,
        image_env=image_env,
        env=list(request.env),
        user=request.user or image.config.user,
        workdir=request.workdir or runtime.workdir(image.config),
        command=command,
        auto_remove=request.auto_remove,
        attached=False,
        machine=machine,
        volumes=runtime.volumes(image.config, image.home),
        exposed_ports=runtime.exposed_ports(image.config),
        stop_signal=request.stop_signal or runtime.stop_signal(image.config),
        home=image.home,
        driver_reason=choice.reason,
        labels=dict(request.labels),
        auto_stop=config.auto_stop if request.auto_stop is None else request.auto_stop,
        restart=request.restart or "no",
        healthcheck=list(image.config.healthcheck),
        init_command=_init_command(request, image),
        beside=_beside(request, image),
        balloon=config.balloon if request.balloon is None else request.balloon,
    )


def resolve_command(request: VmCreate, image: ImageManifest) -> list[str]:
    """The main command by the rules of container engines; [] stands for a login shell."""
    if request.shell:
        return []
    if request.entrypoint is not None:
        return [word for word in (request.entrypoint,) if word] + request.command
    return [*image.config.entrypoint, *(request.command or image.config.cmd)]


def _init_mode(request: VmCreate, image: ImageManifest) -> str:
    """Who is to be PID 1: what is asked for, or what the image's maker says, or what its command turns out to be."""
    return request.init or ("image" if image.init == "image" and not runtime.wants_own_init(image.config) else "auto")


def _has_own_init(request: VmCreate, image: ImageManifest) -> bool:
    """Whether the image's own command is an init by its place, and is not replaced."""
    return request.entrypoint is None and runtime.wants_own_init(image.config)


def _init_options(request: VmCreate, image: ImageManifest) -> bool:
    """Whether the words of a request are options of the init that the image has as its entrypoint."""
    return bool(image.config.entrypoint) and request.command[:1] != [] and request.command[0].startswith("-")


def _init_command(request: VmCreate, image: ImageManifest) -> list[str]:
    """What an init of the image is started with: its own command, whatever else is to run."""
    if _has_own_init(request, image):
        own = request.command if _init_options(request, image) else image.config.cmd
        return [*image.config.entrypoint, *own]
    return [] if _init_mode(request, image) == "image" else resolve_command(request, image)


def _beside(request: VmCreate, image: ImageManifest) -> list[str]:
    """The main command of a guest whose PID 1 is an init of the image."""
    if _has_own_init(request, image):
        return [] if _init_options(request, image) else request.command
    return resolve_command(request, image) if _init_mode(request, image) == "image" else []


def main_command(request: VmCreate, image: ImageManifest, pid1: str) -> list[str]:
    """The main command of a new VM, [] for a login shell, once it is known who is PID 1."""
    return _beside(request, image) if pid1 == "image" and not request.shell else resolve_command(request, image)


def command_at_start(record: VmRecord) -> list[str]:
    """The main command that a VM runs at each start, [] for none."""
    return record.beside if record.pid1 == "image" and record.beside is not None else record.command


def asked_for(publish: Sequence[str]) -> list[PublishedPort]:
    """The ports that these texts publish; raises BangerError(INVALID)."""
    return [port for text in publish for port in parse_publish(text)]


def _published(request: VmCreate, image: ImageManifest, taken: Set[int]) -> list[PublishedPort]:
    """The ports that a request publishes, with free ones of this host where it leaves the choice."""
    ports = asked_for(request.publish)
    if request.publish_all:
        exposed = [port.removesuffix("/tcp") for port in runtime.exposed_ports(image.config)]
        named = {port.guest_port for port in ports}
        ports += [
            PublishedPort(LOOPBACK, 0, int(port)) for port in exposed if port.isdigit() and int(port) not in named
        ]
    if len(ports) > _MAX_PUBLISHED:
        raise BangerError(
            Code.INVALID,
            f"{len(ports)} ports are too many to publish",
            hint=f"publish at most {_MAX_PUBLISHED}, those that you need, with -p",
        )
    taken = taken | {port.host_port for port in ports}
    free = iter(free_ports(sum(not port.host_port for port in ports), taken))
    return [PublishedPort(port.address, port.host_port or next(free), port.guest_port) for port in ports]


def stop_signal(record: VmRecord) -> int:
    """What the main command of a VM gets first when it is stopped; 0: nothing."""
    return 0 if (record.pid1 or record.init) == "image" else signal_number(record.stop_signal)


def guest_config(
    record: VmRecord, keys: Sequence[str], serial: Callable[[Disk], str] = lambda disk: disk.serial
) -> guest.GuestConfig:
    """What the agent of a VM is told at every boot; `keys` are lines for authorized_keys."""
    nics = record.machine.nics
    return guest.GuestConfig(
        hostname=record.name,
        interfaces=tuple(
            guest.Interface(nic.mac, tuple(nic.addresses), (nic.gateway,) if nic.gateway else ()) for nic in nics
        ),
        nameservers=tuple(server for nic in nics for server in nic.nameservers),
        environment=environment([*record.image_env, *record.env]),
        disks=tuple(
            guest.Disk(
                serial(disk),
                ROLES[disk.role],
                disk.filesystem,
                # an agent from before there were other homes knows no target of this role
                target=record.home if disk.role == "home" and record.home != ROOT_HOME else "",
                readonly=disk.readonly,
            )
            for disk in record.machine.disks
        ),
        keys=tuple(keys),
        init=InitMode[record.init.upper()],
        words=tuple(record.init_command),
        workdir=record.workdir,
        volumes=(*_VOLUMES, *record.volumes),
        directories=tuple(path for path in (record.workdir,) if runtime.is_plain_path(path)),
    )


def directory(record: VmRecord, argv: Sequence[str]) -> str | None:
    """Where a command of a VM starts; None: at home, where a login shell does unless its image names another place."""
    return record.workdir if argv and record.workdir else record.workdir.removesuffix("/") or None


def check_environment(command: Sequence[str], variables: list[str]) -> None:
    """Raise CANNOT_EXECUTE when a command has more than Linux takes of words and NAME=VALUE, the last of a name."""
    check_words(command, (f"{name}={value}" for name, value in environment(variables).items()))


def environment(variables: list[str]) -> dict[str, str]:
    """NAME=VALUE strings as a mapping, the last of a name winning."""
    return dict(variable.split("=", 1) for variable in variables)


def now() -> str:
    """UTC in RFC 3339."""
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def _disk(role: str, path: str, readonly: bool, filesystem: str, index: int) -> Disk:
    return Disk(
        id=role,
        path=path,
        format="raw",
        backing="",
        readonly=readonly,
        serial=f"banger-{role}",
        role=role,
        filesystem=filesystem,
        slot=qemu.FIRST_FREE_SLOT + index,
    )


def _usual_vcpu(accelerator: str) -> int:
    """One where guests are emulated: about one in a hundred boots with two hung in QEMU 7.2 (docs/performance.md)."""
    return 1 if accelerator == "tcg" else min(2, os.cpu_count() or 1)


def free_uid(config: Config, taken: Container[int]) -> int:
    """A user of the configured range that no VM runs as. Raises BangerError(EXHAUSTED)."""
    users = range(config.first_vm_uid, config.first_vm_uid + config.vm_uids)
    begin = secrets.randbelow(len(users))  # not always the same, of which a file of an earlier VM may be left
    for index in range(len(users)):
        if (uid := users[(begin + index) % len(users)]) not in taken:
            return uid
    raise BangerError(
        Code.EXHAUSTED,
        f"all {len(users)} users from {config.first_vm_uid} on have a VM",
        hint="remove VMs, or raise vm_uids in config.toml",
    )
