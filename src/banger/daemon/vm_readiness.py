"""Waiting until a guest does what it was started for: listens, answers, prints a text, or says that it is healthy."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from pathlib import Path

from banger.api.errors import BangerError, Code
from banger.api.vm_conditions import HEALTH, LOG, PORT, URL, Condition
from banger.daemon import logs, vm_plan, vm_policy
from banger.daemon.events import Events, Subscription
from banger.daemon.vm import Vm
from banger.daemon.vm_forwards import REACHABLE, Forwards
from banger.daemon.vm_ports import dialled
from banger.daemon.vm_service import VmService
from banger.daemon.vm_table import VmTable
from banger.durations import MAX_SECONDS, format_duration
from banger.guest.agent import ExecRequest, guest_errors, printable
from banger.guest.session import Exit
from banger.guest.speaks import answers

# between two looks at a guest, in seconds: at first a server may be there at any moment
_FIRST_PAUSE, _LONGEST_PAUSE, _SLOWER = 0.05, 1.0, 1.25
_LOOK_SECONDS = 30.0  # for one answer
_MOST_OF_A_LINE = 1 << 16  # bytes in which a text is looked for
_FIRST_LOOK_SECONDS = 1.0  # at least, for who only wants to look
_LAST_LINES = 10
# What a command says last takes another way than word of its end, and it may leave a server in the background.
_LAST_SECONDS = 2.0
# what may pass while a guest boots; other failures stay
_PASSING = (Code.GUEST, Code.WRONG_STATE, Code.NOT_FOUND, Code.EXHAUSTED)


class Readiness:
    """Serves whoever waits for guests to be ready."""

    def __init__(self, table: VmTable, vms: VmService, forwards: Forwards, events: Events) -> None:
        self._table = table
        self._vms = vms
        self._forwards = forwards
        self._events = events

    async def wait(self, vm: Vm, condition: Condition, timeout: float | None, ended: bool) -> bool:
        """Wait until a guest meets a condition; whether it has, within `timeout` seconds (None: no limit).

        Raises BangerError(GUEST), with the last lines of its log, when the VM ends first, or its main command does;
        one that had `ended` before does not count.
        """
        self._check(vm, condition)
        with self._events.subscribed() as events, vm.in_use():
            began = time.monotonic()
            try:
                async with asyncio.timeout(None if timeout is None else max(timeout, _FIRST_LOOK_SECONDS)):
                    if await self._meets(vm, condition):
                        return True
            except TimeoutError:
                return False
            left = None if timeout is None else max(0.0, began + timeout - time.monotonic())
            meeting = asyncio.create_task(self._meet(vm, condition))
            ending = asyncio.create_task(self._end(vm, events, ended))
            try:
                done, _ = await asyncio.wait((meeting, ending), timeout=left, return_when=asyncio.FIRST_COMPLETED)
                if not done:
                    return False
                if meeting in done:
                    meeting.result()
                    return True
                said, until = "", time.monotonic() + _LAST_SECONDS
                while not meeting.done() and time.monotonic() < until:
                    said = await self._last_lines(vm) or said  # soon it may be removed
                    await asyncio.wait((meeting,), timeout=_FIRST_PAUSE)
                if meeting.done():
                    meeting.result()
                    return True
                raise BangerError(
                    Code.GUEST,
                    f"{ending.result()} before it was ready: {condition.unmet}",
                    "" if vm.record.auto_remove else f"all that it said: banger vm logs {vm.name}",
                    {"log": said},
                )
            finally:
                for task in (meeting, ending):
                    task.cancel()
                await asyncio.gather(meeting, ending, return_exceptions=True)

    async def require(self, vm: Vm, condition: Condition, timeout: float) -> None:
        """As `wait`, for a VM that has just been started; raises TIMED_OUT when it is not ready in time."""
        if not await self.wait(vm, condition, timeout, ended=False):
            raise BangerError(
                Code.TIMED_OUT,
                f"the VM {vm.name!r} is not ready after {format_duration(timeout)}: {condition.unmet}",
                f"it goes on: see 'banger vm logs {vm.name}' and 'banger vm ports {vm.name}', or wait longer",
                {"log": await self._last_lines(vm)},
            )

    async def _last_lines(self, vm: Vm) -> str:
        """The end of what the main command of a VM has printed, for people."""
        said = b"".join([data async for _, data in logs.read(self._log(vm), True, _LAST_LINES, None)])
        lines = said.decode(errors="replace").splitlines()[-_LAST_LINES:]
        return "\n".join(printable(line.expandtabs()) for line in lines)

    def _log(self, vm: Vm) -> Path:
        return self._vms.directory(vm) / "main.log"

    def _check(self, vm: Vm, condition: Condition) -> None:
        """Raise INVALID for what can never come true."""
        if condition.kind == LOG and not vm.record.command:
            raise BangerError(
                Code.INVALID, f"the VM {vm.name!r} has no main command that prints anything", "wait for a port instead"
            )
        if condition.kind == HEALTH and not vm.record.healthcheck:
            raise BangerError(
                Code.INVALID,
                f"the image {vm.record.image!r} has no HEALTHCHECK",
                hint="wait for a port, a URL, log:TEXT or exec:COMMAND instead",
            )

    async def _end(self, vm: Vm, events: Subscription, ended: bool) -> str:
        """How a VM ends, or its main command unless it had `ended` before; a sentence, once it has."""
        while True:
            status = vm.record.status
            if vm not in self._table:
                return f"the VM {vm.name!r} was removed"
            if vm.state in ("created", "stopped"):
                return f"the VM {vm.name!r} has stopped ({vm.record.reason or vm.state})"
            if status is None:
                ended = False
            elif vm.state == "running" and not ended and not vm_policy.wants_after_main(vm.record, status):
                return f"the main command of {vm.name!r} ended with status {status}"
            await events.next()

    async def _meet(self, vm: Vm, condition: Condition) -> None:
        """Return once a guest meets a condition."""
        if condition.kind == LOG:
            await _printed(self._log(vm), condition.value.encode(), follow=lambda: True)
            return
        pause = _FIRST_PAUSE
        while not await self._meets(vm, condition):
            await asyncio.sleep(pause)
            pause = min(pause * _SLOWER, _LONGEST_PAUSE)

    async def _meets(self, vm: Vm, condition: Condition) -> bool:
        try:
            with guest_errors(f"cannot see whether {vm.name!r} is ready"):
                async with asyncio.timeout(_LOOK_SECONDS):
                    return await self._look(vm, condition)
        except BangerError as error:
            if error.code not in _PASSING:
                raise
            return False

    async def _look(self, vm: Vm, condition: Condition) -> bool:
        if condition.kind == LOG:
            return await _printed(self._log(vm), condition.value.encode(), follow=None)
        if condition.kind in (PORT, URL):
            addresses = await self._addresses(vm, condition.port)
            if not addresses or condition.kind == PORT:
                return bool(addresses)
            agent = await self._vms.agent(vm)
            secured = condition.text.startswith("https:")
            return await answers(lambda: agent.dial(condition.port, dialled(addresses)), condition.value, secured)
        argv = tuple(vm.record.healthcheck) if condition.kind == HEALTH else ("/bin/sh", "-c", condition.value)
        agent = await self._vms.agent(vm)
        with guest_errors(f"cannot run {argv[0]!r} in {vm.name!r}", argv=argv):
            where = vm_plan.directory(vm.record, argv)
            channel = await agent.exec(ExecRequest(argv, cwd=where, user=vm.record.user or None))
        try:
            while not isinstance(said := await channel.receive(), Exit):
                pass
        finally:
            await channel.close()
        return said == Exit(signalled=False, value=0)

    async def _addresses(self, vm: Vm, port: int) -> list[str]:
        """Where in a guest something listens on a TCP port; of a published one those that it leads to."""
        await self._vms.agent(vm)
        if (link := vm.link) is None:  # it was stopped this moment
            return []
        listeners = await self._forwards.look(vm, link)
        published = any(forward.guest_port == port for forward in vm.record.machine.forwards)
        return [
            each.address
            for each in listeners
            if each.protocol == "tcp" and each.port == port and (each.address in REACHABLE or not published)
        ]


def check_timeout(timeout: float | None) -> None:
    """Raise INVALID for what is no time to wait."""
    if timeout is not None and not 0 <= timeout <= MAX_SECONDS:
        raise BangerError(Code.INVALID, f"a wait of {timeout:g} s is not possible", hint="use 0 to ten years")


async def _printed(log: Path, text: bytes, follow: Callable[[], bool] | None) -> bool:
    """Whether a line of either stream in a log holds a text, or of what is appended while `follow()` is true."""
    unfinished: dict[int, bytes] = {}
    async for stream, data in logs.read(log, True, None, follow):
        said = unfinished.get(stream, b"") + data
        if text in said:
            return True
        unfinished[stream] = said.rpartition(b"\n")[2][-_MOST_OF_A_LINE:]
    return False
