"""Ballooning: takes memory from guests that leave it idle, and gives it back as soon as they need it.

Each guest that it is wanted of is asked every few seconds what it does, and a `Controller` decides. Guests are believed
nothing that would harm others: all they can do by lying is give away memory of their own.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import time
from collections.abc import Coroutine
from dataclasses import dataclass

from banger.api import models as m
from banger.api.errors import BangerError
from banger.daemon.events import Events
from banger.daemon.guest_link import GuestLink
from banger.daemon.vm import Vm
from banger.daemon.vm_table import VmTable
from banger.guest.agent import Agent, guest_errors
from banger.store.records import RUNNING
from banger.vmm.driver import Vmm

INTERVAL = 5.0  # seconds between two looks at a guest
_LOOKS_A_SECOND = 50  # at all guests together: with more than 250 of them the interval grows
_RELIEF_SECONDS = 1.0  # at least, between two guests' cries for memory that are heard of one VM

_LEAST_HEADROOM, _MOST_HEADROOM = 64 << 20, 512 << 20
_LEAST_TAKEN = 16 << 20  # less is not worth the guest's while
_QUIET_LOOKS = 2  # in a row, before anything is taken
_QUIET_CPU = 0.2  # processors
_QUIET_READS = 1 << 20  # bytes a second from disks
_REST = 60.0  # seconds without another attempt at a guest that needed its memory
_MIB = 1 << 20


def headroom(memory: int) -> int:
    """What is left to an idle guest beyond what it uses, in bytes: an eighth of its memory, 64 to 512 MiB.

    It is what its programs may take before the next look; docs/architecture.md says more.
    """
    return min(max(memory // 8, _LEAST_HEADROOM), _MOST_HEADROOM)


@dataclass(frozen=True)
class Reading:
    """A guest at one moment, in seconds of a clock that nobody sets; all but that is hearsay.

    What its balloon holds, what its programs could still get of memory, and what it has read from disks so far, in
    bytes, and the CPU time that it has spent.
    """

    at: float
    held: int
    available: int
    busy_ms: int
    read: int


class Controller:
    """Decides how large the balloon of one guest with `memory` bytes shall be."""

    def __init__(self, memory: int) -> None:
        self._memory = memory
        self._asked: int | None = None  # what the guest was last asked for; None where that is not known
        self._owes = False  # whether it was to be given everything back, which did not reach it
        self._before: Reading | None = None
        self._quiet = 0
        self._rests_until = 0.0

    def decide(self, now: Reading) -> int | None:
        """The bytes that the guest is to be asked for from now on, None when it has been already."""
        before, self._before = self._before, now
        held = min(now.held, self._memory)
        spare = headroom(self._memory)
        available = min(now.available, self._memory - held)
        reads = before is not None and _reads(before, now)
        self._quiet = self._quiet + 1 if before is not None and not reads and _idles(before, now) else 0
        if self._owes or (held and (available < spare // 2 or reads)):
            return self.give_back(now.at)
        takes = min(available - spare, self._memory // 4) // _MIB * _MIB
        if takes >= _LEAST_TAKEN and self._quiet >= _QUIET_LOOKS and now.at >= self._rests_until:
            self._asked = held + takes  # once more if that came to nothing: its driver may not have been there
            return self._asked
        if self._asked is None and not held:
            return None
        # what a busy guest has not reached it is not driven to, and what it was given back it goes on to take
        return self._ask(held if self._asked is None else min(held, self._asked))

    def give_back(self, at: float) -> int | None:
        """As `decide`, for a guest that needs all of its memory at this moment."""
        self._rests_until = at + _REST
        self._quiet = 0
        self._owes = False
        return self._ask(0)

    def not_delivered(self) -> None:
        """What was decided last may not have reached the guest; what it was to get back it gets at the next look."""
        self._owes = self._asked == 0
        self._asked = None

    def _ask(self, size: int) -> int | None:
        if size == self._asked:
            return None
        self._asked = size
        return size


def _reads(before: Reading, now: Reading) -> bool:
    """Whether a guest has read from its disks what it might have kept in memory."""
    return now.read - before.read > _QUIET_READS * (now.at - before.at)


def _idles(before: Reading, now: Reading) -> bool:
    return 0 <= now.busy_ms - before.busy_ms <= 1000 * _QUIET_CPU * (now.at - before.at)


@dataclass(frozen=True)
class _Attended:
    link: GuestLink
    task: asyncio.Task[None]


class Balloons:
    """Looks after the balloons of all VMs that run: a task each, which waits nearly always and never holds a lock."""

    def __init__(self, table: VmTable, events: Events) -> None:
        self._table = table
        self._events = events
        self._attended: dict[str, _Attended] = {}
        self._tasks: set[asyncio.Task[None]] = set()

    def begin(self) -> None:
        """Go on with the VMs that run already, and look after all that will."""
        self._events.listen(self._on_event)
        for vm in self._table:
            self._consider(vm, adopted=True)

    async def close(self) -> None:
        """Let go: balloons stay as they are, and the next daemon goes on with them."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def _on_event(self, event: m.VmEvent) -> None:
        if event.kind == "removed":
            self._leave(event.id)
        elif event.kind in ("started", "taken-over", "changed", "stopped"):
            self._consider(self._table.find(event.id))

    def _consider(self, vm: Vm, adopted: bool = False) -> None:
        link, attended = vm.link, self._attended.get(vm.record.id)
        wanted = link is not None and vm.record.balloon
        if attended is not None and not (wanted and attended.link is link):
            self._leave(vm.record.id)
        if link is None or (wanted and attended is not None and attended.link is link):
            return
        if wanted:
            self._attended[vm.record.id] = _Attended(link, self._spawn(self._attend(vm, link)))
        elif adopted or attended is not None:
            self._spawn(_deflate(link.vmm))

    def _leave(self, vm_id: str) -> None:
        if (attended := self._attended.pop(vm_id, None)) is not None:
            attended.task.cancel()

    def _spawn(self, work: Coroutine[None, None, None]) -> asyncio.Task[None]:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def _attend(self, vm: Vm, link: GuestLink) -> None:
        controller = Controller(vm.record.machine.memory_bytes)
        async with asyncio.TaskGroup() as group:
            group.create_task(self._look_on(vm, link, controller))
            group.create_task(_relieve(link.vmm, controller))

    async def _look_on(self, vm: Vm, link: GuestLink, controller: Controller) -> None:
        await asyncio.sleep(INTERVAL * random.random())  # a new daemon finds many of them at once
        while True:
            if link.connected and vm.state == RUNNING:
                with contextlib.suppress(BangerError), guest_errors("its memory"):
                    await _look(link, controller)
            await asyncio.sleep(max(INTERVAL, len(self._attended) / _LOOKS_A_SECOND))


async def _look(link: GuestLink, controller: Controller) -> None:
    # without a limit of time: who does not answer is left alone, and not asked a second time
    stats = await Agent((await link.agent()).session).stats()
    now = Reading(
        at=time.monotonic(),
        held=await link.vmm.balloon_bytes(),
        available=stats.memory_available,
        busy_ms=stats.cpu_busy_ms,
        read=sum(block.read for block in stats.blocks),
    )
    if (size := controller.decide(now)) is not None:
        await _set(link.vmm, controller, size)


async def _set(vmm: Vmm, controller: Controller, size: int) -> None:
    try:
        await vmm.set_balloon(size)
    except BangerError:
        controller.not_delivered()
        raise


async def _relieve(vmm: Vmm, controller: Controller) -> None:
    """Give a guest everything back as soon as it has had to take some by itself."""
    while True:
        await vmm.wait_taken_back()
        if (size := controller.give_back(time.monotonic())) is not None:
            with contextlib.suppress(BangerError):
                await _set(vmm, controller, size)
        await asyncio.sleep(_RELIEF_SECONDS)


async def _deflate(vmm: Vmm) -> None:
    """Give back what a balloon holds that is not wanted any more."""
    with contextlib.suppress(BangerError):  # then it holds nothing, or the VMM has ended
        if await vmm.balloon_bytes():
            await vmm.set_balloon(0)
