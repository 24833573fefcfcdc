"""`vm.set`: changes VMs, at once where that is possible, and says what waits for the next start."""

from __future__ import annotations

import dataclasses
import logging
import os
from pathlib import Path

from banger.api import models as m
from banger.api.errors import BangerError, Code
from banger.daemon import vm_changes, vm_forwards, vm_plan
from banger.daemon.events import Events
from banger.daemon.guest_link import GuestLink
from banger.daemon.host_network import HostNetwork
from banger.daemon.jobs import Report
from banger.daemon.vm import Vm
from banger.daemon.vm_lifecycle import Lifecycle
from banger.daemon.vm_port_check import check_ports
from banger.daemon.vm_service import VmService
from banger.daemon.vm_table import VmTable
from banger.disk.ext4 import check_size
from banger.paths import Layout
from banger.store.records import VmRecord
from banger.vmm.choice import FIRECRACKER, require_vcpu
from banger.vmm.driver import Published

_log = logging.getLogger(__name__)
_DISKS = {"disk": vm_plan.OVERLAY, "home": vm_plan.HOME}  # by the name of the setting


class VmSettings:
    """Changes what VMs are."""

    def __init__(
        self,
        layout: Layout,
        network: HostNetwork,
        table: VmTable,
        lifecycle: Lifecycle,
        vms: VmService,
        events: Events,
    ) -> None:
        self._layout = layout
        self._network = network
        self._table = table
        self._lifecycle = lifecycle
        self._vms = vms
        self._events = events

    async def set(self, request: m.VmSet, report: Report) -> m.VmChanged:
        """Change a VM: everything that is asked for, or nothing."""
        vm = self._table.find(request.vm)
        async with vm.lock:
            self._table.require(vm)
            return await self._set(vm, request)

    async def _set(self, vm: Vm, request: m.VmSet) -> m.VmChanged:
        before, directory = vm.record, self._layout.vm(vm.record.id)
        vm_plan.check_request(_as_create(request))
        sizes = _larger(vm.name, request, directory)
        others = {port.host_port for other in self._table if other is not vm for port in other.record.ports}
        wanted = vm_changes.changed(before, request, self._network, others)
        if wanted.machine.driver == FIRECRACKER:
            require_vcpu(wanted.machine.vcpu)
        if wanted.restart != before.restart:
            vm_plan.check_restart(wanted.restart, wanted.auto_remove)
        if wanted.name != before.name:
            self._table.refuse_taken(wanted.name)
        link = vm.link
        published = Published(before.machine.forwards)
        if link is not None and wanted.ports != vm_changes.settled(before).ports:
            given_up = {port.host_port for port in before.ports if port not in wanted.ports}
            new = [port for port in wanted.ports if port not in before.ports and port.host_port not in given_up]
            check_ports(vm, new, self._table, is_new=True)
            published = await vm_forwards.change(vm, link, wanted.machine.forwards)
        # a disk first: one that has grown although nobody knows of it is as good as before
        for setting, size in sizes.items():
            os.truncate(directory / _DISKS[setting], size)
        record = wanted if link is None else vm_changes.deferred(before, wanted, published.forwards)
        # how its main command has ended is noted at any time
        record = dataclasses.replace(record, status=vm.record.status)
        with self._table.renaming(vm, record.name):
            self._lifecycle.write(vm, record)
        names = vm_changes.differences(before, record)
        later: list[str] = []
        if link is not None:
            later += vm_changes.pending(record)
            later += await self._tell_guest(vm, link, names)
            later += await self._grow(vm, link, sizes)
        names += list(sizes)
        self._publish(vm, before, names)
        return m.VmChanged(
            self._vms.info(vm),
            [name for name in names if name not in later or (name == "ports" and record.ports != before.ports)],
            [name for name in names if name in later],
            published.why if "ports" in later else "",
        )

    def _publish(self, vm: Vm, before: VmRecord, names: list[str]) -> None:
        if vm.name != before.name:
            self._events.publish("renamed", vm.record, former=before.name)
        if names:
            self._events.publish("changed", vm.record, settings=", ".join(names))

    async def _tell_guest(self, vm: Vm, link: GuestLink, names: list[str]) -> list[str]:
        """Change host name and environment of a running guest; returns those of the settings that it does not take."""
        concerned = [name for name in names if name in ("name", "env")]
        if concerned:
            try:
                await link.reconfigure(vm_plan.guest_config(vm.record, ()))
            except BangerError as error:
                _log.warning("%s: %s", vm.name, error)
                return [name for name in concerned if name == "env"]  # its name is changed, whatever the guest thinks
            if "env" in concerned and not vm_plan.guest_config(vm.record, ()).environment:
                return ["env"]  # an empty one leaves the guest's as it is
        return []

    async def _grow(self, vm: Vm, link: GuestLink, sizes: dict[str, int]) -> list[str]:
        """Grow the disks of a running guest to the sizes of their files; returns those that have to wait."""
        later = []
        for setting, size in sizes.items():
            disk = next(disk for disk in vm.record.machine.disks if disk.path == _DISKS[setting])
            try:
                if not await link.vmm.resize_disk(disk, size):
                    later.append(setting)
                    continue
                await link.grow(vm_plan.ROLES[disk.role], size)
            except BangerError as error:
                _log.warning("%s: its %s grows at the next start only: %s", vm.name, setting, error)
                later.append(setting)
        return later


def _as_create(request: m.VmSet) -> m.VmCreate:
    """What is asked for as part of a new VM, which is checked in the same way."""
    return m.VmCreate(
        name=request.name,
        vcpu=request.vcpu,
        memory_bytes=request.memory_bytes,
        env=request.env,
        publish=request.publish,
        labels=request.labels,
        auto_stop=request.auto_stop,
        restart=request.restart,
    )


def _size(size: int) -> str:
    """A disk's size as it was asked for, whole GiB mostly."""
    return f"{size >> 20} MiB" if size & (1 << 30) - 1 else f"{size >> 30} GiB"


def _larger(name: str, request: m.VmSet, directory: Path) -> dict[str, int]:
    """The sizes that disks are to grow to, by setting; raises INVALID for one that would shrink."""
    sizes = {}
    for setting, size in (("disk", request.disk_bytes), ("home", request.home_bytes)):
        now = (directory / _DISKS[setting]).stat().st_size
        if size and size < now:
            raise BangerError(
                Code.INVALID,
                f"the {setting} of {name!r} has {_size(now)} and cannot shrink to {_size(size)}",
                hint="create another VM with a smaller one, and copy what you need",
            )
        if size > now:
            check_size(size)
            sizes[setting] = size
    return sizes
