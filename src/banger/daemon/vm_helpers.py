"""The processes beside a VMM, its network and its recorder: started, watched, and started again when they end early."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from banger.api.errors import BangerError
from banger.daemon import vm_disk, vm_plan
from banger.daemon.events import Events
from banger.daemon.host_network import HostNetwork
from banger.daemon.vm import Vm
from banger.process import ProcessId, Watched, spawn
from banger.reasons import in_words
from banger.system import bind_unix
from banger.vmm import recorder
from banger.vmm.driver import CONSOLE, LOG, NETWORK, Driver, Processes

_log = logging.getLogger(__name__)
_RESTARTS = 5  # of one kind in the life of a VMM: what ends more often has a reason that stays
_VMM_SECONDS = 2.0  # a VMM that ends takes its helpers with it; word of that comes a moment later
# main.log is kept over restarts: it tells why the command of a VM with a restart policy ended
_LOGS_OF_A_VMM = tuple(f"{name}.log{old}" for name in recorder.CAPS if name != "main" for old in ("", ".1"))

NETWORK_HELPER, RECORDER = "network", "recorder"
_LOST = {NETWORK_HELPER: "its connections", RECORDER: "some of its console and logs"}


class Helpers:
    """Watches the helpers of one VM for as long as its VMM runs; what was lost is among the warnings of the VM."""

    def __init__(
        self,
        vm: Vm,
        vmm: Watched,
        driver: Driver,
        network: HostNetwork,
        directory: Path,
        processes: Processes,
        events: Events,
    ) -> None:
        self._vm = vm
        self._vmm = vmm
        self._driver = driver
        self._network = network
        self._directory = directory
        self._processes = processes
        self._events = events
        found: Mapping[str, ProcessId | None] = {NETWORK_HELPER: processes.network, RECORDER: processes.recorder}
        self._tasks = {
            kind: asyncio.create_task(self._keep(kind, identity))
            for kind, identity in found.items()
            if identity is not None
        }

    @property
    def identities(self) -> list[ProcessId]:
        """The helpers that were started; some may have ended."""
        return self._processes.helpers

    async def close(self) -> None:
        """Stop watching; they go on."""
        for task in self._tasks.values():
            task.cancel()
        await asyncio.gather(*self._tasks.values(), return_exceptions=True)

    async def recorded(self) -> None:
        """Wait until what a VMM that has ended said last is written down."""
        if RECORDER in self._tasks:
            await asyncio.wait([self._tasks[RECORDER]], timeout=2 * _VMM_SECONDS)

    async def _keep(self, kind: str, identity: ProcessId) -> None:
        process = Watched.find(identity)
        for _ in range(_RESTARTS):
            if not await self._ended_alone(process):
                return
            try:
                process, *others = await self._start(kind)
                self._write_down(kind, process.identity, [other.identity for other in others])
            except (OSError, BangerError) as error:
                self._warn(kind, f"ended and cannot be started again ({in_words(error)}): {self._fix}")
                return
            self._warn(kind, f"ended at {vm_plan.now()} and was started again")
        if await self._ended_alone(process):
            self._warn(kind, f"ended {_RESTARTS + 1} times and is not started again: {self._fix}")

    async def _ended_alone(self, process: Watched | None) -> bool:
        """Wait for the end of a helper; whether its VMM goes on."""
        if process is not None:
            try:
                await process.ended.wait()
            finally:
                process.release()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_VMM_SECONDS):
                await self._vmm.ended.wait()
        return self._vmm.alive

    async def _start(self, kind: str) -> list[Watched]:
        with contextlib.ExitStack() as stack:
            if kind == NETWORK_HELPER:
                end = self._driver.plug_again(self._directory, NETWORK)
                stack.callback(os.close, end)
                return await self._network.carry(self._vm.record.machine, self._directory, end)
            ends: dict[str, int] = {}
            for stream in (CONSOLE, *self._driver.streams):
                ends[stream] = self._driver.plug_again(self._directory, stream)
                stack.callback(os.close, ends[stream])
            return [start_recorder(self._directory, ends)]

    def _write_down(self, kind: str, identity: ProcessId, others: Sequence[ProcessId]) -> None:
        helpers = [*self._processes.helpers, identity, *others]
        if kind == RECORDER:
            self._processes = dataclasses.replace(self._processes, helpers=helpers, recorder=identity)
        else:
            self._processes = dataclasses.replace(self._processes, helpers=helpers, network=identity)
        vm_disk.write_processes(self._directory, self._processes)

    @property
    def _fix(self) -> str:
        return f"restart the VM with 'banger vm restart {self._vm.name}'"

    def _warn(self, kind: str, what: str) -> None:
        warning = f"lost: {_LOST[kind]}; the {kind} {what}"
        _log.warning("%s: %s", self._vm.name, warning)
        self._vm.warnings[kind] = warning
        self._events.publish("lost", self._vm.record, helper=kind, message=warning)


def start_recorder(directory: Path, streams: Mapping[str, int]) -> Watched:
    """Start what writes the streams of a VM to files; it goes on with those that are there."""
    with open(directory / "recorder.log", "wb") as messages, bind_unix(directory / recorder.CONSOLE_SOCKET) as listener:
        numbers = [streams[CONSOLE], streams.get(LOG, -1), listener.fileno()]
        argv = [sys.executable, "-I", "-S", recorder.__file__, str(directory), *map(str, numbers)]
        argv += [f"{name}={end}" for name, end in streams.items() if name not in (CONSOLE, LOG)]
        return spawn(argv, [listener.fileno(), *streams.values()], messages.fileno())


def remove_logs(directory: Path) -> None:
    """Begin with empty logs of the VMM and its console; the output of the main command is kept."""
    for name in _LOGS_OF_A_VMM:
        (directory / name).unlink(missing_ok=True)
