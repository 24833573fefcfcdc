"""What VMs take, measured on the host and asked of their guests."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import time
from collections.abc import Callable, Coroutine, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

from banger.api import models as m
from banger.api.errors import BangerError
from banger.daemon import vm_disk
from banger.daemon.jobs import Report, Workers
from banger.daemon.vm import Vm
from banger.daemon.vm_service import VmService
from banger.daemon.vm_table import VmTable
from banger.guest.agent import Agent, Stats, guest_errors
from banger.process import ProcessId, taken
from banger.store.records import STARTING
from banger.vmm import cgroups

_SECONDS = 2.0  # that all guests and VMMs together have to answer in
_MOST = 64  # filesystems, interfaces and disks that are told of one guest

T = TypeVar("T")


@dataclass(frozen=True)
class _Processes:
    """Where to look for what one VM takes of the host."""

    vm_id: str
    directory: Path
    vmm: ProcessId
    helpers: Sequence[ProcessId]


class _Question(Generic[T]):
    """What guests or VMMs are asked, each one at a time.

    One that does not answer costs everybody `_SECONDS` once: a question cannot be taken back, so it is not asked
    another time before it has answered or its session has ended, and nobody waits for it any more.
    """

    def __init__(self, ask: Callable[[Vm], Coroutine[None, None, T]]) -> None:
        self._ask = ask
        self._asked: dict[str, tuple[asyncio.Task[T], float]] = {}

    async def ask(self, vms: Iterable[Vm]) -> dict[Vm, T]:
        """The answers of those that give one in time."""
        asked = {vm: self._open(vm) for vm in vms}
        now = time.monotonic()
        waited = {task: deadline for task, deadline in asked.values() if deadline > now}
        if waited:
            await asyncio.wait(waited, timeout=max(waited.values()) - now)
        return {vm: task.result() for vm, (task, _) in asked.items() if task.done()}

    def _open(self, vm: Vm) -> tuple[asyncio.Task[T], float]:
        key = vm.record.id
        if key not in self._asked:
            task = asyncio.create_task(self._ask(vm))
            self._asked[key] = task, time.monotonic() + _SECONDS
            task.add_done_callback(lambda done: self._asked.pop(key))
        return self._asked[key]


class VmStats:
    """Serves vm.stats."""

    def __init__(self, workers: Workers, table: VmTable, vms: VmService) -> None:
        self._workers = workers
        self._table = table
        self._vms = vms
        self._guests = _Question(self._guest_stats)
        self._balloons = _Question(_balloon_bytes)

    async def stats(self, request: m.VmStatsRequest, report: Report) -> m.VmStats:
        """Measure some VMs, or all that run."""
        named = dict.fromkeys(self._table.find(reference) for reference in request.vms)
        vms = [*named] if request.vms else [vm for vm in self._table if vm.state == "running"]
        running = [vm for vm in vms if vm.link is not None]
        places = [self._processes(vm) for vm in vms]
        said, balloons, hosts = await asyncio.gather(
            self._guests.ask(running),
            self._balloons.ask(running),
            self._workers.run(lambda job: [_measure(place) for place in places]),
        )
        return m.VmStats(
            [
                _usage(vm, moment, host and dataclasses.replace(host, balloon_bytes=balloons.get(vm)), said.get(vm))
                for vm, (moment, host) in zip(vms, hosts, strict=True)
            ]
        )

    def _processes(self, vm: Vm) -> _Processes | None:
        if vm.link is None:
            return None
        helpers = vm.helpers.identities if vm.helpers is not None else []
        return _Processes(vm.record.id, self._vms.directory(vm), vm.link.vmm.process.identity, helpers)

    async def _guest_stats(self, vm: Vm) -> Stats | str:
        if vm.state == STARTING:
            return "it is being started"
        try:
            agent = await self._vms.agent(vm)
            with guest_errors("no answer"):
                return await Agent(agent.session).stats()
        except BangerError as error:
            return error.message


async def _balloon_bytes(vm: Vm) -> int | None:
    with contextlib.suppress(BangerError):
        if vm.link is not None:
            return await vm.link.vmm.balloon_bytes()
    return None


def _measure(place: _Processes | None) -> tuple[float, m.HostUsage | None]:
    """The moment, and what is taken at it; None when there is no VMM."""
    return time.monotonic(), _host_usage(place) if place is not None else None


def _host_usage(place: _Processes) -> m.HostUsage | None:
    vmm = taken(place.vmm)
    if vmm is None:
        return None
    helpers = [found for helper in place.helpers if (found := taken(helper)) is not None]
    group = cgroups.find(place.vm_id)
    usage = group.usage() if group is not None else None
    return m.HostUsage(
        pid=place.vmm.pid,
        vmm_cpu_seconds=vmm.cpu_seconds,
        vmm_memory_bytes=vmm.resident_bytes,
        helpers_cpu_seconds=sum(helper.cpu_seconds for helper in helpers),
        helpers_memory_bytes=sum(helper.resident_bytes for helper in helpers),
        group_cpu_seconds=usage.cpu_seconds if usage is not None else None,
        group_memory_bytes=usage.memory_bytes if usage is not None else None,
        group_processes=usage.pids if usage is not None else None,
        disk_bytes=vm_disk.used_bytes(place.directory),
    )


def _usage(vm: Vm, moment: float, host: m.HostUsage | None, answer: Stats | str | None) -> m.VmUsage:
    if answer is None:
        answer = "the guest does not answer" if vm.link is not None else "the VM does not run"
    return m.VmUsage(
        id=vm.record.id,
        name=vm.name,
        state=vm.state,
        time=moment,
        vcpu=vm.record.machine.vcpu,
        memory_bytes=vm.record.machine.memory_bytes,
        host=host,
        guest=None if isinstance(answer, str) else _guest_usage(answer),
        guest_error=answer if isinstance(answer, str) else "",
    )


def _guest_usage(stats: Stats) -> m.GuestUsage:
    return m.GuestUsage(
        cpu_total_seconds=stats.cpu_total_ms / 1000,
        cpu_busy_seconds=stats.cpu_busy_ms / 1000,
        cpus=stats.cpus,
        memory_bytes=stats.memory_total,
        memory_available_bytes=stats.memory_available,
        load=list(stats.load[:3]),
        processes=stats.processes,
        filesystems=[m.FilesystemUsage(each.target, each.size, each.used) for each in stats.filesystems[:_MOST]],
        networks=[m.NetworkUsage(each.name, each.received, each.sent) for each in stats.networks[:_MOST]],
        disks=[m.DiskUsage(each.name, each.read, each.written) for each in stats.blocks[:_MOST]],
    )
