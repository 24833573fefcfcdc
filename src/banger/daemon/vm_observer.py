"""Looking at VMs for longer than a moment: waiting for a state, following events, all details of one."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Mapping
from pathlib import Path

from banger.api import models as m
from banger.api.codec import Json, encode
from banger.api.errors import BangerError, Code
from banger.api.vm_conditions import GRAMMAR, parse_condition
from banger.api.vm_filters import EVENT_KEYS, matches, parse_filters
from banger.daemon import vm_policy
from banger.daemon.events import Events, Subscription
from banger.daemon.jobs import Report
from banger.daemon.streams import Peer
from banger.daemon.vm import Vm
from banger.daemon.vm_readiness import Readiness, check_timeout
from banger.daemon.vm_service import VmService
from banger.daemon.vm_table import VmTable
from banger.durations import MAX_SECONDS
from banger.paths import Layout


def _exited(vm: Vm, here: bool) -> bool:
    """Whether the main command of a VM has ended, and is not about to be run again by a restart policy."""
    if not here or vm.state in ("created", "stopped"):
        return True
    status = vm.record.status
    return vm.state == "running" and status is not None and not vm_policy.wants_after_main(vm.record, status)


# For each state that can be waited for, whether a VM is in it.
REACHED: Mapping[str, Callable[[Vm, bool], bool]] = {
    "running": lambda vm, here: vm.state == "running",
    "stopped": lambda vm, here: not here or vm.state in ("created", "stopped"),
    "removed": lambda vm, here: not here,
    "exited": _exited,
}


class VmObserver:
    """Tells clients what becomes of VMs."""

    def __init__(self, layout: Layout, table: VmTable, vms: VmService, readiness: Readiness, events: Events) -> None:
        self._layout = layout
        self._table = table
        self._vms = vms
        self._readiness = readiness
        self._events = events

    async def wait(self, request: m.VmWait, report: Report) -> m.VmWaited:
        """Return once a VM is in a state, or its guest ready; one that has been removed is stopped, too."""
        check_timeout(request.timeout)
        vm = self._table.find(request.vm)
        reached = REACHED.get(request.state)
        if reached is None:
            return await self._wait_ready(vm, request)
        with self._events.subscribed() as events, contextlib.suppress(TimeoutError):
            async with asyncio.timeout(request.timeout):
                while not reached(vm, vm in self._table):
                    if vm not in self._table:
                        raise BangerError(Code.NOT_FOUND, f"the VM {vm.name!r} was removed meanwhile")
                    await events.next()
        here = vm in self._table
        state = vm.state if here else "removed"
        return m.VmWaited(vm.name, state, vm.record.reason, vm.record.status, reached(vm, here))

    async def _wait_ready(self, vm: Vm, request: m.VmWait) -> m.VmWaited:
        try:
            condition = parse_condition(request.state)
        except BangerError as error:
            error.hint = f"wait for one of {', '.join(REACHED)}, or: {GRAMMAR}"
            raise
        self._table.require(vm)
        if vm.state in ("created", "stopped"):
            raise BangerError(
                Code.WRONG_STATE, f"the VM {vm.name!r} is {vm.state}, not running", hint=f"banger vm start {vm.name}"
            )
        # a main command that ended long ago keeps nobody from starting a server in another way
        ready = await self._readiness.wait(vm, condition, request.timeout, ended=vm.record.status is not None)
        return m.VmWaited(vm.name, vm.state, vm.record.reason, vm.record.status, ready)

    async def events(self, request: m.VmEvents, peer: Peer) -> None:
        """Send the events that a client asks for, until it leaves."""
        filters = parse_filters(request.filters, EVENT_KEYS)
        ids = {self._table.find(reference).record.id for reference in request.vms}
        if not 0 <= request.since <= MAX_SECONDS:
            raise BangerError(Code.INVALID, f"{request.since:g} s is not a time since when", hint="for example 10m")

        def wanted(event: m.VmEvent) -> bool:
            return (not ids or event.id in ids) and matches(event, filters)

        # nothing is awaited between the two, so that no event is lost or comes twice
        with self._events.subscribed() as subscription:
            past = [event for event in self._events.past(request.since) if wanted(event)]
            await peer.send_event("started", result={})
            for event in past:
                await peer.send_event("vm", result=encode(event), missed=0)
            if request.follow:
                await _until_gone(peer, subscription, wanted)
        await peer.send_event("exit", signalled=False, value=0)

    async def inspect(self, request: m.VmRef, report: Report) -> m.VmDetails:
        """All that is known of a VM."""
        vm = self._table.find(request.vm)
        directory = self._layout.vm(vm.record.id)
        record = encode(vm.record)
        assert isinstance(record, dict)
        return m.VmDetails(self._vms.info(vm), _objects(record), _files(directory))


async def _until_gone(peer: Peer, subscription: Subscription, wanted: Callable[[m.VmEvent], bool]) -> None:
    async def send() -> None:
        while True:
            missed, event = await subscription.next()
            if missed or wanted(event):
                await peer.send_event("vm", result=encode(event) if wanted(event) else None, missed=missed)

    sending, gone = asyncio.create_task(send()), asyncio.create_task(peer.gone())
    try:
        await asyncio.wait((sending, gone), return_when=asyncio.FIRST_COMPLETED)
        if sending.done():
            sending.result()
    finally:
        for task in (sending, gone):
            task.cancel()
        await asyncio.gather(sending, gone, return_exceptions=True)


def _objects(record: Mapping[str, Json]) -> dict[str, object]:
    return dict(record)


def _files(directory: Path) -> list[m.VmFile]:
    """The regular files of a VM's directory."""
    files = []
    for path in sorted(directory.iterdir()):
        if path.is_file() and not path.is_symlink():
            status = path.stat()
            files.append(m.VmFile(path.name, status.st_size, status.st_blocks * 512, status.st_nlink > 1))
    return files
