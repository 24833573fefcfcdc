"""What the daemon does about VMs when it starts: finish or undo what was interrupted, take over those that run."""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import os
from collections.abc import Sequence
from pathlib import Path

from banger import system
from banger.api.errors import BangerError
from banger.daemon import vm_disk
from banger.daemon.events import Events
from banger.daemon.guest_link import GuestLink
from banger.daemon.jobs import Workers
from banger.daemon.vm import Vm
from banger.daemon.vm_lifecycle import Lifecycle
from banger.daemon.vm_load import load
from banger.daemon.vm_table import VmTable
from banger.paths import Layout
from banger.process import Watched
from banger.reasons import in_words
from banger.store.database import Store, despite_full_disk
from banger.store.records import (
    BROKEN,
    CREATED,
    REMOVING,
    RUNNING,
    STARTING,
    STOPPED,
    STOPPING,
    VmRecord,
    broken_record,
)
from banger.vmm.driver import POWERED_OFF, REBOOTED, Processes

_log = logging.getLogger(__name__)
_PATIENCE = 3.0  # seconds; taking over fifty VMs takes less
# What is said of a VM without a VMM, by the state that was written down last.
_REASONS = {
    STARTING: "the daemon ended while it started this VM",
    RUNNING: "it ended while the daemon was away",
}


class Recovery:
    """Finds the VMs of earlier daemons."""

    def __init__(
        self,
        layout: Layout,
        store: Store,
        workers: Workers,
        table: VmTable,
        lifecycle: Lifecycle,
        events: Events,
    ) -> None:
        self._layout = layout
        self._store = store
        self._workers = workers
        self._table = table
        self._lifecycle = lifecycle
        self._events = events
        self._launcher = lifecycle.launcher

    async def run(self) -> None:
        """Load the records, sweep what was interrupted, and take over the VMs that run."""
        await self._workers.run(lambda job: system.sweep_staging(self._layout.vms))
        self._table.load(map(self._known_driver, load(self._layout, self._store)))
        keys = await self._keys_of_adopted()
        ran = [vm for vm in self._table if vm.state in (RUNNING, STOPPING)]
        tasks = {asyncio.create_task(self._settle(vm, keys)): vm for vm in self._table if vm.state != BROKEN}
        if tasks:
            # a VMM that hangs, or pretends to, holds up nobody but whoever wants something of its VM
            await asyncio.wait(tasks, timeout=_PATIENCE)
        late = [task for task in tasks if not task.done()]
        for task, vm in tasks.items():
            if task in late:
                self._lifecycle.spawn(self._settle_late(vm, task))
            else:
                task.result()
        self._tell(ran, len(late))

    async def _settle_late(self, vm: Vm, task: asyncio.Task[None]) -> None:
        """Tell those who look after VMs that run of one that was taken over after they had begun."""
        await task
        if vm.link is not None:
            self._events.publish("taken-over", vm.record)

    def _tell(self, ran: Sequence[Vm], unsettled: int) -> None:
        """Log what became of the VMs that ran under the last daemon; of some that may not be known yet."""
        taken = sum(vm.link is not None for vm in ran)
        ended = max(0, len(ran) - taken - unsettled)
        waiting = f", and looks further at {unsettled} that do not answer" if unsettled else ""
        _log.info("took over %d running VMs, found %d ended%s", taken, ended, waiting)

    async def _settle(self, vm: Vm, keys: Sequence[str]) -> None:
        """Bring a VM to a state that is true; one where that fails is broken until the next daemon tries again."""
        async with vm.lock:
            try:
                await self._settle_locked(vm, keys)
            except (OSError, RecursionError, BangerError) as error:
                _log.error("what became of the VM %r cannot be found out: %s", vm.name, error)
                vm.record = broken_record(vm.record.id, vm.name, f"its state cannot be found out: {in_words(error)}")

    def _known_driver(self, record: VmRecord) -> VmRecord:
        if record.state == BROKEN or self._launcher.knows(record):
            return record
        reason = f"it was made for {record.machine.driver!r}, of which this version knows nothing"
        return broken_record(record.id, record.name, reason)

    async def _settle_locked(self, vm: Vm, keys: Sequence[str]) -> None:
        """Finish or undo what the last daemon was about to do."""
        directory = self._layout.vm(vm.record.id)
        if self._is_settled(vm, directory):
            return
        await self._workers.run(lambda job: system.sweep_staging(directory))
        processes = vm_disk.read_processes(directory) or self._find_stray(vm, directory)
        process = None if processes is None else Watched.find(processes.vmm)
        ended = processes is not None and process is None and vm.state == RUNNING
        said = self._launcher.driver(vm.record).stop_reason(directory) if ended else ""
        reason = _REASONS.get(vm.state, vm.record.reason)
        if processes is not None and process is not None and vm.state in (RUNNING, STOPPING) and not vm.record.attached:
            try:
                vmm = await self._launcher.driver(vm.record).adopt(directory, process)
            except (OSError, BangerError) as error:
                _log.warning("cannot control the VMM of %s, killing it: %s", vm.name, error)
                reason = f"killed, since it could not be taken over: {in_words(error)}"
            else:
                self._take_over(vm, self._launcher.link(vm.record, vmm, keys), processes)
                return
        while process is not None:
            process.signal(9)
            await process.ended.wait()
            # a jailer may have made another one just before its end
            stray = self._find_stray(vm, directory)
            process = None if stray is None else Watched.find(stray.vmm)
        self._launcher.sweep(vm)
        removed = vm.state == REMOVING or vm.record.attached
        if said == REBOOTED and not removed:
            self._lifecycle.spawn(self._lifecycle.boot_again(vm))
        elif removed or (vm.record.auto_remove and vm.state not in (CREATED, STARTING)):
            await self._lifecycle.remove(vm)
        elif vm.state == STARTING:
            self._settled(vm, STOPPED if vm.record.started_at else CREATED, reason)
        elif vm.state in (RUNNING, STOPPING):
            failed = (vm.state == RUNNING and said != POWERED_OFF) or bool(vm.record.status)
            vm.record = dataclasses.replace(vm.record, failed=failed)
            self._settled(vm, STOPPED, said or reason)

    def _is_settled(self, vm: Vm, directory: Path) -> bool:
        """Whether nothing was under way and nothing is left, by one look at the directory: so it is with most."""
        if vm.state not in (CREATED, STOPPED) or vm.record.attached or vm.record.auto_remove:
            return False
        left = self._launcher.traces(vm)
        with os.scandir(directory) as entries:
            return not any(entry.name in left or entry.name.startswith(system.STAGING_PREFIX) for entry in entries)

    def _settled(self, vm: Vm, state: str, reason: str) -> None:
        _log.warning("the VM %r is %s: %s", vm.name, state, reason)
        kind = "start-failed" if vm.state == STARTING else "stopped"
        with despite_full_disk():
            self._lifecycle.put(vm, state=state, reason=reason)
        self._events.publish(kind, vm.record, reason=reason)

    def _find_stray(self, vm: Vm, directory: Path) -> Processes | None:
        """The VMM of a VM that the last daemon had not written down yet when it ended."""
        identity = self._launcher.driver(vm.record).find_stray(directory)
        return None if identity is None else Processes(identity, [])

    def _take_over(self, vm: Vm, link: GuestLink, processes: Processes) -> None:
        vm.link = link
        self._launcher.watch_helpers(vm, link, processes)
        if vm.state == STOPPING:
            vm.warnings["stop"] = "the daemon ended while it stopped this VM: stop it again"
            vm.record = dataclasses.replace(vm.record, wanted=True)
            with despite_full_disk():
                self._lifecycle.put(vm, state=RUNNING, reason="")
        self._lifecycle.spawn(self._reconnect(vm, link))

    async def _reconnect(self, vm: Vm, link: GuestLink) -> None:
        try:
            if await link.connect():
                link.rebooted.set()
        except BangerError as error:
            _log.warning("the guest %s does not answer: %s", vm.name, error)
        if vm.link is link:
            self._lifecycle.watch(vm, link)

    async def _keys_of_adopted(self) -> Sequence[str]:
        """What guests that run already are told when they reboot: their own keys stay where there is none to be had."""
        try:
            return [(await self._launcher.key()).public]
        except BangerError as error:
            _log.warning("running guests keep their keys: %s", error)
            return []
