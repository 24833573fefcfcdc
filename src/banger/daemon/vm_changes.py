"""What a change of settings makes of a VM's record. A running VM keeps its machine; the new one waits in the record."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence, Set

from banger.api import models as m
from banger.api.errors import BangerError, Code
from banger.daemon import vm_plan
from banger.daemon.host_network import HostNetwork
from banger.net.publish import free_ports, parse_publish
from banger.store.records import VmRecord
from banger.vmm.machine import Forward, Machine


def settled(record: VmRecord) -> VmRecord:
    """The record of a VM that does not run: it has taken up what was set while it did."""
    if record.next_machine is None:
        return record
    ports = record.ports if record.next_ports is None else record.next_ports
    return dataclasses.replace(record, machine=record.next_machine, ports=ports, next_machine=None, next_ports=None)


def pending(record: VmRecord) -> list[str]:
    """The settings that apply at the next start."""
    later = record.next_machine
    if later is None:
        return []
    changed = {
        "vcpu": later.vcpu != record.machine.vcpu,
        "memory": later.memory_bytes != record.machine.memory_bytes,
        "ports": record.next_ports is not None and record.next_ports != record.ports,
    }
    return [name for name, differs in changed.items() if differs]


def changed(record: VmRecord, request: m.VmSet, network: HostNetwork, taken: Set[int]) -> VmRecord:
    """The record with the changes that a request asks for, as of a VM that does not run; disks are not part of it.

    `taken` are ports of the host that other VMs publish. Raises BangerError(INVALID) for what makes no sense.
    """
    record = settled(record)
    labels = dict(record.labels)
    for name in request.unset_labels:
        if name not in labels:
            raise BangerError(Code.INVALID, f"{record.name!r} has no label {name!r}", hint=_known(labels))
        del labels[name]
    ports = _ports(record, request, taken)
    machine = dataclasses.replace(
        record.machine,
        vcpu=request.vcpu or record.machine.vcpu,
        memory_bytes=request.memory_bytes >> 20 << 20 or record.machine.memory_bytes,
    )
    if ports != record.ports:
        machine = _with_ports(machine, record.net, ports, network)
    env = _env(record, request)
    vm_plan.check_environment(record.command, [*record.image_env, *env])
    return dataclasses.replace(
        record,
        name=request.name or record.name,
        labels=labels | request.labels,
        env=env,
        ports=ports,
        machine=machine,
        auto_stop=record.auto_stop if request.auto_stop is None else request.auto_stop,
        restart=request.restart or record.restart,
        balloon=record.balloon if request.balloon is None else request.balloon,
    )


def deferred(record: VmRecord, wanted: VmRecord, published: Sequence[Forward]) -> VmRecord:
    """The record of a running VM that is to be `wanted`, and has `published` these ports; the rest waits."""
    machine = dataclasses.replace(record.machine, forwards=list(published))
    known = {_forward(port): port for port in (*record.ports, *wanted.ports)}
    ports = [known[forward] for forward in published]
    later = wanted.machine if wanted.machine != machine else None
    return dataclasses.replace(
        wanted,
        machine=machine,
        ports=ports,
        next_machine=later,
        next_ports=wanted.ports if later is not None and wanted.ports != ports else None,
    )


def differences(before: VmRecord, after: VmRecord) -> list[str]:
    """The names of the settings in which two records of a VM differ."""
    before, after = settled(before), settled(after)
    names = {
        "name": before.name != after.name,
        "labels": before.labels != after.labels,
        "env": before.env != after.env,
        "auto-stop": before.auto_stop != after.auto_stop,
        "restart": before.restart != after.restart,
        "balloon": before.balloon != after.balloon,
        "vcpu": before.machine.vcpu != after.machine.vcpu,
        "memory": before.machine.memory_bytes != after.machine.memory_bytes,
        "ports": before.ports != after.ports,
    }
    return [name for name, differs in names.items() if differs]


def _env(record: VmRecord, request: m.VmSet) -> list[str]:
    values = vm_plan.environment(record.env)
    for name in request.unset_env:
        if name not in values:
            raise BangerError(Code.INVALID, f"{record.name!r} sets no variable {name!r}", hint=_known(values))
        del values[name]
    values |= vm_plan.environment(request.env)
    return [f"{name}={value}" for name, value in values.items()]


def _known(names: dict[str, str]) -> str:
    return f"it has {', '.join(names)}" if names else "it has none"


def _ports(record: VmRecord, request: m.VmSet, taken: Set[int]) -> list[m.PublishedPort]:
    ports = list(record.ports)
    for text in request.unpublish:
        meant = parse_publish(text)
        left = [port for port in ports if not any(_is_meant(port, each, text) for each in meant)]
        if len(left) == len(ports):
            shown = [f"{port.address}:{port.host_port}:{port.guest_port}" for port in ports]
            raise BangerError(
                Code.INVALID,
                f"{record.name!r} does not publish {text!r}",
                hint=f"it publishes {', '.join(shown)}" if shown else "it publishes no port",
            )
        ports = left
    added = [port for port in vm_plan.asked_for(request.publish) if port not in ports]
    for port in added:
        for other in ports:
            if (port.address, port.host_port) == (other.address, other.host_port) and port.host_port:
                raise BangerError(
                    Code.INVALID,
                    f"{record.name!r} publishes port {port.host_port} on {port.address} already",
                    hint=f"take that away in the same command: --unpublish {port.host_port}:{other.guest_port}",
                )
    if added and record.net == "none":
        raise BangerError(
            Code.INVALID,
            f"{record.name!r} has no network, so that its ports cannot be published",
            hint="the network of a VM cannot be changed: create another one, without --net none",
        )
    taken = taken | {port.host_port for port in (*ports, *added)}
    free = iter(free_ports(sum(not port.host_port for port in added), taken))
    return [*ports, *(m.PublishedPort(p.address, p.host_port or next(free), p.guest_port) for p in added)]


def _is_meant(port: m.PublishedPort, meant: m.PublishedPort, text: str) -> bool:
    """Whether a published port is meant by one that a text names, which may leave out where on the host it is."""
    return (
        port.guest_port == meant.guest_port
        and meant.host_port in (0, port.host_port)
        and (text.count(":") < 2 or port.address == meant.address)
    )


def _with_ports(machine: Machine, net: str, ports: list[m.PublishedPort], network: HostNetwork) -> Machine:
    slot = machine.nics[0].slot if machine.nics else 0
    there = {nic.id for nic in machine.nics}
    return dataclasses.replace(
        machine,
        nics=[*machine.nics, *(nic for nic in network.plan(net, ports, slot) if nic.id not in there)],
        forwards=[_forward(port) for port in ports],
    )


def _forward(port: m.PublishedPort) -> Forward:
    return Forward(port.address, port.host_port, port.guest_port)
