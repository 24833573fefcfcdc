"""The operations on VMs."""

from __future__ import annotations

import dataclasses
import os
import threading
from pathlib import Path
from typing import Protocol

from banger import system
from banger.api import models as m
from banger.api.errors import BangerError, Code
from banger.config import Config
from banger.daemon import names, vm_disk, vm_plan
from banger.daemon.events import Events
from banger.daemon.host_network import HostNetwork
from banger.daemon.jobs import Report, Workers
from banger.daemon.vm import Stages, Vm, describe
from banger.daemon.vm_lifecycle import Lifecycle
from banger.daemon.vm_port_check import check_ports
from banger.daemon.vm_table import VmTable
from banger.guest.agent import Agent, guest_errors
from banger.hostpackages import Use
from banger.imagecat.manifest import ImageManifest
from banger.imagecat.seeds import refresh_seed
from banger.job import Job, require_tools
from banger.kernelcat import manifest as kernels
from banger.kernelcat.manifest import KernelManifest
from banger.paths import Layout
from banger.store.database import Store, despite_full_disk
from banger.store.records import CREATING, STARTING
from banger.vmm import programs
from banger.vmm.choice import Choice, choose
from banger.vmm.detect import host_arch


class Catalogs(Protocol):
    """Where images and kernels come from."""

    async def uses(self, image: str, kernel: str) -> set[Use]: ...

    async def ensure_image(self, name: str, report: Report) -> ImageManifest: ...

    async def kernel_for(self, image: ImageManifest, name: str, report: Report) -> tuple[KernelManifest, Path]: ...


class VmService:
    """Serves the operations on VMs: creates them itself, and has the lifecycle do the rest."""

    def __init__(
        self,
        layout: Layout,
        config: Config,
        store: Store,
        workers: Workers,
        publication: threading.Lock,
        network: HostNetwork,
        table: VmTable,
        lifecycle: Lifecycle,
        catalogs: Catalogs,
        events: Events,
    ) -> None:
        self._layout = layout
        self._config = config
        self._store = store
        self._workers = workers
        self._publication = publication
        self._network = network
        self._table = table
        self._lifecycle = lifecycle
        self._catalogs = catalogs
        self._events = events

    @property
    def running(self) -> int:
        """How many VMs are not stopped."""
        return sum(vm.link is not None for vm in self._table)

    def find(self, reference: str) -> Vm:
        """The VM with this name, id or unique id prefix; raises NOT_FOUND."""
        return self._table.find(reference)

    def directory(self, vm: Vm) -> Path:
        """Where the files of a VM lie."""
        return self._layout.vm(vm.record.id)

    def info(self, vm: Vm) -> m.VmInfo:
        return describe(vm, self.directory(vm))

    async def list(self, request: m.Empty, report: Report) -> m.VmList:
        return m.VmList([self.info(vm) for vm in self._table])

    async def show(self, request: m.VmRef, report: Report) -> m.VmInfo:
        return self.info(self.find(request.vm))

    async def create(self, request: m.VmCreate, report: Report) -> m.VmInfo:
        return self.info(await self.make(request, report))

    async def make(self, request: m.VmCreate, report: Report, attached: bool = False, once: bool = False) -> Vm:
        """Create a VM, fetching image and kernel when they are missing.

        `attached`: it goes when its client does. `once`: its command is run by the caller, not at each start.
        """
        vm_plan.check_request(request)
        self._table.refuse_taken(request.name)
        await self._check_host(request)
        image = await self._catalogs.ensure_image(request.image or self._config.default_image, report)
        kernel, kernel_dir = await self._catalogs.kernel_for(image, request.kernel, report)
        key = await self._lifecycle.launcher.key()
        choice = await self._workers.run(lambda job: self._choose(request, kernel_dir))
        image = await self._workers.run(
            lambda job: refresh_seed(self._layout.images, image, key, lambda: self._publication, job)
        )
        # from here to where it is kept nothing is awaited, so that no two choose the same
        name = request.name or names.generate(self._table.names)
        self._table.refuse_taken(name)
        vm_disk.check_disk(self._layout, self._config)
        uids = {record.machine.uid for record in self._table.records()}
        ports = {port.host_port for record in self._table.records() for port in record.ports}
        record = vm_plan.plan(
            request,
            self._config,
            image,
            kernel,
            self._network,
            self._table.names,
            uids,
            ports,
            name,
            os.getuid() == 0,
            choice,
        )
        record = dataclasses.replace(record, attached=attached)
        if once:
            record = dataclasses.replace(record, command=[], beside=[])
        sizes = (request.disk_bytes or self._config.disk_size, request.home_bytes or self._config.home_size)
        with self._table.creating(record):
            try:
                self._store.put_vm(dataclasses.replace(record, state=CREATING))
                await self._workers.run(
                    lambda job: vm_disk.create(
                        self._layout, record, sizes, image, kernel, kernel_dir, [key.public], self._publication, job
                    )
                )
                self._store.put_vm(record)
            except BaseException:
                if self._layout.vm(record.id).exists():
                    system.remove_entry(self._layout.vm(record.id))
                with despite_full_disk():
                    self._store.delete_vm(record.id)
                raise
        self._events.publish("created", record)
        return self._table.find(record.id)

    def check_ports(self, vm: Vm) -> None:
        """Raise PortTaken when a port that a VM that has just been made publishes is in use."""
        check_ports(vm, vm.record.ports, self._table, is_new=True)

    async def start(self, request: m.VmRef, report: Report) -> m.VmStarted:
        vm, stages = self.find(request.vm), Stages(report)
        await self._lifecycle.start(vm, stages)
        return m.VmStarted(self.info(vm), stages.timings)

    async def stop(self, request: m.VmStop, report: Report) -> m.VmStopped:
        vm = self.find(request.vm)
        forced = await self._lifecycle.stop(vm, request.grace)
        return m.VmStopped(self.info(vm), forced)

    async def kill(self, request: m.VmRef, report: Report) -> m.VmInfo:
        vm = self.find(request.vm)
        await self._lifecycle.kill(vm)
        return self.info(vm)

    async def restart(self, request: m.VmStop, report: Report) -> m.VmStarted:
        vm, stages = self.find(request.vm), Stages(report)
        await self._lifecycle.restart(vm, request.grace, stages)
        return m.VmStarted(self.info(vm), stages.timings)

    async def delete(self, request: m.VmRemove, report: Report) -> m.VmRemoved:
        return await self._lifecycle.delete(self.find(request.vm), request.force)

    async def prune(self, request: m.Empty, report: Report) -> m.VmRemoved:
        return await self._lifecycle.prune()

    async def agent(self, vm: Vm) -> Agent:
        """The agent of a running VM, or of one that is being started; raises WRONG_STATE unless it runs then."""
        # one on Firecracker whose guest reboots has no VMM for a moment, and is then started
        if vm.state == STARTING or (vm.link is not None and not vm.link.vmm.process.alive):
            async with vm.lock:
                self._table.require(vm)
        if vm.link is None or vm.state != "running":
            raise BangerError(
                Code.WRONG_STATE, f"the VM {vm.name!r} is {vm.state}, not running", hint=f"banger vm start {vm.name}"
            )
        vm.refuse_paused()
        return await vm.link.agent()

    async def _check_host(self, request: m.VmCreate) -> None:
        """Raise a BangerError with all that this host lacks for a VM before anything is fetched or built for it."""
        net = request.net or "user"
        uses = await self._catalogs.uses(request.image or self._config.default_image, request.kernel)
        uses |= {Use.VM, Use.DISK} if net == "none" else {Use.VM, Use.DISK, Use.NETWORK}

        def work(job: Job) -> None:
            driver = choose(self._config, request.vmm, None, net, request.vcpu or self._config.vcpu).driver
            require_tools(uses, driver)
            programs.look_up(self._config, driver)

        await self._workers.run(work)

    def _choose(self, request: m.VmCreate, kernel_dir: Path) -> Choice:
        kernel, vcpu = kernels.kernel_paths(kernel_dir)[0], request.vcpu or self._config.vcpu
        choice = choose(self._config, request.vmm, kernel, request.net or "user", vcpu)
        vm_plan.HARDWARE[choice.driver](host_arch(), choice.accelerator)  # asks the VMM, and `plan` need not
        return choice

    async def stat(self, request: m.GuestPath, report: Report) -> m.GuestStat:
        vm = self.find(request.vm)
        vm.touch()
        agent = await self.agent(vm)
        with guest_errors(f"{vm.name}:{request.path}"):
            result = await agent.stat(request.path, follow=request.follow)
        return m.GuestStat(
            result.mode, result.uid, result.gid, result.size, result.mtime_ns, result.link if result.link else ""
        )
