"""The Firecracker driver: guests on KVM, controlled over Firecracker's API, the guest protocol over vsock."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import socket
from collections.abc import Mapping, Sequence
from pathlib import Path

from banger.api.codec import Json
from banger.api.errors import BangerError, Code
from banger.config import Config
from banger.guest.protocol import POWER_OFF_NOTICE, VSOCK_AGENT_PORT, VSOCK_LOG_PORT
from banger.guest.session import SessionLost
from banger.net.tap import Namespaces
from banger.paths import expand_home
from banger.process import ProcessId, Watched, find_by_arguments, spawn
from banger.reasons import in_words
from banger.system import bind_unix, connect_unix
from banger.vmm import jailer, programs
from banger.vmm.choice import FIRECRACKER
from banger.vmm.driver import CONSOLE, PANICKED, POWERED_OFF, REBOOTED, Published
from banger.vmm.firecracker_api import (
    Balloon,
    BalloonUpdate,
    BootSource,
    Drive,
    EntropyDevice,
    FirecrackerApi,
    MachineConfiguration,
    NetworkInterface,
    PartialDrive,
    Vsock,
    drive_serial,
)
from banger.vmm.jailer import Jail, JailFile
from banger.vmm.machine import Disk, Forward, Machine
from banger.vmm.words import own_words

# What a running VMM has in the directory `run` of its VM, in its jail too; guests connect to `<vsock>_<port>`.
RUN = "run"
API_SOCKET, VSOCK = f"{RUN}/api.sock", f"{RUN}/v.sock"
LOG_SOCKET = f"{VSOCK}_{VSOCK_LOG_PORT}"
LOG_PIPE, METRICS_PIPE = f"{RUN}/log.fifo", f"{RUN}/metrics.fifo"
_PIPES = {"vmm": LOG_PIPE, "metrics": METRICS_PIPE}

_COMMAND_LINES = {
    "amd64": "console=ttyS0 reboot=k panic=-1 pci=off i8042.noaux i8042.nomux i8042.dumbkbd quiet loglevel=3",
    "arm64": "console=ttyS0 reboot=k panic=-1 pci=off quiet loglevel=3",
}
_GUEST_CID = 3  # the first that is not reserved, vsock(7); each Firecracker has its own
_STATIC_TEMPLATES = ("C3", "T2", "T2S", "T2CL", "T2A", "V1N1")
_START_SECONDS, _STEP_SECONDS = 20.0, 0.002
_AGENT_STEP_SECONDS = 0.02
_BALLOON_SECONDS = 3600  # between the guest's own statistics; without any, what the balloon holds is not told either
_MAX_MEMORY = 1 << 52  # bytes: what no machine has
_HALTED = b"reboot: System halted"  # kernel/reboot.c of Linux
_RESET = b"Firecracker exiting successfully"
_LAST_WORDS = 4096  # bytes of a log that tell why a guest ended


def hardware(arch: str, accelerator: str) -> tuple[str, str, str, str]:
    """Machine type, CPU model, firmware and kernel command line for a new VM."""
    return FIRECRACKER, "host", "", _COMMAND_LINES[arch]


def _stop_reason(directory: Path) -> str:
    """Firecracker ends when its guest resets, whatever for; the guest's last words tell that."""
    said = _last_words(directory / "console.log")
    if POWER_OFF_NOTICE.encode() in said or _HALTED in said:
        return POWERED_OFF
    if b"Kernel panic" in said:
        return PANICKED
    # one that resets at once, by SysRq or a triple fault, says nothing
    has_reset = b"reboot: Restarting system" in said or _RESET in _last_words(directory / "vmm.log")
    return REBOOTED if has_reset else ""


def _last_words(log: Path) -> bytes:
    try:
        with open(log, "rb") as stream:
            stream.seek(max(0, os.fstat(stream.fileno()).st_size - _LAST_WORDS))
            return stream.read()
    except OSError:
        return b""


class FirecrackerVmm:
    """A running Firecracker."""

    def __init__(self, process: Watched, api: FirecrackerApi, directory: Path) -> None:
        self.process = process
        self.api = api
        self._directory = directory

    @property
    def stop_reason(self) -> str:
        return _stop_reason(self._directory)

    @property
    def halted(self) -> bool:
        """A kernel that has nothing to switch the power off with halts, whichever of both it is asked for."""
        return _HALTED in _last_words(self._directory / "console.log")

    @property
    def paused(self) -> bool:
        return False  # a full disk of the host is an I/O error to the guest

    async def set_reboot(self, allowed: bool) -> None:
        """A guest that resets always ends Firecracker; whoever waits for that starts it again."""

    async def wait_reset(self) -> None:
        await asyncio.Event().wait()

    async def change_forwards(self, machine: Machine, forwards: Sequence[Forward]) -> Published:
        kept = list(machine.forwards)
        return Published(kept, "" if kept == list(forwards) else "Firecracker changes no ports while it runs")

    async def opened_forwards(self, machine: Machine) -> list[Forward]:
        return list(machine.forwards)  # its network's helper waits for the guest itself

    async def open_forward(self, machine: Machine, forward: Forward) -> None:
        pass

    async def close_forward(self, machine: Machine, forward: Forward) -> bool:
        return False

    async def resize_disk(self, disk: Disk, size: int) -> bool:
        await self.api.patch_drive(PartialDrive(disk.id, disk.path))
        return True

    def disk_serial(self, disk: Disk) -> str:
        # as Firecracker sees it: what is read-only may be a copy in its jail
        with contextlib.suppress(OSError):
            return drive_serial(Path(f"/proc/{self.process.identity.pid}/cwd", disk.path))
        return drive_serial(self._directory / disk.path)

    async def set_balloon(self, size: int) -> None:
        # to its end: what is asked next has to come after it, and a request that is cut off costs the connection
        await asyncio.shield(self.api.patch_balloon(BalloonUpdate(size >> 20)))

    async def balloon_bytes(self) -> int:
        held = (await asyncio.shield(self.api.get_balloon_statistics())).actual_mib
        if not 0 <= held <= _MAX_MEMORY >> 20:
            raise BangerError(Code.GUEST, f"Firecracker says that its balloon holds {str(held)[:40]} MiB")
        return held << 20

    async def wait_taken_back(self) -> None:
        await asyncio.Event().wait()

    async def kill(self) -> None:
        self.process.signal(signal.SIGKILL)
        await self.process.ended.wait()

    def release(self) -> None:
        self.api.close()
        self.process.release()


class FirecrackerDriver:
    """Starts and adopts Firecracker processes."""

    name = FIRECRACKER
    streams: tuple[str, ...] = ("main", "typed", "vmm", "metrics")
    traces: tuple[str, ...] = (RUN, jailer.DIRECTORY)
    taps = True

    def __init__(self, config: Config) -> None:
        self._config = config

    def stop_reason(self, directory: Path) -> str:
        return _stop_reason(directory)

    def plug(self, directory: Path, stream: str) -> tuple[int, int]:
        (directory / RUN).mkdir(mode=0o700, exist_ok=True)
        match stream:
            case "main":  # the guest connects to it by itself
                return os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC), bind_unix(directory / LOG_SOCKET).detach()
            case "vmm" | "metrics":
                return _pipe(directory / _PIPES[stream])
            case "typed":
                # a pipe both, since Firecracker reads no other standard input and writes one byte at a time, of which
                # a socket holds but a few hundred
                return os.pipe()
            case _:
                reading, writing = os.pipe()
                return writing, reading

    def plug_again(self, directory: Path, stream: str) -> int:
        raise OSError("Firecracker keeps to the streams that it was started with")

    def find_stray(self, directory: Path) -> ProcessId | None:
        return find_by_arguments("--id", directory.name) if (directory / RUN).exists() else None

    async def launch(
        self, machine: Machine, directory: Path, streams: Mapping[str, int], taps: Namespaces | None = None
    ) -> FirecrackerVmm:
        template = _cpu_template(self._config)
        for name in (API_SOCKET, VSOCK):
            (directory / name).unlink(missing_ok=True)
        process = await self._start(machine, directory, streams, taps)
        try:
            api = await _connect(directory, process)
            try:
                await _configure(api, machine, template)
                await api.instance_start()
            except BaseException:
                api.close()
                raise
        except BaseException as error:
            process.signal(signal.SIGKILL)
            await process.ended.wait()
            if not isinstance(error, BangerError):
                raise
            lines = (directory / jailer.LOG).read_text(errors="replace").strip().splitlines()
            said = [own_words(line) for line in lines[-3:]]
            raise BangerError(
                Code.UNSUPPORTED,
                f"Firecracker did not start: {' / '.join([error.message, *said])}",
                hint="run 'banger doctor', or use --vmm qemu",
            ) from error
        return FirecrackerVmm(process, api, directory)

    async def _start(
        self, machine: Machine, directory: Path, streams: Mapping[str, int], taps: Namespaces | None = None
    ) -> Watched:
        """A process with nothing configured yet; relative paths mean the same to it in its jail and outside."""
        program = programs.firecracker(self._config)
        # without a log from the start its first words would be among the console's
        arguments = ["--api-sock", API_SOCKET, "--log-path", LOG_PIPE, "--level", "Info"]
        arguments += ["--metrics-path", METRICS_PIPE]
        stdin, stdout = streams["typed"], streams[CONSOLE]
        if machine.uid >= 0 and programs.wants_jailer(self._config):
            for path in (directory / RUN, *(directory / RUN).iterdir()):
                os.chown(path, machine.uid, machine.uid, follow_symlinks=False)
            jail = Jail(directory, directory.name, machine.uid, program, programs.jailer(self._config))
            netns = -1 if taps is None else taps.network
            return await jail.launch(
                _files(machine), arguments, stdin, stdout, machine.memory_bytes, machine.vcpu, netns
            )
        argv = [] if taps is None else taps.enter()
        argv += [program.path, "--id", directory.name, *arguments]
        with open(directory / jailer.LOG, "wb") as log:
            process = spawn(argv, [], log.fileno(), stdin=stdin, stdout=stdout, directory=directory)
        if (group := jailer.make_group(directory.name, machine.memory_bytes, machine.vcpu)) is not None:
            group.attach(process.identity.pid)  # no guest has taken any memory yet
        return process

    async def adopt(self, directory: Path, process: Watched) -> FirecrackerVmm:
        api = await FirecrackerApi.connect(directory / API_SOCKET)
        try:
            found = (await api.describe_instance()).id
            if found != directory.name:
                raise BangerError(Code.GUEST, f"its API socket belongs to the VM {found!r}")
        except BaseException:
            api.close()
            raise
        return FirecrackerVmm(process, api, directory)

    async def connect_agent(self, directory: Path, timeout: float) -> socket.socket:
        """Until the agent listens, Firecracker hangs up; docs/vsock.md there tells of the CONNECT line."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout):
                while True:
                    if (connection := await _connect_port(directory / VSOCK, VSOCK_AGENT_PORT)) is not None:
                        return connection
                    await asyncio.sleep(_AGENT_STEP_SECONDS)  # nothing tells when it will
        raise SessionLost(f"the guest's agent did not answer within {timeout:g} s")


def _files(machine: Machine) -> list[JailFile]:
    """What the VMM of a machine has in its jail."""
    files = [JailFile(RUN, RUN, True), JailFile(machine.kernel, machine.kernel, False)]
    files.append(JailFile(machine.initrd, machine.initrd, False))
    return files + [JailFile(disk.path, disk.path, not disk.readonly) for disk in machine.disks]


def _pipe(path: Path) -> tuple[int, int]:
    """Two descriptors of a new named pipe, which Firecracker opens itself and drops what does not fit."""
    path.unlink(missing_ok=True)
    os.mkfifo(path, 0o600)
    # for writing too: it must not be at its end before Firecracker has opened it
    end = os.open(path, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
    return os.dup(end), end


async def _connect(directory: Path, process: Watched) -> FirecrackerApi:
    """Wait until a Firecracker that has just been started listens."""
    for _ in range(int(_START_SECONDS / _STEP_SECONDS)):
        with contextlib.suppress(OSError):
            return await FirecrackerApi.connect(directory / API_SOCKET)
        if not process.alive:
            raise BangerError(Code.GUEST, "it ended at once")
        await asyncio.sleep(_STEP_SECONDS)
    raise BangerError(Code.GUEST, f"it did not listen within {_START_SECONDS:g} s")


async def _configure(api: FirecrackerApi, machine: Machine, template: str | Json) -> None:
    static = template if isinstance(template, str) and template else None
    await api.put_machine_configuration(
        MachineConfiguration(machine.vcpu, machine.memory_bytes >> 20, cpu_template=static)
    )
    if not isinstance(template, str):
        await api.put_cpu_configuration(template)
    await api.put_boot_source(BootSource(machine.kernel, machine.initrd, machine.command_line))
    for disk in machine.disks:
        # Writeback: what the guest flushes is on the host's disk when it is told so
        await api.put_drive(Drive(disk.id, disk.path, disk.readonly, cache_type=None if disk.readonly else "Writeback"))
    for nic in machine.nics:
        await api.put_network_interface(NetworkInterface(nic.id, nic.id, nic.mac))  # taps have the names of NICs
    await api.put_vsock(Vsock(_GUEST_CID, VSOCK))
    await api.put_entropy(EntropyDevice())
    await api.put_balloon(Balloon(0, deflate_on_oom=True, stats_polling_interval_s=_BALLOON_SECONDS))


def _cpu_template(config: Config) -> str | Json:
    """'', the name of a static template, or the content of a custom one. Raises BangerError(INVALID)."""
    name = config.cpu_template
    if not name or name in _STATIC_TEMPLATES:
        return name
    try:
        template: Json = json.loads(expand_home(name).read_bytes())
    except (OSError, ValueError) as error:
        raise BangerError(
            Code.INVALID,
            f"cpu_template is {name!r}, neither a template of Firecracker nor a file of one: {in_words(error)}",
            hint=f"use one of {', '.join(_STATIC_TEMPLATES)}, or the path of a JSON file",
        ) from error
    return template


async def _connect_port(path: Path, port: int) -> socket.socket | None:
    """A connection to a port of the guest, None when nobody listens there yet; SessionLost without Firecracker."""
    loop = asyncio.get_running_loop()
    try:
        connection = connect_unix(path, timeout=0)
    except OSError as error:
        raise SessionLost(f"cannot connect to the guest's agent: {error.strerror}") from error
    try:
        connection.setblocking(False)
        await loop.sock_sendall(connection, f"CONNECT {port}\n".encode())
        # byte by byte, since the agent's own words may follow at once
        answer = b""
        while not answer.endswith(b"\n") and len(answer) < 32:
            if not (byte := await loop.sock_recv(connection, 1)):
                break
            answer += byte
    except OSError:
        answer = b""
    except BaseException:
        connection.close()
        raise
    if answer.startswith(b"OK "):
        return connection
    connection.close()
    return None
