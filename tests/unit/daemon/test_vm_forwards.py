"""When published ports are led into a guest, without one; tests/vm/test_ready.py has real ones."""

import asyncio
import dataclasses
import errno
import socket
from collections.abc import Sequence
from typing import cast

import pytest

from banger.daemon import vm_forwards
from banger.daemon.events import Events
from banger.daemon.guest_link import GuestLink
from banger.daemon.vm import Vm
from banger.daemon.vm_forwards import Forwards
from banger.daemon.vm_table import VmTable
from banger.guest.agent import Agent
from banger.guest.protocol import FieldList, Fields, OpenKind, Tag, encode_fields
from banger.guest.session import AgentError, AgentSession
from banger.net.publish import PortTaken, free_ports
from banger.vmm.driver import Published
from banger.vmm.machine import Forward, Machine
from tests.unit.daemon.records import record


class Vmm:
    """What opens ports at once, or never answers."""

    def __init__(self, opened: Sequence[Forward] = (), stuck: bool = False) -> None:
        self.opened = list(opened)
        self.stuck = stuck

    async def opened_forwards(self, machine: Machine) -> list[Forward]:
        return [forward for forward in machine.forwards if forward in self.opened]

    async def open_forward(self, machine: Machine, forward: Forward) -> None:
        if self.stuck:
            await asyncio.Event().wait()
        self.opened.append(forward)

    async def change_forwards(self, machine: Machine, forwards: Sequence[Forward]) -> Published:
        self.opened = [forward for forward in self.opened if forward in forwards]
        return Published(list(forwards))


class Session:
    """A guest in which nothing listens; its kernel tracks connections, or not yet."""

    def __init__(self, tracks: bool) -> None:
        self.tracks = tracks
        self.asked = asyncio.Event()

    async def call(self, kind: OpenKind, fields: FieldList = (), timeout: float | None = None) -> Fields:
        if kind is OpenKind.PORTS:
            return Fields(b"")
        assert (Tag.PATH, "/proc/sys/net/netfilter/nf_conntrack_max") in list(fields)
        self.asked.set()
        if not self.tracks:
            raise AgentError(errno.ENOENT, "")
        return Fields(encode_fields([(tag, 0) for tag in (Tag.MODE, Tag.UID, Tag.GID, Tag.SIZE, Tag.MTIME)]))


class Link:
    def __init__(self, vmm: Vmm, session: Session) -> None:
        self.vmm = vmm
        self.session = session

    async def agent(self) -> Agent:
        return Agent(cast(AgentSession, self.session))


def running(forwards: Sequence[Forward], vmm: Vmm, tracks: bool = False) -> tuple[VmTable, Vm]:
    machine = dataclasses.replace(record().machine, forwards=list(forwards))
    table = VmTable()
    table.load([record(state="running", machine=machine)])
    vm = table.find("web")
    vm.link = cast(GuestLink, Link(vmm, Session(tracks)))
    return table, vm


def some_forwards(count: int) -> list[Forward]:
    return [Forward("127.0.0.1", port, 80) for port in free_ports(count, frozenset())]


def test_what_a_guest_may_redirect_is_opened_in_the_end() -> None:
    first, second = some_forwards(2)

    async def test() -> None:
        vmm = Vmm([first])
        table, vm = running([first, second], vmm)
        session = cast(Link, vm.link).session
        forwards = Forwards(table, Events(), patience=0.0)
        forwards.begin()
        async with asyncio.timeout(30):
            await session.asked.wait()
            assert (vmm.opened, set(vm.reserved)) == ([first], {second})
            session.tracks = True
            while vmm.opened != [first, second]:
                await asyncio.sleep(0.01)
        assert vm.reserved == {}
        await forwards.close()

    asyncio.run(test())


def test_what_is_kept_is_opened_when_the_daemon_leaves() -> None:
    (forward,) = some_forwards(1)

    async def test() -> None:
        vmm = Vmm()
        table, vm = running([forward], vmm)
        forwards = Forwards(table, Events())
        forwards.begin()
        async with asyncio.timeout(30):
            while not vm.reserved:
                await asyncio.sleep(0.01)
            assert vmm.opened == []
            await forwards.close()
        assert vmm.opened == [forward]
        assert vm.reserved == {}

    asyncio.run(test())


def test_a_vmm_that_stands_still_holds_up_nobody() -> None:
    async def test() -> None:
        (forward,) = some_forwards(1)
        table, vm = running([forward], Vmm(stuck=True))
        vm_forwards.reserve(vm, [forward])
        async with asyncio.timeout(30):
            await Forwards(table, Events()).close()

    asyncio.run(test())


def test_ports_change_all_or_none() -> None:
    old, new, late = some_forwards(3)
    moved = dataclasses.replace(old, guest_port=81)

    async def test() -> None:
        vmm = Vmm([old])
        _, vm = running([old], vmm)
        assert vm.link is not None
        taken = socket.create_server((late.address, late.host_port))
        with taken, pytest.raises(PortTaken, match=f"port {late.host_port} on 127.0.0.1 is in use"):
            await vm_forwards.change(vm, vm.link, [new, late])
        assert (vmm.opened, vm.reserved) == ([old], {})
        published = await vm_forwards.change(vm, vm.link, [moved, new])
        assert (published.forwards, vmm.opened, set(vm.reserved)) == ([moved, new], [], {moved, new})
        vm_forwards.release(vm, vm.reserved)

    asyncio.run(test())
