"""The QEMU driver: with KVM where that works, emulated (TCG) everywhere else."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
import os
import re
import signal
import socket
from collections.abc import Mapping, Sequence
from pathlib import Path

from banger.api.codec import Json
from banger.api.errors import BangerError, Code
from banger.guest.protocol import AGENT_PORT, LOG_PORT
from banger.guest.session import SessionLost
from banger.net import publish
from banger.net.tap import Namespaces
from banger.process import ProcessId, Watched, find_by_arguments, spawn
from banger.system import bind_unix, connect_unix
from banger.vmm import cgroups, detect
from banger.vmm.confinement import Confinement, confine
from banger.vmm.driver import CONSOLE, LOG, MESSAGES, NETWORK, PANICKED, POWERED_OFF, RESET_AT_BOOT, Published
from banger.vmm.machine import Disk, Forward, Machine, Nic
from banger.vmm.qmp import Qmp
from banger.vmm.words import own_words

_log = logging.getLogger(__name__)

# Slots below 8 are for devices that every machine has; disks and NICs come after them.
_SLOT_RNG, _SLOT_BALLOON, _SLOT_SERIAL, _SLOT_PANIC = 2, 3, 4, 5
FIRST_FREE_SLOT = 8

QMP_SOCKET, AGENT_SOCKET = "qmp.sock", "agent.sock"
# QEMU listens, and so takes the next helper when one has ended.
_STREAMS = {NETWORK: "network.sock", CONSOLE: "serial.sock", LOG: "output.sock"}
_MESSAGES_PIPE = "messages.pipe"
_ENDED = "QEMU has ended before it could be used"  # the last line of vmm.log then
_LAST_WORDS_SECONDS, _STEP_SECONDS = 2.0, 0.01

_TSC = "tsc=reliable no_timer_check"
_QUIET = "quiet loglevel=3 panic=-1 mitigations=off nokaslr"
# Kernel command lines for emulation; under KVM the guest keeps its own mitigations and address randomisation.
_COMMAND_LINES = {
    ("amd64", "tcg"): f"console=ttyS0 reboot=t {_TSC} {_QUIET}",
    ("amd64", "kvm"): "console=ttyS0 reboot=t quiet loglevel=3 panic=-1",
    ("arm64", "tcg"): f"console=ttyAMA0 {_QUIET}",
    ("arm64", "kvm"): "console=ttyAMA0 quiet loglevel=3 panic=-1",
}
# q35 never hung under TCG where microvm with ACPI did; microvm boots fastest under KVM. See docs/architecture.md.
_MACHINES = {
    ("amd64", "tcg"): ("q35", "vmport=off,smm=off,hpet=off,sata=off,smbus=off"),
    ("amd64", "kvm"): ("microvm", "acpi=on,pcie=on,rtc=on,pit=off,pic=off"),
    ("arm64", "tcg"): ("virt", "gic-version=3"),
    ("arm64", "kvm"): ("virt", "gic-version=host"),
}
# With erms the kernel copies and clears memory by `rep movsb`, which TCG does byte by byte: see docs/performance.md.
# The others are for short strings, and mean nothing without it: with fsrm alone Linux' memmove never ends.
_STRING_FLAGS = ("fsrm", "fzrm", "fsrs", "fsrc")
_RESUME_SECONDS = 1.0
# what a control group lets QEMU have besides the guest's memory and its processors' threads
_OVERHEAD = 512 << 20  # bytes
_TCG_BUFFER = 1 << 30  # bytes: the most that QEMU takes for translated code
_THREADS = 128  # up to 64 of them do I/O for each event loop
_LOW_PORTS = 1024
_LOW_PORTS_WAIT = "QEMU gets the right to ports below 1024 only when it is started"
_STARTED_WITHOUT = "it was started without published ports"
_MAX_MEMORY = 1 << 52  # bytes: what no machine has
_LEAST_BALLOON = 1 << 20
_OPENED = re.compile(r"TCP\[HOST_FORWARD\]\s+[0-9]+\s+(\S+)\s+([0-9]+)\s")  # of `info usernet`
_QMP_SECONDS = 20.0  # a QEMU that has not answered by then is stopped or stuck


def hardware(arch: str, accelerator: str) -> tuple[str, str, str, str]:
    """Machine type (versioned), CPU model, firmware and kernel command line for a new VM."""
    alias, _ = _MACHINES[arch, accelerator]
    # la57 makes the kernel switch paging modes at boot; no guest here needs 57-bit addresses
    cpu = "host" if accelerator == "kvm" else "max,la57=off,erms=off" if arch == "amd64" else "max"
    firmware = "qboot.rom" if alias == "q35" else ""
    machine = detect.versioned_machine(arch, alias)
    return machine, without_string_flags(cpu, arch), firmware, _COMMAND_LINES[arch, accelerator]


def without_string_flags(cpu: str, arch: str) -> str:
    """A CPU model, without all of _STRING_FLAGS that this QEMU knows if it is without erms.

    A VM from before QEMU had one of them needs that as well: `max` is what the QEMU at hand can do. Blocks when QEMU
    was not asked before.
    """
    model, *settings = cpu.split(",")
    if "erms=off" not in settings:
        return cpu
    known = detect.cpu_flags(arch)
    off = [f"{flag}=off" for flag in _STRING_FLAGS if flag in known and f"{flag}=off" not in settings]
    return ",".join([model, *settings, *off])


def command_line(
    machine: Machine, directory: Path, streams: Mapping[str, int], qmp: int, agent: int, files: dict[str, int]
) -> list[str]:
    """QEMU's argument vector. `files` maps paths of the machine to descriptors that QEMU inherits.

    All files are handed over as descriptors, since the user that QEMU runs as may not enter their directory.
    """
    options = _MACHINES[machine.arch, machine.accelerator][1]
    argv = [
        detect.emulator(machine.arch),
        "-name", directory.name,
        "-nodefaults", "-no-user-config",
        "-display", "none",
        "-sandbox", "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny",
        "-machine", f"{machine.type},{options},memory-backend={machine.memory_backend}",
        "-accel", "kvm" if machine.accelerator == "kvm" else "tcg,thread=multi",
        "-cpu", machine.cpu,
        "-smp", str(machine.vcpu),
        "-m", f"size={machine.memory_bytes >> 20}M",
        "-object", f"memory-backend-ram,id={machine.memory_backend},size={machine.memory_bytes}",
        "-rtc", "base=utc",
        "-action", "reboot=shutdown,panic=shutdown",
        "-kernel", f"/proc/self/fd/{files[machine.kernel]}",
        "-initrd", f"/proc/self/fd/{files[machine.initrd]}",
        "-append", machine.command_line,
        "-chardev", f"socket,id=qmp,fd={qmp},server=on,wait=off",
        "-mon", "chardev=qmp,mode=control",
        "-chardev", f"socket,id=console,fd={streams[CONSOLE]},server=on,wait=on",
        "-serial", "chardev:console",
        "-object", "rng-random,id=rng0,filename=/dev/urandom",
        "-device", f"virtio-rng-pci,rng=rng0,addr={_SLOT_RNG}",
        "-device", f"virtio-balloon-pci,id=balloon0,deflate-on-oom=on,free-page-reporting=on,addr={_SLOT_BALLOON}",
        "-device", f"virtio-serial-pci,id=serial0,max_ports=8,addr={_SLOT_SERIAL}",
        "-chardev", f"socket,id=agent,fd={agent},server=on,wait=off",
        "-device", f"virtserialport,bus=serial0.0,nr=1,chardev=agent,name={AGENT_PORT}",
        "-chardev", f"socket,id=log,fd={streams[LOG]},server=on,wait=on",
        "-device", f"virtserialport,bus=serial0.0,nr=2,chardev=log,name={LOG_PORT}",
        "-device", f"pvpanic-pci,addr={_SLOT_PANIC}",
    ]  # fmt: skip
    if machine.firmware:
        argv += ["-bios", machine.firmware]
    for index, disk in enumerate(machine.disks):
        argv += _disk(disk, index, files[disk.path])
    for nic in machine.nics:
        if nic.network == "publish":
            # its ports are opened over QMP, when the guest listens
            argv += ["-netdev", f"user,id={nic.id},restrict=on,ipv6=off,net={publish.NETWORK}"]
        else:
            argv += ["-netdev", f"stream,id={nic.id},server=on,addr.type=fd,addr.str={streams[NETWORK]}"]
        argv += ["-device", f"virtio-net-pci,netdev={nic.id},mac={nic.mac},addr={nic.slot:x},romfile="]
    return argv


def _disk(disk: Disk, fdset: int, descriptor: int) -> list[str]:
    """A disk whose writes wait in the host's page cache until the guest flushes them: a flush is an fdatasync."""
    readonly = "on" if disk.readonly else "off"
    discard = "ignore" if disk.readonly else "unmap"
    return [
        "-add-fd", f"fd={descriptor},set={fdset}",
        "-blockdev", f"driver=file,node-name={disk.id}-file,filename=/dev/fdset/{fdset},aio=threads,"
        f"read-only={readonly},discard={discard},cache.direct=off,cache.no-flush=off",
        "-blockdev", f"driver={disk.format},node-name={disk.id},file={disk.id}-file,read-only={readonly},"
        f"discard={discard},detect-zeroes={'off' if disk.readonly else 'unmap'}",
        "-device", f"virtio-blk-pci,drive={disk.id},serial={disk.serial},addr={disk.slot:x},num-queues=1",
    ]  # fmt: skip


def _publish_nic(machine: Machine) -> Nic | None:
    return next((nic for nic in machine.nics if nic.network == "publish"), None)


def _host(forward: Forward) -> str:
    return f"tcp:{forward.address}:{forward.host_port}"


def _guest_address(nic: Nic) -> str:
    return nic.addresses[0].partition("/")[0]


class QemuVmm:
    """A running QEMU, controlled over QMP."""

    def __init__(self, process: Watched) -> None:
        self.process = process
        self._qmp = Qmp(self._on_event)
        self._reset = asyncio.Event()
        self._reason = ""
        self._resuming: asyncio.Task[None] | None = None
        self._memory = 0  # bytes of the guest, once they were asked for
        self._asked = 0  # bytes that the balloon is to hold, and those that it was last seen to hold
        self._held = 0
        self._taken_back = asyncio.Event()
        self._booting: asyncio.Task[None] | None = None

    @property
    def stop_reason(self) -> str:
        return self._reason

    async def connect(self, directory: Path) -> None:
        try:
            async with asyncio.timeout(_QMP_SECONDS):
                await self._qmp.connect(directory / QMP_SOCKET)
        except TimeoutError as error:
            raise BangerError(Code.GUEST, f"QEMU did not answer for {_QMP_SECONDS:g} s") from error

        if (await self._qmp.execute("query-status")).get("status") == "io-error":  # since a time without a daemon
            self._resume_later()

    @property
    def paused(self) -> bool:
        return self._resuming is not None

    @property
    def halted(self) -> bool:
        return False  # a guest that powers off ends QEMU

    def _resume_later(self) -> None:
        """QEMU has paused the guest since the host's disk is full; let it try again from time to time."""
        if self._resuming is None:
            _log.warning("a guest (pid %d) is paused: the host's disk is full", self.process.identity.pid)
            self._resuming = asyncio.create_task(self._resume())

    async def _resume(self) -> None:
        status: Json = "io-error"
        with contextlib.suppress(BangerError):  # QEMU has ended
            while status == "io-error":
                await asyncio.sleep(_RESUME_SECONDS)
                await self._qmp.execute("cont")
                await asyncio.sleep(_RESUME_SECONDS)
                status = (await self._qmp.execute("query-status")).get("status")
        self._resuming = None

    async def set_reboot(self, allowed: bool) -> None:
        await self._qmp.execute("set-action", reboot="reset" if allowed else "shutdown")

    async def wait_reset(self) -> None:
        await self._reset.wait()
        self._reset.clear()

    async def change_forwards(self, machine: Machine, forwards: Sequence[Forward]) -> Published:
        # it may have given up the host's network when it was started, and the right to listen on low ports
        if _publish_nic(machine) is None or not (machine.forwards or self._has_our_network()):
            return Published([], _STARTED_WITHOUT if forwards else "")
        waiting = [f for f in forwards if f.host_port < _LOW_PORTS and f not in machine.forwards]
        now = [forward for forward in forwards if forward not in waiting]
        for forward in machine.forwards:
            if forward not in now:
                await self.close_forward(machine, forward)
        return Published(now, _LOW_PORTS_WAIT if waiting else "")

    def _has_our_network(self) -> bool:
        try:
            return Path(f"/proc/{self.process.identity.pid}/ns/net").samefile("/proc/self/ns/net")
        except OSError:  # it has ended
            return False

    async def opened_forwards(self, machine: Machine) -> list[Forward]:
        said = await self._monitor("info usernet")
        opened = {(address.replace("*", "0.0.0.0"), int(port)) for address, port in _OPENED.findall(said)}
        return [forward for forward in machine.forwards if (forward.address, forward.host_port) in opened]

    async def open_forward(self, machine: Machine, forward: Forward) -> None:
        nic = _publish_nic(machine)
        assert nic is not None
        said = await self._monitor(f"hostfwd_add {nic.id} {_host(forward)}-{_guest_address(nic)}:{forward.guest_port}")
        if said:
            raise BangerError(
                Code.EXHAUSTED,
                f"port {forward.host_port} on {forward.address} cannot be published: {own_words(said)}",
                hint="publish another one",
            )

    async def close_forward(self, machine: Machine, forward: Forward) -> bool:
        if (nic := _publish_nic(machine)) is not None:
            await self._monitor(f"hostfwd_remove {nic.id} {_host(forward)}")
        return True

    async def _monitor(self, command: str) -> str:
        """Run a command of which QMP has none of its own; what it prints, '' mostly when all is well."""
        return await self._qmp.ask("human-monitor-command", **{"command-line": command})

    def disk_serial(self, disk: Disk) -> str:
        return disk.serial

    async def resize_disk(self, disk: Disk, size: int) -> bool:
        arguments: dict[str, Json] = {"node-name": disk.id, "size": size}
        await self._qmp.execute("block_resize", **arguments)
        return True

    async def set_balloon(self, size: int) -> None:
        memory = await self._memory_bytes()
        self._asked = size
        await self._qmp.execute("balloon", value=max(1, memory - size))  # QEMU is told what is left, and that not all

    async def balloon_bytes(self) -> int:
        memory = await self._memory_bytes()
        self._held = memory - _number(await self._qmp.execute("query-balloon"), "actual", memory)
        return self._held

    async def _memory_bytes(self) -> int:
        if not self._memory:
            self._memory = _number(await self._qmp.execute("query-memory-size-summary"), "base-memory", _MAX_MEMORY)
        return self._memory

    async def wait_taken_back(self) -> None:
        await self._taken_back.wait()
        self._taken_back.clear()

    def _balloon_changed(self, left: Json) -> None:
        """Tell growing and shrinking as was asked for from a guest that has run out of memory."""
        if not self._memory or not isinstance(left, int):
            return
        before, self._held = self._held, self._memory - left
        if self._held < min(before, self._asked):
            self._taken_back.set()

    async def _deflate_for_boot(self) -> None:
        """Give a guest that has just been reset all of its memory, which it would be asked for while it boots.

        All but a MiB: a guest that is asked for none says nothing, and QEMU goes on to tell what the last
        kernel gave.
        """
        with contextlib.suppress(BangerError):  # QEMU has ended
            if await self.balloon_bytes():
                await self.set_balloon(_LEAST_BALLOON)

    async def kill(self) -> None:
        self.process.signal(signal.SIGKILL)
        await self.process.ended.wait()

    def release(self) -> None:
        for task in (self._resuming, self._booting):
            if task is not None:
                task.cancel()
        self._qmp.close()
        self.process.release()

    def _on_event(self, name: str, data: dict[str, Json]) -> None:
        match name, data.get("reason"):
            case "RESET", _:
                self._reset.set()
                if self._booting is None or self._booting.done():
                    self._booting = asyncio.create_task(self._deflate_for_boot())
            case "BALLOON_CHANGE", _:
                self._balloon_changed(data.get("actual"))
            case "BLOCK_IO_ERROR", _ if data.get("action") == "stop":
                self._resume_later()
            case "GUEST_PANICKED", _:
                self._reason = PANICKED
            case "SHUTDOWN", "guest-shutdown":
                self._reason = self._reason or POWERED_OFF
            case "SHUTDOWN", "guest-reset":
                self._reason = self._reason or RESET_AT_BOOT


class QemuDriver:
    """Starts and adopts QEMU processes."""

    name = "qemu"
    streams: tuple[str, ...] = (LOG, MESSAGES)
    taps = False
    traces: tuple[str, ...] = (QMP_SOCKET, AGENT_SOCKET, *_STREAMS.values(), _MESSAGES_PIPE)

    async def connect_agent(self, directory: Path, timeout: float) -> socket.socket:
        try:
            return connect_unix(directory / AGENT_SOCKET, timeout=0)  # never blocks: it fails when the backlog is full
        except OSError as error:
            raise SessionLost(f"cannot connect to the guest's agent: {error.strerror}") from error

    def find_stray(self, directory: Path) -> ProcessId | None:
        # the socket is there before the process is, so that what has none needs no search
        if not (directory / QMP_SOCKET).exists():
            return None
        return find_by_arguments("-name", directory.name, "-nodefaults")

    def stop_reason(self, directory: Path) -> str:
        return ""  # it tells whoever listens at the time

    def plug(self, directory: Path, stream: str) -> tuple[int, int]:
        if stream == MESSAGES:
            return _plug_messages(directory / _MESSAGES_PIPE)
        with bind_unix(directory / _STREAMS[stream]) as listener:
            end = self.plug_again(directory, stream)
            return listener.detach(), end

    def plug_again(self, directory: Path, stream: str) -> int:
        if stream == MESSAGES:
            return os.open(directory / _MESSAGES_PIPE, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        return connect_unix(directory / _STREAMS[stream]).detach()

    async def launch(
        self, machine: Machine, directory: Path, streams: Mapping[str, int], taps: Namespaces | None = None
    ) -> QemuVmm:
        cpu = await asyncio.to_thread(without_string_flags, machine.cpu, machine.arch)
        machine = dataclasses.replace(machine, cpu=cpu)
        with contextlib.ExitStack() as stack:
            qmp = stack.enter_context(bind_unix(directory / QMP_SOCKET))
            agent = stack.enter_context(bind_unix(directory / AGENT_SOCKET))
            files: dict[str, int] = {}
            writable = {disk.path for disk in machine.disks if not disk.readonly}
            for name in [machine.kernel, machine.initrd, *(disk.path for disk in machine.disks)]:
                flags = os.O_RDWR if name in writable else os.O_RDONLY
                files[name] = os.open(directory / name, flags | os.O_CLOEXEC)
                stack.callback(os.close, files[name])
            ends = [end for stream, end in streams.items() if stream != MESSAGES]
            inherited = [qmp.fileno(), agent.fileno(), *ends, *files.values()]
            argv = command_line(machine, directory, streams, qmp.fileno(), agent.fileno(), files)
            process = spawn(confine(argv, _confinement(machine, directory, files)), inherited, streams[MESSAGES])
            # it is still on its way to QEMU, which has used no memory yet
            if (group := _make_group(machine, directory.name)) is not None:
                group.attach(process.identity.pid)
        vmm = QemuVmm(process)
        try:
            await vmm.connect(directory)
        except BaseException as error:
            await vmm.kill()
            if not isinstance(error, BangerError | OSError):
                raise
            said = await _last_words(directory / "vmm.log", streams[MESSAGES])
            tail = [own_words(line) for line in said if ": info: " not in line][-3:]
            raise BangerError(
                Code.UNSUPPORTED,
                f"QEMU did not start: {' / '.join(tail) or error}",
                hint="run 'banger doctor'",
            ) from error
        return vmm

    async def adopt(self, directory: Path, process: Watched) -> QemuVmm:
        vmm = QemuVmm(process)
        await vmm.connect(directory)
        return vmm


def _plug_messages(path: Path) -> tuple[int, int]:
    """Both ends of a new named pipe, of which another reading end can be had later.

    Writing never blocks: messages are lost where nobody reads them.
    """
    path.unlink(missing_ok=True)
    os.mkfifo(path, 0o600)
    reading = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        return os.open(path, os.O_WRONLY | os.O_NONBLOCK | os.O_CLOEXEC), reading
    except OSError:
        os.close(reading)
        raise


async def _last_words(log: Path, messages: int) -> list[str]:
    """The lines that a QEMU that has ended wrote to `messages`, when the recorder has written them to its log."""
    with contextlib.suppress(OSError):
        os.write(messages, f"\n{_ENDED}\n".encode())
    said: list[str] = []
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(_LAST_WORDS_SECONDS):
            while said[-1:] != [_ENDED]:
                await asyncio.sleep(_STEP_SECONDS)
                with contextlib.suppress(FileNotFoundError):
                    said = log.read_text(errors="replace").split("\n")[:-1]
    return [line for line in said if line.strip() and line != _ENDED]


def _confinement(machine: Machine, directory: Path, files: dict[str, int]) -> Confinement:
    kvm = machine.accelerator == "kvm"
    return Confinement(
        uid=machine.uid,
        groups=_kvm_groups() if kvm and machine.uid >= 0 else [],
        # QEMU itself listens on published ports, and so needs the host's network
        network=bool(machine.forwards),
        low_ports=any(forward.host_port < _LOW_PORTS for forward in machine.forwards),
        devices=["/dev/null", "/dev/urandom", *(["/dev/kvm"] if kvm else [])],
        files={files[name]: directory / name for name in (machine.kernel, machine.initrd)},
    )


def _number(answer: dict[str, Json], name: str, most: int) -> int:
    """A number of an answer of QEMU's; raises BangerError for what only a QEMU says that a guest has taken over."""
    value = answer.get(name)
    if not isinstance(value, int) or not 0 <= value <= most:
        raise BangerError(Code.GUEST, f"QEMU says that {name} is {str(value)[:40]!r}")
    return value


def _make_group(machine: Machine, vm_id: str) -> cgroups.Cgroup | None:
    overhead = _OVERHEAD + (_TCG_BUFFER if machine.accelerator == "tcg" else 0)
    return cgroups.create(vm_id, machine.memory_bytes + overhead, machine.vcpu + _THREADS, machine.vcpu + 1)


def _kvm_groups() -> list[int]:
    kvm = Path("/dev/kvm")
    return [kvm.stat().st_gid] if kvm.exists() and kvm.stat().st_mode & 0o060 == 0o060 else []
