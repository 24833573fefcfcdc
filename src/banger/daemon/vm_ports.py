"""What listens in guests, how it is reached from the host, and what it speaks."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Iterable, Sequence

from banger.api import models as m
from banger.api.errors import BangerError, Code
from banger.daemon.jobs import Report
from banger.daemon.vm_forwards import REACHABLE, Forwards
from banger.daemon.vm_service import VmService
from banger.guest.agent import Agent, Listener
from banger.guest.speaks import HTTP, HTTPS, UNKNOWN, speaks
from banger.net.publish import LOOPBACK

_MOST_PROBED, _AT_ONCE = 32, 16
_ANY = {"0.0.0.0": LOOPBACK, "::": "::1"}  # addresses that mean all, and where in the guest they can be dialled


class VmPorts:
    """Serves vm.ports."""

    def __init__(self, vms: VmService, forwards: Forwards) -> None:
        self._vms = vms
        self._forwards = forwards

    async def ports(self, request: m.VmPortsRequest, report: Report) -> m.VmPorts:
        """List the ports of a running VM: those that something listens on, and those that are published."""
        vm = self._vms.find(request.vm)
        agent = await self._vms.agent(vm)
        if (link := vm.link) is None:
            raise BangerError(Code.WRONG_STATE, f"the VM {vm.name!r} was stopped meanwhile")
        listeners = await self._forwards.look(vm, link)  # where it says that a port leads, it does
        ports = [*_listening(listeners, vm.record.ports), *_leading_nowhere(listeners, vm.record.ports)]
        ports.sort(key=lambda port: (port.port, port.protocol, port.pid or 0))
        unprobed = 0
        if request.probe:
            # those that the host leads to come first
            wanted = [index for index, port in enumerate(ports) if port.protocol == "tcp" and port.addresses]
            wanted.sort(key=lambda index: not ports[index].published)
            unprobed = max(0, len(wanted) - _MOST_PROBED)
            answers = await _probe(agent, [ports[index] for index in wanted[:_MOST_PROBED]])
            for index, answer in zip(wanted, answers, strict=False):
                ports[index] = _speaking(ports[index], answer)
        return m.VmPorts(vm.name, vm.record.net, ports, unprobed)


def _listening(listeners: Iterable[Listener], published: Sequence[m.PublishedPort]) -> list[m.GuestPort]:
    """What listens; one process on several addresses is one port."""
    addresses: dict[tuple[str, int, str, int | None], list[str]] = {}
    for listener in listeners:
        key = (listener.protocol, listener.port, listener.process, listener.pid)
        addresses.setdefault(key, []).append(listener.address)
    return [
        m.GuestPort(
            protocol=protocol,
            port=port,
            addresses=found,
            process=process,
            pid=pid,
            reachable=protocol == "tcp" and any(address in REACHABLE for address in found),
            published=[each for each in published if protocol == "tcp" and each.guest_port == port],
            speaks=UNKNOWN,
            urls=[],
        )
        for (protocol, port, process, pid), found in addresses.items()
    ]


def _leading_nowhere(listeners: Iterable[Listener], published: Iterable[m.PublishedPort]) -> list[m.GuestPort]:
    """What is published, and nothing listens on it."""
    taken = {listener.port for listener in listeners if listener.protocol == "tcp"}
    leading: dict[int, list[m.PublishedPort]] = {}
    for each in published:
        if each.guest_port not in taken:
            leading.setdefault(each.guest_port, []).append(each)
    return [m.GuestPort("tcp", port, [], "", None, False, found, UNKNOWN, []) for port, found in leading.items()]


async def _probe(agent: Agent, ports: Sequence[m.GuestPort]) -> list[str]:
    """What each of these ports speaks."""
    slots = asyncio.Semaphore(_AT_ONCE)

    async def probe(port: m.GuestPort) -> str:
        async with slots:
            return await speaks(lambda: agent.dial(port.port, dialled(port.addresses)))

    return await asyncio.gather(*(probe(port) for port in ports))


def dialled(addresses: Sequence[str]) -> str:
    """Where in the guest something that listens on these addresses is reached."""
    return min(_ANY.get(address, address) for address in addresses)


def _speaking(port: m.GuestPort, spoken: str) -> m.GuestPort:
    urls = []
    if spoken in (HTTP, HTTPS) and port.reachable:
        # whoever asks is on this host
        urls = [f"{spoken}://{_ANY.get(each.address, each.address)}:{each.host_port}/" for each in port.published]
    return dataclasses.replace(port, speaks=spoken, urls=urls)
