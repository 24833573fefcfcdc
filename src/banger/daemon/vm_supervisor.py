"""Brings VMs back by their restart policies, and stops those that nobody has touched for long enough."""

from __future__ import annotations

import asyncio
import dataclasses
import logging

from banger.api import models as m
from banger.api.errors import BangerError
from banger.daemon import vm_policy
from banger.daemon.events import Events
from banger.daemon.http import outcome
from banger.daemon.vm import Stages, Vm
from banger.daemon.vm_lifecycle import Lifecycle
from banger.daemon.vm_table import VmTable
from banger.net.connections import connected_ports

_log = logging.getLogger(__name__)
_STARTS_AT_ONCE = 4
_SHORTEST_LOOK_AWAY, _LONGEST_LOOK_AWAY = 1.0, 10.0  # seconds: what changes meanwhile is seen then
_SETTLES = ("removed", "starting", "stopped", "changed")


class Supervisor:
    """Learns of the ends of VMs from their events."""

    def __init__(self, table: VmTable, lifecycle: Lifecycle, events: Events) -> None:
        self._table = table
        self._lifecycle = lifecycle
        self._events = events
        self._restarts: dict[str, asyncio.Task[None]] = {}
        self._starting: set[str] = set()
        self._slots = asyncio.Semaphore(_STARTS_AT_ONCE)
        self._watching: asyncio.Task[None] | None = None

    def begin(self) -> None:
        """Start the VMs that are to run and do not, and look after all of them from now on."""
        self._events.listen(self._on_event)
        for vm in self._table:
            if not vm.lock.locked():  # what becomes of the others is still to be found out, and told
                self._consider(vm)
        self._watching = asyncio.create_task(self._watch_untouched())

    async def close(self) -> None:
        """Let go: those that wait for a restart are brought back by the next daemon."""
        tasks = [*self._restarts.values(), *([self._watching] if self._watching else [])]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _on_event(self, event: m.VmEvent) -> None:
        # while a restart starts a VM, its events are those of that start
        if event.kind not in _SETTLES or event.id in self._starting:
            return
        waiting = self._restarts.get(event.id)
        if event.kind in ("removed", "starting"):
            if waiting is not None:
                waiting.cancel()
        else:
            self._consider(self._table.find(event.id))

    def _consider(self, vm: Vm) -> None:
        """Plan the restart of a VM that does not run, or call off the one that is planned, as its policy says."""
        waiting = self._restarts.get(vm.record.id)
        if vm.link is not None:
            return
        if not vm_policy.wants_restart(vm.record):
            if waiting is not None:
                waiting.cancel()
            vm.restarting = False
            self._give_up(vm)
        elif waiting is None or waiting.done():
            vm.restarting = True  # before anybody who waits for it to be stopped looks
            task = asyncio.create_task(self._restart(vm))
            self._restarts[vm.record.id] = task
            task.add_done_callback(lambda done: self._forget(vm, task))

    def _forget(self, vm: Vm, task: asyncio.Task[None]) -> None:
        if self._restarts.get(vm.record.id) is task:
            del self._restarts[vm.record.id]
            vm.restarting = False

    async def _restart(self, vm: Vm) -> None:
        """Start a VM after its delay, and again after longer ones, until it runs or has been tried often enough."""
        while vm_policy.wants_restart(vm.record):
            restarts = vm.record.restarts
            seconds = vm_policy.delay(restarts)
            self._events.publish("restarting", vm.record, restart=restarts + 1, seconds=f"{seconds:g}")
            await asyncio.sleep(seconds)
            async with self._slots:
                if await self._start(vm, restarts + 1):
                    return
        self._give_up(vm)

    def _give_up(self, vm: Vm) -> None:
        """Leave a VM that has been tried often enough as it is, and say so."""
        record = vm.record
        if record.wanted and record.failed and vm_policy.gave_up(record):
            vm.restarting = False
            reason = f"{record.reason}; {vm_policy.given_up(record)}"
            self._lifecycle.write(vm, dataclasses.replace(record, wanted=False, reason=reason))
            self._events.publish("gave-up", vm.record, restarts=record.restarts)

    async def _start(self, vm: Vm, restarts: int) -> bool:
        """Whether nothing is left to do: the VM runs, or somebody else has taken care of it."""
        self._starting.add(vm.record.id)
        try:
            failure = await outcome(self._lifecycle.start(vm, Stages(lambda progress: None), restarts))
        finally:
            self._starting.discard(vm.record.id)
        if isinstance(failure, BangerError):
            _log.warning("restart %d of %s: %s", restarts, vm.name, failure)
        return vm.link is not None or vm not in self._table

    async def _watch_untouched(self) -> None:
        """Stop VMs that have been left alone."""
        while True:
            left = min((vm.time_left for vm in self._table), default=_LONGEST_LOOK_AWAY)
            await asyncio.sleep(max(_SHORTEST_LOOK_AWAY, min(left, _LONGEST_LOOK_AWAY)))
            limited = [vm for vm in self._table if vm.record.auto_stop]
            # clients of published ports go past the daemon
            connected = connected_ports() if any(vm.record.ports for vm in limited) else set()
            for vm in limited:
                if any(port.host_port in connected for port in vm.record.ports):
                    vm.touch()
                if vm.left_alone and not vm.lock.locked():
                    self._lifecycle.spawn(self._stop(vm))

    async def _stop(self, vm: Vm) -> None:
        failure = await outcome(self._lifecycle.stop_untouched(vm))
        if isinstance(failure, BangerError):
            _log.warning("%s was left alone, but does not stop: %s", vm.name, failure)
