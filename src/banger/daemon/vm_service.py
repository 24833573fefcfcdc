"""VM lifecycle: create, start, stop, remove, and finding running VMs again."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
import os
import socket
import sqlite3
import sys
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Protocol

from banger import system
from banger.api import models as m
from banger.api.errors import BangerError, Code
from banger.config import Config
from banger.daemon import names, vm_disk, vm_plan
from banger.daemon.guest_link import GuestLink
from banger.daemon.host_network import HostNetwork
from banger.daemon.jobs import Report, Workers
from banger.daemon.vm import DISK_FULL, Stages, Vm, describe
from banger.guest.agent import Agent, ExecRequest, guest_errors
from banger.guest.session import GuestFailure
from banger.imagecat.manifest import ImageManifest
from banger.imagecat.seeds import refresh_seed
from banger.kernelcat.manifest import KernelManifest
from banger.net.passt import UserNetwork
from banger.paths import Layout
from banger.process import ProcessId, Watched, spawn
from banger.ssh_keys import SshKey, managed_key
from banger.store.database import Store, disk_is_full
from banger.store.records import VmRecord
from banger.vmm import recorder
from banger.vmm.driver import Driver, Processes, Vmm, Wiring

_log = logging.getLogger(__name__)
_MAX_GRACE = 24 * 3600


class Catalogs(Protocol):
    """Where images and kernels come from."""

    async def ensure_image(self, name: str, report: Report) -> ImageManifest: ...

    async def kernel_for(self, image: ImageManifest, name: str, report: Report) -> tuple[KernelManifest, Path]: ...


class VmService:
    """All VMs of this user."""

    def __init__(
        self,
        layout: Layout,
        config: Config,
        store: Store,
        workers: Workers,
        publication: threading.Lock,
        network: HostNetwork,
        driver: Driver,
    ) -> None:
        self._layout = layout
        self._config = config
        self._store = store
        self._workers = workers
        self._publication = publication
        self._network = network
        self._driver = driver
        self._vms: dict[str, Vm] = {}
        self._names_taken: set[str] = set()
        self._creating: dict[str, VmRecord] = {}
        self._tasks: set[asyncio.Task[None]] = set()

    # Finding VMs -----------------------------------------------------------------------------------------------------

    def find(self, reference: str) -> Vm:
        """The VM with this name, id or unique id prefix; raises NOT_FOUND with the nearest name."""
        for vm in self._vms.values():
            if reference == vm.name:
                return vm
        matches = [vm for vm in self._vms.values() if reference and vm.record.id.startswith(reference)]
        if len(matches) == 1:
            return matches[0]
        if matches:
            raise BangerError(
                Code.INVALID,
                f"{reference!r} is the beginning of {len(matches)} ids",
                hint=f"give more of it, or a name: {', '.join(vm.name for vm in matches[:5])}",
            )
        near = system.nearest(reference, [vm.name for vm in self._vms.values()])
        hint = f"did you mean {near!r}?" if near else "see 'banger vm list'"
        raise BangerError(Code.NOT_FOUND, f"there is no VM {reference!r}", hint=hint)

    # Asked from threads that hold the publication window. A VM counts from before it is linked to its image, so that
    # whoever removes that sees either the VM, or the VM sees in the window that its image is gone.

    def vms_with_image(self, name: str) -> list[str]:
        """The VMs made of an image, those that are just being made included."""
        return [record.name for record in self._records() if record.image == name]

    def vms_with_kernel(self, name: str) -> list[str]:
        """The VMs that boot a kernel, those that are just being made included."""
        return [record.name for record in self._records() if record.kernel == name]

    def _records(self) -> list[VmRecord]:
        # in this order: one that is finished meanwhile is seen twice and not never; copying a dict is atomic
        creating, made = self._creating.copy(), self._vms.copy()
        return [*(creating | {key: vm.record for key, vm in made.items()}).values()]

    @property
    def running(self) -> int:
        """How many VMs are not stopped."""
        return sum(vm.link is not None for vm in self._vms.values())

    def info(self, vm: Vm) -> m.VmInfo:
        return describe(vm, self._layout.vm(vm.record.id))

    async def list(self, request: m.Empty, report: Report) -> m.VmList:
        return m.VmList([self.info(vm) for vm in self._vms.values()])

    async def show(self, request: m.VmRef, report: Report) -> m.VmInfo:
        return self.info(self.find(request.vm))

    # Create and remove -----------------------------------------------------------------------------------------------

    async def create(
        self, request: m.VmCreate, report: Report, catalogs: Catalogs, attached: bool = False, once: bool = False
    ) -> Vm:
        """Create a VM, fetching image and kernel when they are missing.

        `attached`: it goes when its client does. `once`: its command is run by the caller, not at each start.
        """
        vm_plan.check_request(request)
        if request.name in self._names_taken:
            self._refuse_name(request.name)
        image = await catalogs.ensure_image(request.image or self._config.default_image, report)
        kernel, kernel_dir = await catalogs.kernel_for(image, request.kernel, report)
        key = await self._key()
        image = await self._workers.run(
            lambda job: refresh_seed(self._layout.images, image, key, lambda: self._publication, job)
        )
        # from here to where it is kept nothing is awaited, so that no two choose the same
        name = request.name or names.generate(self._names_taken)
        if name in self._names_taken:
            self._refuse_name(name)
        vm_disk.check_disk(self._layout, self._config)
        uids = {record.machine.uid for record in self._records()}
        ports = {port.host_port for record in self._records() for port in record.ports}
        record = vm_plan.plan(
            request, self._config, image, kernel, self._network, self._names_taken, uids, ports, name, os.getuid() == 0
        )
        record = dataclasses.replace(record, attached=attached, command=[] if once else record.command)
        sizes = (request.disk_bytes or self._config.disk_size, request.home_bytes or self._config.home_size)
        self._names_taken.add(name)
        self._creating[record.id] = record
        try:
            await self._workers.run(
                lambda job: vm_disk.create(
                    self._layout, record, sizes, image, kernel, kernel_dir, [key.public], self._publication, job
                )
            )
            self._store.put_vm(record)
        except BaseException:
            self._names_taken.discard(name)
            if self._layout.vm(record.id).exists():
                system.remove_entry(self._layout.vm(record.id))
            raise
        else:
            vm = self._vms[record.id] = Vm(record)
        finally:
            del self._creating[record.id]
        return vm

    def _refuse_name(self, name: str) -> None:
        raise BangerError(
            Code.EXISTS,
            f"there is already a VM named {name!r}",
            hint=f"choose another --name, or look at it with 'banger vm show {name}'",
        )

    async def delete(self, request: m.VmRemove, report: Report) -> m.VmRemoved:
        vm = self.find(request.vm)
        async with vm.lock:
            self._require_here(vm)
            if vm.link is not None and not request.force:
                raise BangerError(
                    Code.WRONG_STATE,
                    f"the VM {vm.name!r} is running",
                    hint=f"stop it with 'banger vm stop {vm.name}', or remove it with 'banger vm rm --force {vm.name}'",
                )
            return await self._remove(vm)

    async def _remove(self, vm: Vm) -> m.VmRemoved:
        """Remove a VM whose lock is held, killing it first if it runs."""
        if vm.link is not None:
            await self._end(vm, "removed", force=True)
        directory = self._layout.vm(vm.record.id)
        freed = vm_disk.used_bytes(directory)
        # the directory first: a record without one is dropped at the next start, never the other way round
        await self._workers.run(lambda job: _remove_directory(directory))
        with _despite_full_disk():
            self._store.delete_vm(vm.record.id)
        self._vms.pop(vm.record.id, None)
        self._names_taken.discard(vm.name)
        return m.VmRemoved([vm.name], freed)

    async def prune(self, request: m.Empty, report: Report) -> m.VmRemoved:
        removed: list[str] = []
        freed = 0
        for vm in list(self._vms.values()):
            if vm.link is None and not vm.lock.locked():
                async with vm.lock:
                    if vm.record.id in self._vms and vm.link is None:
                        result = await self._remove(vm)
                        removed += result.names
                        freed += result.freed_bytes
        return m.VmRemoved(removed, freed)

    # Start -----------------------------------------------------------------------------------------------------------

    async def start(self, vm: Vm, stages: Stages) -> None:
        """Start a VM and wait until its guest is configured; a main command is started in it."""
        async with vm.lock:
            self._require_here(vm)
            if vm.link is not None:
                raise BangerError(Code.WRONG_STATE, f"the VM {vm.name!r} is already running")
            await self._start(vm, stages)

    async def _start(self, vm: Vm, stages: Stages) -> None:
        vm_disk.check_resources(self._layout, self._config, vm.record.machine.memory_bytes)
        vm.state = "starting"
        try:
            link = await self._launch(vm, stages)
        except BaseException:
            vm.state = vm.record.state
            raise
        vm.link = link
        try:
            await link.connect(stages.done)
            await self._run_main(vm, link)
        except BaseException as error:
            console = vm_disk.console_tail(self._layout.vm(vm.record.id))
            reason = error.message if isinstance(error, BangerError) else "the start was cancelled"
            await self._end(vm, reason, force=True)
            if isinstance(error, BangerError) and console:
                error.details["console"] = console
                error.hint = (
                    error.hint or f"the console's last lines follow; all of it: banger vm logs --console {vm.name}"
                )
            raise
        self._put(vm, state="running", reason="", started_at=vm_plan.now())
        vm.watcher = asyncio.create_task(self._watch(vm, link))

    async def _launch(self, vm: Vm, stages: Stages) -> GuestLink:
        record = vm.record
        key = await self._key()
        directory = self._layout.vm(record.id)
        network: UserNetwork | None = None
        helpers: list[ProcessId] = []
        with contextlib.ExitStack() as stack:
            console, console_end = socket.socketpair()
            log, log_end = socket.socketpair()
            for end in (console, console_end, log, log_end):
                stack.enter_context(end)
            network = await self._network.connect(record.machine, directory)
            if network is not None:
                stack.callback(os.close, network.descriptor)
                helpers.append(network.process.identity)
            stages.done("network")
            recorder_process = _start_recorder(directory, console_end, log_end)
            helpers.append(recorder_process.identity)
            wiring = Wiring(network.descriptor if network else -1, console.fileno(), log.fileno())
            try:
                vmm = await self._driver.launch(record.machine, directory, wiring)
            except BaseException:
                if network is not None:
                    network.process.signal(9)
                raise
        try:
            vm_disk.write_processes(directory, Processes(vmm.process.identity, helpers))
        except OSError:
            await vmm.kill()
            vmm.release()
            raise
        stages.done("vmm")
        return self._link(record, vmm, [key.public])

    def _link(self, record: VmRecord, vmm: Vmm, keys: Sequence[str]) -> GuestLink:
        agent_socket = self._driver.agent_socket(self._layout.vm(record.id))
        return GuestLink(vmm, agent_socket, vm_plan.guest_config(record, keys), self._config.boot_timeout)

    async def _key(self) -> SshKey:
        """The key that guests let in; made when there is none yet."""
        return await self._workers.run(lambda job: managed_key(self._layout.ssh_key, self._config.ssh_key))

    async def _keys_of_adopted(self) -> Sequence[str]:
        """What guests that run already are told when they reboot: their own keys stay where there is none to be had."""
        try:
            return [(await self._key()).public]
        except BangerError as error:
            _log.warning("running guests keep their keys: %s", error)
            return []

    async def _run_main(self, vm: Vm, link: GuestLink) -> None:
        if not vm.record.command:
            return
        agent = await link.agent()
        with guest_errors(f"cannot run {vm.record.command[0]!r} in {vm.name!r}", command=True):
            await agent.spawn(
                ExecRequest(
                    argv=tuple(vm.record.command),
                    cwd=vm.record.workdir or None,
                    user=vm.record.user or None,
                    log=True,
                    main=True,
                )
            )

    # Stop ------------------------------------------------------------------------------------------------------------

    async def stop(self, request: m.VmStop, report: Report) -> m.VmStopped:
        vm = self.find(request.vm)
        async with vm.lock:
            self._require_here(vm)
            forced = await self._stop(vm, request.grace)
        return m.VmStopped(self.info(vm), forced)

    async def _stop(self, vm: Vm, grace: float | None) -> bool:
        link = vm.link
        if link is None:
            raise BangerError(Code.WRONG_STATE, f"the VM {vm.name!r} is not running")
        seconds = self._config.stop_grace if grace is None else grace
        if not 0 <= seconds <= _MAX_GRACE:
            raise BangerError(
                Code.INVALID, f"{seconds:g} s is not a grace period", hint=f"use 0 to {_MAX_GRACE} seconds"
            )
        vm.state = "stopping"
        graceful = False
        try:
            with contextlib.suppress(TimeoutError, GuestFailure, BangerError):
                async with asyncio.timeout(seconds):
                    agent = await link.agent()
                    # a little less than our own patience, so that the guest's SIGKILL comes before ours
                    await agent.shutdown(grace_ms=int(seconds * 800), signal=vm_plan.stop_signal(vm.record))
                    await link.vmm.process.ended.wait()
                    graceful = True
        except asyncio.CancelledError:
            vm.state = "running"  # nobody waits any more; when the guest goes down after all, the watcher notices
            raise
        reason = "stopped" if graceful else f"forced to stop after {seconds:g} s"
        await self._end(vm, reason, force=not graceful)
        return not graceful

    async def kill(self, request: m.VmRef, report: Report) -> m.VmInfo:
        vm = self.find(request.vm)
        link = vm.link
        if link is not None:
            # not under the lock: a start or a slow stop under way must not hold this up
            link.vmm.process.signal(9)
        async with vm.lock:
            self._require_here(vm)
            if link is None and vm.link is None:
                raise BangerError(Code.WRONG_STATE, f"the VM {vm.name!r} is not running")
            if vm.link is not None:
                await self._end(vm, "killed", force=True)
        return self.info(vm)

    async def restart(self, request: m.VmStop, report: Report) -> m.VmStarted:
        vm = self.find(request.vm)
        stages = Stages(report)
        async with vm.lock:
            self._require_here(vm)
            if vm.link is not None:
                await self._stop(vm, request.grace)
                stages.done("stop")
            await self._start(vm, stages)
        return m.VmStarted(self.info(vm), stages.timings)

    async def _end(self, vm: Vm, reason: str, force: bool) -> None:
        """Bring a VM to its stopped state, its lock held."""
        link = vm.link
        assert link is not None
        if vm.watcher is not None:
            vm.watcher.cancel()
            vm.watcher = None
        await link.close()
        if force:
            await link.vmm.kill()
        self._ended(vm, link, reason)

    def _ended(self, vm: Vm, link: GuestLink, reason: str) -> None:
        link.vmm.release()
        vm.link = None
        directory = self._layout.vm(vm.record.id)
        for name in (vm_disk.PROCESSES, *self._driver.sockets):
            (directory / name).unlink(missing_ok=True)
        with _despite_full_disk():  # the next daemon sees that it does not run
            self._put(vm, state="stopped", reason=reason)

    async def _watch(self, vm: Vm, link: GuestLink) -> None:
        """Notice when a VM ends by itself; run by a task for as long as it runs."""
        main = None
        if vm.record.auto_remove and not vm.record.attached and vm.record.command:
            main = asyncio.create_task(self._main_end(link))
        ended = asyncio.create_task(link.vmm.process.ended.wait())
        try:
            waiting = {ended} if main is None else {ended, main}
            await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
        finally:
            ended.cancel()
            if main is not None:
                main.cancel()
        # from here on another task of ours may cancel this one only through the lock
        task = asyncio.create_task(self._after_end(vm, link))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _main_end(self, link: GuestLink) -> None:
        while True:
            try:
                agent = await link.agent()
                await agent.wait_main()
                return
            except (GuestFailure, BangerError):
                await asyncio.sleep(1)  # the guest reboots, which runs its main command no second time

    async def _after_end(self, vm: Vm, link: GuestLink) -> None:
        async with vm.lock:
            if vm.link is not link:
                return
            vm.watcher = None
            if link.vmm.process.alive:
                await self._remove(vm)
                return
            await link.close()
            self._ended(vm, link, link.vmm.stop_reason or "the VMM process was killed or crashed")
            if vm.record.auto_remove:
                await self._remove(vm)

    # Guests ----------------------------------------------------------------------------------------------------------

    async def agent(self, vm: Vm) -> Agent:
        """The agent of a running VM; raises WRONG_STATE unless it runs."""
        if vm.link is None or vm.state != "running":
            raise BangerError(
                Code.WRONG_STATE, f"the VM {vm.name!r} is {vm.state}, not running", hint=f"banger vm start {vm.name}"
            )
        if vm.link.vmm.paused:
            raise BangerError(
                Code.EXHAUSTED, f"the VM {vm.name!r} is {DISK_FULL}", hint="free some space: then it goes on by itself"
            )
        return await vm.link.agent()

    async def stat(self, request: m.GuestPath, report: Report) -> m.GuestStat:
        vm = self.find(request.vm)
        agent = await self.agent(vm)
        with guest_errors(f"{vm.name}:{request.path}"):
            result = await agent.stat(request.path, follow=request.follow)
        return m.GuestStat(
            result.mode, result.uid, result.gid, result.size, result.mtime_ns, result.link if result.link else ""
        )

    # Coming and going of the daemon ---------------------------------------------------------------------------------

    async def recover(self) -> None:
        """Load the records, sweep what was interrupted, and take over the VMs that run."""
        await self._workers.run(lambda job: system.sweep_staging(self._layout.vms))
        records = {record.id: record for record in self._store.vms()}
        for record in list(records.values()):
            if not self._layout.vm(record.id).is_dir():
                self._store.delete_vm(record.id)
                del records[record.id]
        for directory in sorted(self._layout.vms.iterdir()):
            if directory.name in records or not directory.is_dir():
                continue
            try:
                record = vm_disk.read_record(directory)
                if record.id != directory.name:
                    raise ValueError(f"its {vm_disk.RECORD} belongs to {record.id!r}")
                self._store.put_vm(record)
                records[record.id] = record
            except (OSError, ValueError, BangerError) as error:
                _log.error("%s holds no usable VM: %s", directory, error)
        self._vms = {record.id: Vm(record) for record in records.values()}
        self._names_taken = {record.name for record in records.values()}
        await asyncio.gather(*(self._adopt(vm) for vm in list(self._vms.values())))

    async def _adopt(self, vm: Vm) -> None:
        directory = self._layout.vm(vm.record.id)
        system.sweep_staging(directory)
        vmm = await self._find_vmm(vm, directory)
        if vmm is None:
            for name in (vm_disk.PROCESSES, *self._driver.sockets):
                (directory / name).unlink(missing_ok=True)
            if vm.record.state == "running":
                self._put(vm, state="stopped", reason="it ended while the daemon was away")
            if (vm.record.auto_remove and vm.record.state != "created") or vm.record.attached:
                await self._remove(vm)
            return
        vm.link = self._link(vm.record, vmm, await self._keys_of_adopted())
        if vm.record.attached:
            # its client waited for it through the daemon that is gone
            await self._remove(vm)
            return
        task = asyncio.create_task(self._reconnect(vm, vm.link))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _find_vmm(self, vm: Vm, directory: Path) -> Vmm | None:
        """The VMM that runs a VM. One that the daemon was still starting is killed: nobody finishes its start."""
        processes = vm_disk.read_processes(directory)
        identity = self._driver.find_stray(directory) if processes is None else processes.vmm
        process = None if identity is None else Watched.find(identity)
        if process is None:
            return None
        reason = vm.record.reason
        if processes is not None and vm.record.state == "running":
            try:
                return await self._driver.adopt(directory, process)
            except (OSError, BangerError) as error:
                _log.warning("cannot control the VMM of %s, killing it: %s", vm.name, error)
                reason = f"killed, since it could not be taken over: {error}"
        process.signal(9)
        await process.ended.wait()
        if vm.record.state == "running":
            self._put(vm, state="stopped", reason=reason)
        return None

    async def _reconnect(self, vm: Vm, link: GuestLink) -> None:
        try:
            await link.connect()
        except BangerError as error:
            _log.warning("the guest %s does not answer: %s", vm.name, error)
        if vm.link is link:
            vm.watcher = asyncio.create_task(self._watch(vm, link))

    async def close(self) -> None:
        """Let go of all VMs, which go on."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for vm in self._vms.values():
            if vm.watcher is not None:
                vm.watcher.cancel()
                await asyncio.gather(vm.watcher, return_exceptions=True)
            if vm.link is not None:
                await vm.link.close()
                vm.link.vmm.release()

    # Helpers ---------------------------------------------------------------------------------------------------------

    def _require_here(self, vm: Vm) -> None:
        """Raise NOT_FOUND when a VM was removed while its lock was awaited."""
        if vm.record.id not in self._vms:
            raise BangerError(Code.NOT_FOUND, f"the VM {vm.name!r} was removed meanwhile")

    def _put(self, vm: Vm, *, state: str, reason: str, started_at: str | None = None) -> None:
        vm.record = dataclasses.replace(
            vm.record,
            state=state,
            reason=reason,
            started_at=vm.record.started_at if started_at is None else started_at,
        )
        vm.state = state
        self._store.put_vm(vm.record)
        vm_disk.write_record(self._layout.vm(vm.record.id), vm.record)


@contextlib.contextmanager
def _despite_full_disk() -> Iterator[None]:
    try:
        yield
    except (OSError, sqlite3.OperationalError) as error:
        if not disk_is_full(error):
            raise
        _log.warning("the disk is full, so a change is not written down: %s", error)


def _start_recorder(directory: Path, console: socket.socket, log: socket.socket) -> Watched:
    argv = [sys.executable, "-I", "-S", recorder.__file__, str(directory), str(console.fileno()), str(log.fileno())]
    for name in ("console.log", "console.log.1", "main.log", "main.log.1"):
        (directory / name).unlink(missing_ok=True)
    with open(directory / "recorder.log", "wb") as messages:
        return spawn(argv, [console.fileno(), log.fileno()], messages.fileno())


def _remove_directory(directory: Path) -> None:
    with contextlib.suppress(FileNotFoundError):
        system.remove_entry(directory)
