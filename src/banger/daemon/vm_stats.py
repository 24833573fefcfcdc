"""What VMs take, measured on the host and asked of their guests."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from banger.api import models as m
from banger.api.errors import BangerError
from banger.daemon import vm_disk
from banger.daemon.jobs import Report, Workers
from banger.daemon.vm import Vm
from banger.daemon.vm_service import VmService
from banger.daemon.vm_table import VmTable
from banger.guest.agent import Agent, Stats, guest_errors
from banger.process import ProcessId, taken
from banger.vmm import cgroups

_GUEST_SECONDS = 2.0  # that all guests together have to answer in
_MOST = 64  # filesystems, interfaces and disks that are told of one guest


@dataclass(frozen=True)
class _Processes:
    """Where to look for what one VM takes of the host."""

    vm_id: str
    directory: Path
    vmm: ProcessId
    helpers: Sequence[ProcessId]


@dataclass(frozen=True)
class _Asked:
    """A question to a guest: its answer, or why there is none; who waits for it waits until `deadline`."""

    answer: asyncio.Task[Stats | str]
    deadline: float


class VmStats:
    """Serves vm.stats.

    A guest that does not answer costs everybody `_GUEST_SECONDS` once: a question cannot be taken back, so it is not
    asked another one before that is answered or its session has ended, and nobody waits for it any more.
    """

    def __init__(self, workers: Workers, table: VmTable, vms: VmService) -> None:
        self._workers = workers
        self._table = table
        self._vms = vms
        self._asked: dict[str, _Asked] = {}

    async def stats(self, request: m.VmStatsRequest, report: Report) -> m.VmStats:
        """Measure some VMs, or all that run."""
        named = dict.fromkeys(self._table.find(reference) for reference in request.vms)
        vms = [*named] if request.vms else [vm for vm in self._table if vm.state == "running"]
        asked = {vm: self._ask(vm) for vm in vms if vm.link is not None}
        places = [self._processes(vm) for vm in vms]
        hosts = await self._workers.run(lambda job: [_measure(place) for place in places])
        await _wait([*asked.values()])
        return m.VmStats(
            [_usage(vm, host, _answer(asked.get(vm))) for vm, host in zip(vms, hosts, strict=True)],
        )

    def _processes(self, vm: Vm) -> _Processes | None:
        if vm.link is None:
            return None
        helpers = vm.helpers.identities if vm.helpers is not None else []
        return _Processes(vm.record.id, self._vms.directory(vm), vm.link.vmm.process.identity, helpers)

    def _ask(self, vm: Vm) -> _Asked:
        """Ask a guest, or wait on for what it has been asked."""
        key = vm.record.id
        if (asked := self._asked.get(key)) is None:
            answer = asyncio.create_task(self._guest_stats(vm))
            asked = self._asked[key] = _Asked(answer, time.monotonic() + _GUEST_SECONDS)
            answer.add_done_callback(lambda done: self._asked.pop(key))
        return asked

    async def _guest_stats(self, vm: Vm) -> Stats | str:
        try:
            agent = await self._vms.agent(vm)
            with guest_errors("no answer"):
                return await Agent(agent.session).stats()
        except BangerError as error:
            return error.message


async def _wait(asked: Sequence[_Asked]) -> None:
    """Wait until all have answered that still may."""
    now = time.monotonic()
    waited = [question for question in asked if question.deadline > now]
    if waited:
        seconds = max(question.deadline for question in waited) - now
        await asyncio.wait([question.answer for question in waited], timeout=seconds)


def _answer(asked: _Asked | None) -> Stats | str:
    if asked is None:
        return "the VM does not run"
    return asked.answer.result() if asked.answer.done() else "the guest does not answer"


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


def _usage(vm: Vm, measured: tuple[float, m.HostUsage | None], answer: Stats | str) -> m.VmUsage:
    moment, host = measured
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
