"""The processes in guests."""

from __future__ import annotations

from banger.api import models as m
from banger.api.errors import BangerError, Code
from banger.daemon.jobs import Report
from banger.daemon.vm_service import VmService
from banger.guest.agent import guest_errors
from banger.guest.processes import Process, TooOld, list_processes

_MOST = 4096  # processes that are told of one guest
_SECONDS = 10.0


class VmTop:
    """Serves vm.top."""

    def __init__(self, vms: VmService) -> None:
        self._vms = vms

    async def top(self, request: m.VmRef, report: Report) -> m.VmProcesses:
        """List the processes in a running VM."""
        vm = self._vms.find(request.vm)
        agent = await self._vms.agent(vm)
        try:
            with guest_errors(f"cannot list the processes of {vm.name!r}"):
                found = await list_processes(agent.session, _MOST, _SECONDS)
        except TooOld as error:
            raise BangerError(
                Code.UNSUPPORTED,
                f"the agent of {vm.name!r} is too old for this: a VM keeps the one that it was created with",
                hint=f"banger vm exec {vm.name} -- ps aux",
            ) from error
        return m.VmProcesses(
            name=vm.name,
            vcpu=vm.record.machine.vcpu,
            uptime=found.uptime_ms / 1000,
            processes=[_told(process) for process in found.processes],
            truncated=found.truncated,
        )


def _told(process: Process) -> m.GuestProcess:
    return m.GuestProcess(
        pid=process.pid,
        parent=process.parent,
        user=process.user,
        state=process.condition,
        cpu_seconds=process.cpu_ms / 1000,
        memory_bytes=process.resident_bytes,
        threads=process.threads,
        started=process.started_ms / 1000,
        name=process.name,
        kernel=process.kernel,
        command=process.command,
    )
