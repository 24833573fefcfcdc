"""Ballooning: what is taken of which guest, when it gets it back, and whom the daemon asks how often."""

from __future__ import annotations

import asyncio
import dataclasses
import time
from collections.abc import Awaitable, Callable
from typing import cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from banger.api.errors import BangerError, Code
from banger.daemon import balloon
from banger.daemon.balloon import Balloons, Controller, Reading, headroom
from banger.daemon.events import Events
from banger.daemon.guest_link import GuestLink
from banger.daemon.vm import Vm
from banger.daemon.vm_table import VmTable
from banger.guest.agent import BlockStats, Stats
from banger.guest.protocol import ProtocolError
from banger.guest.session import SessionLost
from tests.unit.daemon.records import record

MIB, GIB = 1 << 20, 1 << 30
TIMEOUT = 20.0


def reading(at: float, held: int, available: int, busy_ms: int = 0, read: int = 0) -> Reading:
    return Reading(at, held, available, busy_ms, read)


class Guest:
    """A guest that does as it is asked, and uses `used` bytes, all of them where it has none left."""

    def __init__(self, memory: int, used: int) -> None:
        self.memory = memory
        self.used = used
        self.held = self.busy_ms = self.read = 0
        self.at = 1000.0
        self.controller = Controller(memory)
        self.asked: list[int] = []

    def look(self, busy_ms: int = 10, read: int = 0) -> None:
        """Five seconds later, in which it was so busy."""
        self.at += 5
        self.busy_ms += busy_ms
        self.read += read
        available = max(0, self.memory - self.held - self.used)
        size = self.controller.decide(Reading(self.at, self.held, available, self.busy_ms, self.read))
        if size is not None:
            self.asked.append(size)
            self.held = size


@pytest.mark.parametrize(
    ("memory", "left"),
    [(128 * MIB, 64 * MIB), (GIB, 128 * MIB), (4 * GIB, 512 * MIB), (64 * GIB, 512 * MIB)],
)
def test_an_idle_guest_keeps_its_headroom(memory: int, left: int) -> None:
    assert headroom(memory) == left
    guest = Guest(memory, used=32 * MIB)
    for _ in range(12):
        guest.look()
    assert guest.held == max(0, memory - 32 * MIB - left)
    asked = len(guest.asked)
    for used in (30, 31, 34, 40, 33):  # and then it is left in peace, whatever little it does
        guest.used = used * MIB
        guest.look()
    assert len(guest.asked) == asked


def test_nothing_is_taken_before_it_has_been_quiet_for_a_while() -> None:
    guest = Guest(GIB, used=100 * MIB)
    guest.look()
    guest.look()
    guest.look(busy_ms=4000)
    guest.look(read=100 * MIB)
    guest.look()
    assert guest.asked == []
    guest.look()
    assert guest.asked == [256 * MIB]  # a quarter at a time


@pytest.mark.parametrize(("used", "read"), [(GIB - 50 * MIB, 0), (GIB, 0), (100 * MIB, 50 * MIB)])
def test_a_guest_that_needs_memory_gets_all_of_it_back(used: int, read: int) -> None:
    guest = Guest(GIB, used=100 * MIB)
    for _ in range(8):
        guest.look()
    assert guest.held > GIB // 2
    guest.used = used
    guest.look(read=read)
    assert guest.held == 0
    # nothing is taken again at once, also when it rests
    guest.used = 100 * MIB
    for _ in range(10):
        guest.look()
    assert guest.held == 0
    for _ in range(10):
        guest.look()
    assert guest.held > GIB // 2


def test_computing_alone_costs_it_nothing_and_gains_it_nothing() -> None:
    guest = Guest(GIB, used=100 * MIB)
    for _ in range(4):
        guest.look()
    held = guest.held
    for _ in range(5):
        guest.look(busy_ms=5000)
    assert guest.held == held


def test_a_guest_is_not_driven_to_what_it_did_not_reach() -> None:
    controller = Controller(GIB)
    assert [controller.decide(reading(at, 0, GIB)) for at in (0, 5)] == [None, None]
    assert controller.decide(reading(10, 0, GIB)) == 256 * MIB
    assert controller.decide(reading(15, 40 * MIB, 140 * MIB)) == 40 * MIB


def test_a_guest_takes_back_slowly_what_it_was_given_back() -> None:
    controller = Controller(GIB)
    assert controller.decide(reading(0, 500 * MIB, 400 * MIB)) == 500 * MIB  # found so by a new daemon
    assert controller.give_back(1) == 0
    assert controller.give_back(2) is None
    assert controller.decide(reading(5, 300 * MIB, 400 * MIB)) is None
    assert controller.decide(reading(10, 0, 400 * MIB)) is None


def test_a_new_daemon_says_nothing_to_a_guest_that_gives_nothing() -> None:
    assert Controller(GIB).decide(reading(0, 0, 100 * MIB)) is None


def test_what_was_not_delivered_is_given_back_at_the_next_look() -> None:
    controller = Controller(GIB)
    assert controller.decide(reading(0, 500 * MIB, 50 * MIB)) == 0
    controller.not_delivered()
    assert controller.decide(reading(5, 500 * MIB, 400 * MIB)) == 0  # although it would do without by now
    controller.not_delivered()
    assert controller.decide(reading(10, 0, 900 * MIB)) == 0  # and although it has helped itself, for the time being
    assert controller.decide(reading(15, 0, 900 * MIB)) is None


def test_what_was_delivered_after_all_is_given_back() -> None:
    controller = Controller(GIB)
    assert [controller.decide(reading(at, 0, GIB)) for at in (0, 5)] == [None, None]
    assert controller.decide(reading(10, 0, GIB)) == 256 * MIB
    controller.not_delivered()
    assert controller.decide(reading(15, 0, GIB, busy_ms=5000)) is None
    assert controller.decide(reading(20, 256 * MIB, 50 * MIB)) == 0


sizes = st.one_of(st.integers(0, 2 * GIB), st.integers(0, 1 << 64))
readings = st.lists(st.builds(Reading, st.floats(0, 1e6), sizes, sizes, sizes, sizes), max_size=30)


@given(st.integers(128 * MIB, 64 * GIB), readings)
def test_never_takes_below_the_headroom(memory: int, seen: list[Reading]) -> None:
    """Whatever guest and VMM say, in whatever order."""
    controller = Controller(memory)
    for now in sorted(seen, key=lambda one: one.at):
        size = controller.decide(now)
        if size is None:
            continue
        assert 0 <= size <= memory
        if size > now.held:
            assert now.available - (size - now.held) >= headroom(memory)
            assert size <= memory - headroom(memory)
            assert size - now.held <= memory // 4


@given(st.integers(128 * MIB, 8 * GIB), st.lists(st.tuples(st.floats(0, 1), st.integers(0, 5000)), max_size=60))
def test_an_honest_guest_always_has_its_headroom_after_taking(memory: int, life: list[tuple[float, int]]) -> None:
    guest = Guest(memory, used=0)
    for share, busy_ms in life:
        guest.used = int(share * memory)
        before = guest.held
        guest.look(busy_ms=busy_ms)
        if guest.held > before:
            assert memory - guest.held - guest.used >= headroom(memory)
        assert guest.held == 0 or memory - guest.held - guest.used >= headroom(memory) // 2


class FakeVmm:
    """A VMM whose balloon grows and shrinks at once."""

    def __init__(self) -> None:
        self.held = 0
        self.asked: list[int] = []
        self.failure: Exception | None = None
        self.taken_back = asyncio.Event()

    async def set_balloon(self, size: int) -> None:
        if self.failure is not None:
            raise self.failure
        self.asked.append(size)
        self.held = size

    async def balloon_bytes(self) -> int:
        return self.held

    async def wait_taken_back(self) -> None:
        await self.taken_back.wait()


class FakeLink:
    """A guest that is idle; its answers are counted, and there are none without `connected`."""

    connected = True

    def __init__(self) -> None:
        self.vmm = FakeVmm()
        self.session = self
        self.looks = 0
        self.answer: Callable[[], Awaitable[None]] | None = None

    async def agent(self) -> FakeLink:
        return self

    async def stats(self) -> Stats:
        self.looks += 1
        if self.answer is not None:
            await self.answer()
        used = 100 * MIB + self.vmm.held
        return Stats(0, 0, 1, GIB, GIB - used, (), 1, (), (), (BlockStats("vda", 0, 0),))


class Host:
    """The balloons of some running VMs."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, count: int = 1, wanted: bool = True) -> None:
        monkeypatch.setattr(balloon, "INTERVAL", 0.001)
        monkeypatch.setattr(balloon, "_QUIET_LOOKS", 1)
        monkeypatch.setattr(balloon, "Agent", lambda session: session)
        self.events, table = Events(), VmTable()
        table.load(record(id=f"{n:012}", name=f"vm{n}", state="running", balloon=wanted) for n in range(count))
        self.vms = list(table)
        self.links = [FakeLink() for _ in self.vms]
        for vm, link in zip(self.vms, self.links, strict=True):
            vm.link = cast(GuestLink, link)
        self.balloons = Balloons(table, self.events)

    def change(self, vm: Vm, kind: str, **changes: object) -> None:
        vm.record = dataclasses.replace(vm.record, **changes)  # type: ignore[arg-type]  # checked by the class
        self.events.publish(kind, vm.record)

    def run(self, test: Callable[[], Awaitable[None]]) -> None:
        """Look after them for as long as the test runs."""

        async def limited() -> None:
            async with asyncio.timeout(TIMEOUT):
                self.balloons.begin()
                await test()
                await self.balloons.close()
                assert asyncio.all_tasks() == {asyncio.current_task()}

        asyncio.run(limited())


async def until(condition: Callable[[], bool]) -> None:
    while not condition():
        await asyncio.sleep(0.001)


def test_a_running_vm_is_looked_after_and_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    host = Host(monkeypatch)
    vm, link = host.vms[0], host.links[0]
    touched = vm.__dict__["_touched"]

    async def test() -> None:
        await until(lambda: link.vmm.held > GIB // 2)
        async with vm.lock:  # it needs none
            seen = link.looks
            await until(lambda: link.looks > seen)

    host.run(test)
    assert vm.__dict__["_touched"] == touched
    assert link.vmm.held > GIB // 2  # for the next daemon


def test_a_vm_that_ends_or_is_not_to_be_asked_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    host = Host(monkeypatch, count=3)

    async def test() -> None:
        await until(lambda: all(link.vmm.held for link in host.links))
        host.change(host.vms[0], "changed", balloon=False)
        host.vms[1].link = None
        host.change(host.vms[1], "stopped", state="stopped")
        host.events.publish("removed", host.vms[2].record)
        await until(lambda: not host.links[0].vmm.held)
        looks = [link.looks for link in host.links]
        await asyncio.sleep(0.05)
        assert [link.looks for link in host.links] == looks
        # and back again, with another VMM
        host.links[1] = FakeLink()
        host.vms[1].link = cast(GuestLink, host.links[1])
        host.change(host.vms[1], "started", state="running")
        host.change(host.vms[0], "changed", balloon=True)
        await until(lambda: bool(host.links[0].vmm.held and host.links[1].vmm.held))

    host.run(test)


def test_a_new_daemon_empties_balloons_that_are_not_wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    """The last one may have ended between writing that down and doing it."""
    host = Host(monkeypatch, wanted=False)
    host.links[0].vmm.held = 5 * MIB

    async def test() -> None:
        await until(lambda: host.links[0].vmm.asked == [0])

    host.run(test)
    assert host.links[0].looks == 0


def test_a_guest_that_takes_memory_back_gets_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also while it answers nothing, and however often it does."""
    host = Host(monkeypatch)
    link = host.links[0]

    async def never() -> None:
        await asyncio.Event().wait()

    async def test() -> None:
        await until(lambda: link.vmm.held > GIB // 2)
        link.answer = never
        asked = len(link.vmm.asked)
        link.vmm.taken_back.set()
        await until(lambda: link.vmm.held == 0)
        looks = link.looks
        await asyncio.sleep(0.05)
        assert link.vmm.asked[asked:] == [0]
        assert link.looks <= looks + 1  # who does not answer is not asked again

    host.run(test)


def test_memory_is_given_back_although_the_vmm_fails_once(monkeypatch: pytest.MonkeyPatch) -> None:
    host = Host(monkeypatch)
    link = host.links[0]

    async def test() -> None:
        await until(lambda: link.vmm.held > GIB // 2)
        link.vmm.failure = BangerError(Code.GUEST, "Firecracker did not answer")
        link.vmm.taken_back.set()
        link.vmm.taken_back = asyncio.Event()
        looks = link.looks
        await until(lambda: link.looks > looks + 1)
        assert link.vmm.held > GIB // 2
        link.vmm.failure = None
        await until(lambda: link.vmm.held == 0)

    host.run(test)


@pytest.mark.parametrize(
    "failure", [SessionLost("gone"), ProtocolError("nonsense"), BangerError(Code.GUEST, "QEMU has ended")]
)
def test_failures_are_those_of_one_look(monkeypatch: pytest.MonkeyPatch, failure: Exception) -> None:
    host = Host(monkeypatch, count=2)
    first, second = host.links

    async def fail() -> None:
        raise failure

    async def test() -> None:
        first.answer = fail
        second.vmm.failure = failure
        await until(lambda: first.looks > 5 and second.looks > 5)
        first.answer = second.vmm.failure = None
        await until(lambda: bool(first.vmm.held and second.vmm.held))

    host.run(test)


def test_nobody_is_asked_while_a_guest_boots(monkeypatch: pytest.MonkeyPatch) -> None:
    host = Host(monkeypatch, count=2)
    host.links[0].connected = False
    host.vms[1].record = dataclasses.replace(host.vms[1].record, state="stopping")

    async def test() -> None:
        await asyncio.sleep(0.05)
        assert [link.looks for link in host.links] == [0, 0]

    host.run(test)


def test_with_many_vms_each_is_asked_less_often(monkeypatch: pytest.MonkeyPatch) -> None:
    host = Host(monkeypatch, count=200)
    monkeypatch.setattr(balloon, "_LOOKS_A_SECOND", 400)

    async def test() -> None:
        await until(lambda: all(link.looks for link in host.links))
        before = sum(link.looks for link in host.links)
        began = time.monotonic()
        await asyncio.sleep(1)
        assert sum(link.looks for link in host.links) - before < 800 * (time.monotonic() - began)

    host.run(test)
