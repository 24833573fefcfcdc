"""What `banger doctor` tries: a network starts, a guest boots, namespaces and control groups can be made.

All that it makes has its files in one directory. A keeper, which is this module run as a program, removes these and
ends what still runs when its standard input ends, however the process that tries things has come to its end. Networks
end by themselves then.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from banger import system
from banger.api.errors import BangerError, Code
from banger.api.models import Check
from banger.config import Config
from banger.daemon import vm_disk, vm_plan
from banger.daemon.vm_helpers import start_recorder
from banger.guest.binary import agent_binary
from banger.guest.bootarchive import boot_archive
from banger.guest.session import AgentSession
from banger.imagecat.debian import try_namespace
from banger.job import Job
from banger.kernelcat import manifest as kernels
from banger.kernelcat.manifest import KernelManifest
from banger.net import passt, tap
from banger.paths import Layout
from banger.process import ProcessId, Watched, find_by_arguments, identify
from banger.vmm import cgroups, confinement, programs, recorder
from banger.vmm.choice import choose
from banger.vmm.detect import host_arch
from banger.vmm.driver import CONSOLE, Driver, Vmm
from banger.vmm.firecracker import FirecrackerDriver
from banger.vmm.machine import Machine
from banger.vmm.obstacles import Obstacle, namespaces_forbidden
from banger.vmm.qemu import QemuDriver

NETWORK, TAP, BOOT, IMAGES, NAMESPACES, GROUPS = (
    "user network",
    "tap network",
    "boot",
    "image building",
    "namespaces",
    "control groups",
)
_PREFIX = f"{system.STAGING_PREFIX}doctor-"
_MEMORY = 256 << 20
_BOOT_SECONDS = {"kvm": 20.0, "tcg": 60.0}  # some ten times what it takes
_END_SECONDS, _WORDS_SECONDS, _STEP_SECONDS = 5.0, 1.0, 0.02
_WORDS = " loglevel=6"  # so that its kernel says which it is, and where it stops


async def try_all(layout: Layout, settings: Config, report: Callable[[str], None]) -> list[Check]:
    """Try everything at once; `report` is told what has not come to its end yet. Takes as long as a guest boots."""
    uid = _unused_uid(settings) if os.geteuid() == 0 else -1
    with kept(layout) as directory:
        trials = {
            NETWORK: _try_passt(directory, uid),
            BOOT: _try_boot(directory, layout, settings, uid),
            TAP: asyncio.to_thread(_try_tap, settings),
            IMAGES: asyncio.to_thread(_try_building),
            NAMESPACES: asyncio.to_thread(namespaces_check),
            GROUPS: asyncio.to_thread(_try_group, directory),
        }
        tasks = {name: asyncio.ensure_future(trial) for name, trial in trials.items()}
        try:
            while waiting := [name for name, task in tasks.items() if not task.done()]:
                report(", ".join(waiting))
                await asyncio.wait([tasks[name] for name in waiting], return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in tasks.values():
                task.cancel()
            await asyncio.gather(*tasks.values(), return_exceptions=True)
    return [check for task in tasks.values() if (check := task.result())]


@contextlib.contextmanager
def kept(layout: Layout) -> Iterator[Path]:
    """A directory for what is tried, with its keeper, who has removed all of it when the block has been left."""
    directory = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=layout.state))
    argv = [sys.executable, "-I", "-m", __name__, str(directory)]
    with subprocess.Popen(argv, stdin=subprocess.PIPE, start_new_session=True) as keeper:  # out of Ctrl-C's reach
        yield directory
        assert keeper.stdin is not None


async def _try_passt(directory: Path, uid: int) -> Check:
    ours, theirs = socket.socketpair()
    try:
        with ours, theirs:
            processes = await passt.start(directory / "passt.log", uid, theirs.fileno())
    except BangerError as error:
        if error.code is Code.MISSING_TOOL:
            return Check(NETWORK, "fail", "without passt guests have no network", "install passt, or use --net none")
        cause, fix = namespaces_forbidden()
        if cause:
            return Check(NETWORK, "fail", f"{error.message} ({cause})", f"{fix}; or use --net none")
        fix = "what AppArmor or SELinux deny passt stands in 'journalctl -k'; without a cure use --net none"
        return Check(NETWORK, "fail", error.message, fix)
    for process in processes:
        await _end(process)
    return Check(NETWORK, "ok", "passt starts; guests cannot reach the host's 127.0.0.1")


async def _end(process: Watched) -> None:
    """Wait for a process that ends by itself, or end it."""
    try:
        async with asyncio.timeout(_END_SECONDS):
            await process.ended.wait()
    except TimeoutError:
        process.signal(signal.SIGKILL)
        await process.ended.wait()


def _try_tap(settings: Config) -> Check:
    why = tap.reason_unusable()
    if not why:
        return Check(TAP, "ok", "VMs on Firecracker can have a network")
    try:
        programs.firecracker(settings)
    except BangerError:
        return Check(TAP, "ok", f"not needed without Firecracker ({why})")
    cause, fix = namespaces_forbidden()
    return Check(TAP, "warn", f"VMs on Firecracker have no network: {why}", fix if cause else "use --vmm qemu")


def _try_building() -> Check | None:
    try:
        try_namespace(Job())
    except BangerError as error:
        if error.code is Code.MISSING_TOOL:
            return None  # the tools have lines of their own
        cause, fix = namespaces_forbidden()
        message = f"images cannot be built of Debian's packages: {error.message}"
        return Check(IMAGES, "fail", f"{message} ({cause})" if cause else message, error.hint or fix)
    return Check(IMAGES, "ok", "mmdebstrap can work in namespaces of its own")


def namespaces_check() -> Check:
    """Whether a confined program gets namespaces of its own."""
    return _as_check(NAMESPACES, "VMMs see no files, processes or networks but their own", confinement.try_namespaces())


def _try_group(directory: Path) -> Check:
    return groups_check(confinement.try_control_group(_vm_directory(directory, "group").name))


def groups_check(obstacle: Obstacle | None) -> Check:
    """Whether VMMs get control groups."""
    return _as_check(GROUPS, "VMMs are limited in memory, processes and processors", obstacle)


def _as_check(name: str, good: str, obstacle: Obstacle | None) -> Check:
    return Check(name, "warn", f"VMMs run {obstacle.what}", obstacle.fix) if obstacle else Check(name, "ok", good)


async def _try_boot(directory: Path, layout: Layout, settings: Config, uid: int) -> Check | None:
    """Boot a kernel that is here until the agent answers; None where it is told elsewhere that there is no VMM."""
    try:
        kernel = _find_kernel(layout, settings)
        if kernel is None:
            fix = f"banger kernel pull {settings.default_kernel}, then banger doctor"
            return Check(BOOT, "warn", "not tried: there is no kernel to boot yet", fix)
        try:
            vm_disk.check_resources(layout, settings, _MEMORY, 0)
        except BangerError as error:
            return Check(BOOT, "warn", f"not tried: {error.message}", error.hint)
        begin = time.monotonic()
        how = await _boot(_vm_directory(directory, "boot"), layout.kernels / kernel.name, settings, uid)
    except BangerError as error:
        if error.code is Code.MISSING_TOOL:
            return None
        fix = "" if "banger doctor" in error.hint else error.hint
        return Check(BOOT, "fail", error.message, fix or "look at its last words above; try another VMM or kernel")
    what = f"{kernel.name} ({kernel.kernel_version}) boots on {how}"
    return Check(BOOT, "ok", f"{what}, and its agent answers after {time.monotonic() - begin:.1f} s")


def _find_kernel(layout: Layout, settings: Config) -> KernelManifest | None:
    """The default kernel if it is here, else any that fits."""
    found = [kernel for kernel in kernels.list_local(layout.kernels)[0] if kernel.arch == host_arch()]
    return min(found, key=lambda kernel: kernel.name != settings.default_kernel, default=None)


async def _boot(directory: Path, kernel_dir: Path, settings: Config, uid: int) -> str:
    """Boot a guest without disks and networks, and end it; says on what. Raises BangerError when it does not boot."""
    for_firecracker, for_qemu = kernels.kernel_paths(kernel_dir)
    choice = await asyncio.to_thread(choose, settings, "", for_firecracker, "user")
    await asyncio.to_thread(programs.look_up, settings, choice.driver)
    driver: Driver = FirecrackerDriver(settings) if choice.driver == FirecrackerDriver.name else QemuDriver()
    taps = driver.name == FirecrackerDriver.name
    system.link_or_copy(for_firecracker if taps else for_qemu, directory / vm_plan.KERNEL)
    system.link_or_copy(boot_archive(kernel_dir, agent_binary(host_arch())), directory / vm_plan.BOOT_ARCHIVE)
    hardware = await asyncio.to_thread(vm_plan.HARDWARE[driver.name], host_arch(), choice.accelerator)
    machine_type, cpu, firmware, command_line = hardware
    machine = Machine(
        driver=driver.name,
        accelerator=choice.accelerator,
        arch=host_arch(),
        type=machine_type,
        cpu=cpu,
        firmware=firmware,
        vcpu=1,
        memory_bytes=_MEMORY,
        memory_backend="ram0",
        kernel=vm_plan.KERNEL,
        initrd=vm_plan.BOOT_ARCHIVE,
        command_line=command_line + _WORDS,
        disks=[],
        nics=[],
        forwards=[],
        uid=uid,
    )
    with contextlib.ExitStack() as stack:
        ours: dict[str, int] = {}
        theirs: dict[str, int] = {}
        for stream in (CONSOLE, *driver.streams):
            ours[stream], theirs[stream] = driver.plug(directory, stream)
            stack.callback(os.close, ours[stream])
            stack.callback(os.close, theirs[stream])
        writer = start_recorder(directory, theirs)
        vmm = await driver.launch(machine, directory, ours)
    try:
        await _greet(driver, vmm, directory, min(settings.boot_timeout, _BOOT_SECONDS[choice.accelerator]))
    finally:
        await vmm.kill()
        vmm.release()
        await _end(writer)
    return f"{driver.name} ({'with KVM' if choice.accelerator == 'kvm' else 'emulated'})"


async def _greet(driver: Driver, vmm: Vmm, directory: Path, seconds: float) -> None:
    """Wait until the agent of a guest that boots answers; raises BangerError with its last words when it does not."""

    async def greet() -> None:
        session = await AgentSession.connect(await driver.connect_agent(directory, seconds), seconds)
        await session.close()

    greeted = asyncio.create_task(greet())
    ended = asyncio.create_task(vmm.process.ended.wait())
    try:
        await asyncio.wait((greeted, ended), return_when=asyncio.FIRST_COMPLETED, timeout=seconds)
        if greeted.done() and greeted.exception() is None:
            return
        await asyncio.wait((ended,), timeout=_WORDS_SECONDS)  # a VMM that ends breaks its connections first
        why = vmm.stop_reason or "the VMM ended" if ended.done() else f"no answer within {seconds:g} s"
        said = vm_disk.console_tail(directory, lines=1)
        words = f"its last words: {said}" if said else "its kernel said nothing"
        raise BangerError(Code.GUEST, f"a guest does not boot on {driver.name}: {why}; {words}")
    finally:
        for task in (greeted, ended):
            task.cancel()
        await asyncio.gather(greeted, ended, return_exceptions=True)


def _unused_uid(settings: Config) -> int:
    """A user for what runs as none of root's, whom no VM has."""
    taken = set()
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(FileNotFoundError):
            taken.add(process.stat().st_uid)
    return vm_plan.free_uid(settings, taken)


def _vm_directory(directory: Path, what: str) -> Path:
    """A directory like that of a VM: its name is an id that no VM has, of characters that every VMM takes."""
    made = directory / f"doctor-{what}-{os.urandom(4).hex()}"
    made.mkdir(mode=0o700)
    return made


def keep(directory: Path) -> None:
    """End and remove what was tried in a directory."""
    drivers: tuple[Driver, ...] = (QemuDriver(), FirecrackerDriver(Config()))
    for vm in directory.iterdir() if directory.exists() else ():
        for driver in drivers:
            while stray := driver.find_stray(vm):
                _kill(stray)
        while writer := find_by_arguments(recorder.__file__, str(vm)):
            _kill(writer)
        deadline = time.monotonic() + _END_SECONDS
        while not cgroups.remove(vm.name) and time.monotonic() < deadline:
            time.sleep(_STEP_SECONDS)  # the program in it ends as this one's parent has
    system.remove_tree(directory)


def _kill(process: ProcessId) -> None:
    """End a process and wait until it is gone."""
    with contextlib.suppress(ProcessLookupError):
        pidfd = os.pidfd_open(process.pid)
        try:
            if identify(process.pid) == process:
                signal.pidfd_send_signal(pidfd, signal.SIGKILL)
                select.select([pidfd], [], [])
        finally:
            os.close(pidfd)


if __name__ == "__main__":
    sys.stdin.buffer.read()
    keep(Path(sys.argv[1]))
