"""What the daemon does about VMs when it starts: finish or undo what was interrupted, take over those that run."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from pathlib import Path

from banger import system
from banger.api.errors import BangerError
from banger.daemon import vm_disk
from banger.daemon.guest_link import GuestLink
from banger.daemon.jobs import Workers
from banger.daemon.vm import Vm
from banger.daemon.vm_lifecycle import Lifecycle
from banger.daemon.vm_table import VmTable
from banger.paths import Layout
from banger.process import Watched
from banger.store.database import Store
from banger.vmm.driver import Vmm

_log = logging.getLogger(__name__)


class Recovery:
    """Finds the VMs of earlier daemons."""

    def __init__(self, layout: Layout, store: Store, workers: Workers, table: VmTable, lifecycle: Lifecycle) -> None:
        self._layout = layout
        self._store = store
        self._workers = workers
        self._table = table
        self._lifecycle = lifecycle

    async def run(self) -> None:
        """Load the records, sweep what was interrupted, and take over the VMs that run."""
        await self._workers.run(lambda job: system.sweep_staging(self._layout.vms))
        records = {row.id: row.record for row in self._store.rows() if row.record is not None}
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
        self._table.load(records.values())
        await asyncio.gather(*(self._adopt(vm) for vm in self._table))

    async def _adopt(self, vm: Vm) -> None:
        directory = self._layout.vm(vm.record.id)
        system.sweep_staging(directory)
        vmm = await self._find_vmm(vm, directory)
        if vmm is None:
            self._lifecycle.sweep(vm)
            if vm.record.state == "running":
                self._lifecycle.put(vm, state="stopped", reason="it ended while the daemon was away")
            if (vm.record.auto_remove and vm.record.state != "created") or vm.record.attached:
                await self._lifecycle.remove(vm)
            return
        vm.link = self._lifecycle.link(vm.record, vmm, await self._keys_of_adopted())
        if vm.record.attached:
            # its client waited for it through the daemon that is gone
            await self._lifecycle.remove(vm)
            return
        self._lifecycle.spawn(self._reconnect(vm, vm.link))

    async def _find_vmm(self, vm: Vm, directory: Path) -> Vmm | None:
        """The VMM that runs a VM. One that the daemon was still starting is killed: nobody finishes its start."""
        driver = self._lifecycle.driver(vm.record)
        processes = vm_disk.read_processes(directory)
        identity = driver.find_stray(directory) if processes is None else processes.vmm
        process = None if identity is None else Watched.find(identity)
        if process is None:
            return None
        reason = vm.record.reason
        if processes is not None and vm.record.state == "running":
            try:
                return await driver.adopt(directory, process)
            except (OSError, BangerError) as error:
                _log.warning("cannot control the VMM of %s, killing it: %s", vm.name, error)
                reason = f"killed, since it could not be taken over: {error}"
        process.signal(9)
        await process.ended.wait()
        if vm.record.state == "running":
            self._lifecycle.put(vm, state="stopped", reason=reason)
        return None

    async def _reconnect(self, vm: Vm, link: GuestLink) -> None:
        try:
            await link.connect()
        except BangerError as error:
            _log.warning("the guest %s does not answer: %s", vm.name, error)
        if vm.link is link:
            self._lifecycle.watch(vm, link)

    async def _keys_of_adopted(self) -> Sequence[str]:
        """What guests that run already are told when they reboot: their own keys stay where there is none to be had."""
        try:
            return [(await self._lifecycle.key()).public]
        except BangerError as error:
            _log.warning("running guests keep their keys: %s", error)
            return []
