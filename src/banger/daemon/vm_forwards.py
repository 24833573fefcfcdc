"""Leads the published ports of running VMs into their guests: each once something listens there.

Until then connections are refused, as they are where a server on the host has not started yet. A VMM that listened from
the beginning would accept them and then reset them.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Iterable, Sequence

from banger.api import models as m
from banger.api.errors import BangerError
from banger.daemon.events import Events
from banger.daemon.guest_link import GuestLink
from banger.daemon.vm import Vm
from banger.daemon.vm_table import VmTable
from banger.guest.agent import Agent, Listener, guest_errors
from banger.guest.session import AgentError
from banger.net import publish
from banger.vmm.driver import Published
from banger.vmm.machine import Forward

_log = logging.getLogger(__name__)
# seconds between two looks at a guest: at first a server may be there at any moment
_FIRST_PAUSE, _LONGEST_PAUSE, _SLOWER = 0.1, 2.0, 1.2
_LOOK_SECONDS = 10.0
_VMM_SECONDS = 2.0  # for one answer: locks are held meanwhile
_LOOKS_A_SECOND = 50  # at all guests together
# After so long all ports lead into a guest whose kernel may redirect them (DNAT) to where nothing is seen to listen.
_PATIENCE = 60.0
_TRACKING = "/proc/sys/net/netfilter/nf_conntrack_max"  # what redirects connections keeps track of them
REACHABLE = ("0.0.0.0", "::", publish.GUEST_ADDRESS)


class Forwards:
    """Looks after the published ports of all VMs that run, a task each until all of them lead into the guest."""

    def __init__(self, table: VmTable, events: Events, patience: float = _PATIENCE) -> None:
        self._patience = patience
        self._table = table
        self._events = events
        self._tasks: dict[str, asyncio.Task[None]] = {}

    def begin(self) -> None:
        """Go on with the VMs that run already, and look after all that will."""
        self._events.listen(self._on_event)
        for vm in self._table:
            self._attend(vm)

    async def close(self) -> None:
        """Let go: while there is no daemon all ports lead into the guests, whether something listens there or not."""
        for task in self._tasks.values():
            task.cancel()
        await asyncio.gather(*self._tasks.values(), return_exceptions=True)
        await asyncio.gather(*(self._open(vm, None) for vm in self._table), return_exceptions=True)

    def _on_event(self, event: m.VmEvent) -> None:
        if event.kind in ("started", "taken-over", "rebooted", "changed"):
            self._attend(self._table.find(event.id), again=event.kind == "rebooted")
        elif event.kind in ("stopped", "removed") and (task := self._tasks.get(event.id)) is not None:
            task.cancel()

    def _attend(self, vm: Vm, again: bool = False) -> None:
        if (task := self._tasks.get(vm.record.id)) is not None:
            task.cancel()
        if vm.link is not None and vm.record.machine.forwards:
            task = self._tasks[vm.record.id] = asyncio.create_task(self._lead(vm, vm.link, again))
            task.add_done_callback(lambda done: self._forget(vm.record.id, done))

    def _forget(self, vm_id: str, task: asyncio.Task[None]) -> None:
        if self._tasks.get(vm_id) is task:
            del self._tasks[vm_id]

    async def _lead(self, vm: Vm, link: GuestLink, again: bool) -> None:
        """Lead the ports of one VM into its guest as soon as it listens; all, when it has just booted `again`."""
        try:
            while not await self._take_up(vm, link, again):
                await asyncio.sleep(_LONGEST_PAUSE)
            began, pause = time.monotonic(), _FIRST_PAUSE
            while vm.link is link and vm.reserved:
                with contextlib.suppress(BangerError):  # it boots, or is busy
                    await self.look(vm, link)
                    if time.monotonic() - began >= self._patience and await _may_redirect(link):
                        async with vm.lock:
                            await self._open(vm, None)
                await asyncio.sleep(max(pause, len(self._tasks) / _LOOKS_A_SECOND))
                pause = min(pause * _SLOWER, _LONGEST_PAUSE)
        except BangerError as error:  # the VMM has ended
            _log.debug("%s: %s", vm.name, error)

    async def _take_up(self, vm: Vm, link: GuestLink, again: bool) -> bool:
        """Keep the ports that do not lead into a guest: it may have started under another daemon, or boot `again`.

        False when its VMM does not answer.
        """
        async with vm.lock:
            if vm.link is not link:
                return True
            machine = vm.record.machine
            try:
                async with asyncio.timeout(_VMM_SECONDS):
                    opened = await link.vmm.opened_forwards(machine)
                    for forward in opened if again else ():
                        if await link.vmm.close_forward(machine, forward):
                            opened = [other for other in opened if other != forward]
            except TimeoutError:
                return False
            for forward in machine.forwards:
                if forward not in opened and forward not in vm.reserved:
                    try:
                        reserve(vm, [forward])
                    except publish.PortTaken as error:
                        self._warn(vm, forward, error.message)
            return True

    async def look(self, vm: Vm, link: GuestLink) -> Sequence[Listener]:
        """What listens in a guest; published ports that lead there do so from now on. Raises BangerError(GUEST)."""
        agent = await link.agent()
        with guest_errors(f"cannot list the ports of {vm.name!r}"):
            listeners = await Agent(agent.session, _LOOK_SECONDS).ports()
        reached = {each.port for each in listeners if each.protocol == "tcp" and each.address in REACHABLE}
        if any(forward.guest_port in reached for forward in vm.reserved):
            async with vm.lock:
                await self._open(vm, reached)
        return listeners

    async def _open(self, vm: Vm, ports: set[int] | None) -> None:
        """Lead what was kept for these ports of the guest (None: for all) into it."""
        for forward in list(vm.reserved):
            if vm.link is None or (ports is not None and forward.guest_port not in ports):
                continue
            vm.reserved.pop(forward).close()
            try:
                async with asyncio.timeout(_VMM_SECONDS):
                    await vm.link.vmm.open_forward(vm.record.machine, forward)
            except TimeoutError:
                pass  # a VMM that stands still does so when it goes on
            except BangerError as error:
                self._warn(vm, forward, error.message)

    def _warn(self, vm: Vm, forward: Forward, message: str) -> None:
        warning = f"lost: its port {forward.host_port}; {message}"
        _log.warning("%s: %s", vm.name, warning)
        vm.warnings[f"port {forward.host_port}"] = warning
        self._events.publish("lost", vm.record, port=forward.host_port, message=warning)


async def _may_redirect(link: GuestLink) -> bool:
    """Whether the kernel of a guest keeps track of connections. Raises BangerError(GUEST)."""
    agent = await link.agent()
    with guest_errors("what its kernel does"):
        try:
            await Agent(agent.session, _LOOK_SECONDS).stat(_TRACKING)
        except AgentError:
            return False
    return True


async def change(vm: Vm, link: GuestLink, wanted: Sequence[Forward]) -> Published:
    """Let a VM, whose lock is held, publish these ports as far as its VMM can.

    Raises PortTaken, and changes nothing then unless the port is one that gets another target.
    """
    machine = vm.record.machine
    gone = [forward for forward in machine.forwards if forward not in wanted]
    new = [forward for forward in wanted if forward not in machine.forwards]
    # ports that lead somewhere else from now on are free only when they have been given up
    given_up = {forward.host_port for forward in gone}
    reserve(vm, [forward for forward in new if forward.host_port not in given_up])
    try:
        published = await link.vmm.change_forwards(machine, wanted)
    except BangerError:
        release(vm, new)
        raise
    release(vm, gone)
    release(vm, [forward for forward in new if forward not in published.forwards])
    reserve(vm, [forward for forward in new if forward in published.forwards and forward.host_port in given_up])
    return published


def reserve(vm: Vm, forwards: Iterable[Forward]) -> None:
    """Keep ports of the host for a VM until they lead into its guest. Raises PortTaken, and keeps none of them then."""
    with contextlib.ExitStack() as stack:
        kept = {forward: stack.enter_context(publish.reserve(forward)) for forward in forwards}
        stack.pop_all()
    vm.reserved.update(kept)


def release(vm: Vm, forwards: Iterable[Forward]) -> None:
    """Let go of ports that were kept for a VM."""
    for forward in list(forwards):
        if (kept := vm.reserved.pop(forward, None)) is not None:
            kept.close()
