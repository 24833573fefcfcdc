"""`banger vm stats`."""

from __future__ import annotations

import contextlib
import json
import time
from datetime import UTC, datetime

import click

from banger.api import models as m
from banger.api import operations as op
from banger.api.client import Client
from banger.api.codec import Json, encode
from banger.api.rates import guest_cpu_percent, host_cpu_percent
from banger.cli.connect import ensure_daemon
from banger.cli.lazy import Command
from banger.cli.live import rounds, screen, watch_options
from banger.cli.options import VM
from banger.cli.render import known_size, note, percent, print_lines, table_lines
from banger.system import human_size

_HEADERS = (
    *("NAME", "STATE", "CPU", "MEMORY", "BALLOON", "HOST CPU", "HOST MEMORY", "HOST DISK"),
    *("NET IN / OUT", "READ / WRITTEN", "PROCS"),
)
_OPTIONAL = ("STATE", "BALLOON")
_LEAST = ("PROCS", "HOST DISK", "READ / WRITTEN", "NET IN / OUT")
_Measured = dict[str, m.VmUsage]


@click.command(
    cls=Command,
    epilog="""
    banger vm stats
    banger vm stats web --watch
    banger vm stats --watch --interval 10s --json     for programs
    """,
)
@click.argument("refs", type=VM, nargs=-1, metavar="[REF...]")
@watch_options
def stats(refs: tuple[str, ...], watch: bool, interval: float, as_json: bool) -> None:
    """Show what running VMs, or those that are named, take of processors, memory, disk and network.

    CPU is a share of one processor. The columns that begin with HOST are measured on the host: VMM and helpers, and
    what the VM's own disks have allocated. The others are what guests say of themselves, '-' where one does not answer.
    A narrow terminal gets fewer of them.
    """
    client = ensure_daemon()
    if watch:
        _watch(client, refs, interval, as_json)
        return
    before = _measure(client, refs)
    time.sleep(interval)
    now = _measure(client, refs)
    if as_json:
        print(json.dumps(_document(before, now), indent=2))
        return
    print_lines(_lines(before, now))
    for vm in now.values():
        if vm.guest is None and vm.host is not None:
            note(f"{vm.name}: {vm.guest_error}")


def _watch(client: Client, refs: tuple[str, ...], interval: float, as_json: bool) -> None:
    before: _Measured | None = None
    with screen() if not as_json else contextlib.nullcontext() as draw:
        for _ in rounds(interval):
            now = _measure(client, refs)
            if draw is not None:
                draw(_lines(before or {}, now))
            elif before is not None:
                print(json.dumps(_document(before, now)), flush=True)
            before = now


def _measure(client: Client, refs: tuple[str, ...]) -> _Measured:
    return {vm.id: vm for vm in client.call(op.VM_STATS, m.VmStatsRequest(list(refs))).vms}


def _document(before: _Measured, now: _Measured) -> Json:
    """What the API tells, with the shares of processors and the time."""
    vms: list[Json] = []
    for key, vm in now.items():
        fields = encode(vm)
        assert isinstance(fields, dict)
        fields["host_cpu_percent"] = host_cpu_percent(before.get(key), vm)
        fields["guest_cpu_percent"] = guest_cpu_percent(before.get(key), vm)
        vms.append(fields)
    return {"time": datetime.now(UTC).isoformat(timespec="milliseconds"), "vms": vms}


def _lines(before: _Measured, now: _Measured) -> list[str]:
    all_run = all(vm.state == "running" for vm in now.values())
    rows = [
        [
            vm.name,
            "" if all_run else vm.state,
            percent(guest_cpu_percent(before.get(key), vm)),
            _memory(vm),
            *_host_cells(vm.host, host_cpu_percent(before.get(key), vm)),
            *_guest_cells(vm.guest),
        ]
        for key, vm in now.items()
    ]
    return table_lines(_HEADERS, rows, _OPTIONAL, cut=True, least=_LEAST)


def _memory(vm: m.VmUsage) -> str:
    if vm.guest is None:
        return ""
    # balloons that deflate when memory is short take nothing from what a guest calls its own: to it they use it
    balloon = (vm.host.balloon_bytes or 0) if vm.host is not None else 0
    used = max(0, vm.guest.memory_bytes - vm.guest.memory_available_bytes - balloon)
    return f"{human_size(used)} / {human_size(vm.guest.memory_bytes)}"


def _guest_cells(guest: m.GuestUsage | None) -> list[str]:
    if guest is None:
        return [""] * 3
    return [
        _both(sum(net.received_bytes for net in guest.networks), sum(net.sent_bytes for net in guest.networks)),
        _both(sum(disk.read_bytes for disk in guest.disks), sum(disk.written_bytes for disk in guest.disks)),
        str(guest.processes),
    ]


def _host_cells(host: m.HostUsage | None, cpu_percent: float | None) -> list[str]:
    if host is None:
        return [""] * 4
    return [
        known_size(host.balloon_bytes or 0),
        percent(cpu_percent),
        known_size(host.vmm_memory_bytes + host.helpers_memory_bytes),
        human_size(host.disk_bytes),
    ]


def _both(first: int, second: int) -> str:
    return f"{human_size(first)} / {human_size(second)}"
