"""The streams into guests: run, exec, file trees, and logs."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Sequence
from typing import TypeVar

from banger.api import models as m
from banger.api.codec import encode
from banger.api.errors import BangerError, Code
from banger.api.vm_conditions import Condition, parse_condition
from banger.config import Config
from banger.daemon import vm_plan
from banger.daemon.console import Console
from banger.daemon.guest_link import GuestLink
from banger.daemon.jobs import Report
from banger.daemon.streams import Channel, ClientGone, Peer, carry, finish, report_to
from banger.daemon.vm import Stages, Vm
from banger.daemon.vm_lifecycle import Lifecycle
from banger.daemon.vm_readiness import Readiness, check_timeout
from banger.daemon.vm_service import Catalogs, VmService
from banger.guest.agent import Agent, ExecRequest, guest_errors
from banger.guest.session import Exit, SessionLost
from banger.job import Progress
from banger.reasons import in_words
from banger.store.records import CREATED, REMOVING, RUNNING

T = TypeVar("T")


class Sessions:
    """Serves the streams of clients that work in guests."""

    def __init__(
        self, config: Config, vms: VmService, lifecycle: Lifecycle, catalogs: Catalogs, readiness: Readiness
    ) -> None:
        self._config = config
        self._vms = vms
        self._lifecycle = lifecycle
        self._catalogs = catalogs
        self._readiness = readiness

    async def run(self, request: m.VmRun, peer: Peer) -> None:
        """Create and start a VM and run its command, attached unless `detach`.

        When the client leaves, whatever is under way is undone, and a VM that is to be removed is. A VM that does not
        start, or in which the command cannot be run, is kept for its user to look at, unless it is to be removed.
        """
        condition = parse_condition(request.wait_for) if request.wait_for else None
        timeout = self._config.wait_timeout if request.wait_timeout is None else request.wait_timeout
        check_timeout(timeout)
        if condition is not None and not request.detach:
            raise BangerError(Code.INVALID, "only a detached VM can be waited for", hint="wait for it with vm.wait")
        attached = request.create.auto_remove and not request.detach
        vm: Vm | None = None
        try:
            begun = await _unless_gone(peer, lambda report: self._begin(request, attached, report))
            vm, started, channel = begun
            await peer.send_event("started", result=encode(started))
            if channel is None:
                if condition is not None:
                    await self._wait_ready(vm, condition, timeout, peer)
                await peer.send_event("exit", signalled=False, value=0)
                return
            with vm.in_use():
                end = await _carry(vm, peer, channel, request.terminal is not None, vm.refuse_paused)
            if attached:
                await self._lifecycle.delete(vm, force=True)
                vm = None
            await finish(peer, end)
        except ClientGone:
            pass
        finally:
            if vm is not None and attached:
                with contextlib.suppress(BangerError):
                    await asyncio.shield(self._lifecycle.delete(vm, force=True))

    async def _wait_ready(self, vm: Vm, condition: Condition, timeout: float, peer: Peer) -> None:
        await _unless_gone(peer, lambda report: self._readiness.require(vm, condition, timeout))

    async def _begin(self, request: m.VmRun, attached: bool, report: Report) -> tuple[Vm, m.VmStarted, Channel | None]:
        stages = Stages(report)
        vm = await self._vms.make(request.create, report, attached, once=not request.detach)
        stages.done("create")
        try:
            self._vms.check_ports(vm)
            await self._lifecycle.start(vm, stages)
            channel = None
            if not request.detach:
                image = await self._catalogs.ensure_image(vm.record.image, report)
                argv = vm_plan.main_command(request.create, image, vm.record.pid1)
                channel = await self._open_exec(vm, argv, request, log=not attached and request.terminal is None)
                stages.done("command")
        except BaseException as error:
            await asyncio.shield(self._settle_failed(vm, error))
            raise
        return vm, m.VmStarted(self._vms.info(vm), stages.timings), channel

    async def _settle_failed(self, vm: Vm, error: BaseException) -> None:
        """Keep a VM that has come to nothing, stopped and with the reason, where there is anything to look at.

        There is not when its user has called it off, or when it was not even begun to be started.
        """
        untouched = vm.state == CREATED and not vm.ends
        if isinstance(error, BangerError) and "console" not in error.details:
            self._lifecycle.add_console(vm, error)
        if not isinstance(error, Exception) or vm.record.auto_remove or untouched:
            with contextlib.suppress(BangerError):  # somebody has removed it already
                await self._lifecycle.delete(vm, force=True)
            return
        await self._lifecycle.give_up(vm, in_words(error))
        if isinstance(error, BangerError) and vm.record.state != REMOVING:
            error.details["kept"] = vm.name

    async def _open_exec(self, vm: Vm, argv: list[str], request: m.VmRun, log: bool) -> Channel:
        return await self._exec(
            vm,
            await self._vms.agent(vm),
            ExecRequest(
                argv=tuple(argv),
                env=vm_plan.environment(request.env),
                cwd=vm_plan.directory(vm.record, argv),
                user=vm.record.user or None,
                terminal=(request.terminal.rows, request.terminal.columns) if request.terminal else None,
                log=log,
                main=request.terminal is None,
                init=vm.record.pid1 == "command",
            ),
        )

    async def _exec(self, vm: Vm, agent: Agent, request: ExecRequest) -> Channel:
        _check_size(vm, request)
        with guest_errors(_what_fails(request.argv, vm), argv=request.argv):
            return await agent.exec(request)

    async def exec(self, request: m.VmExec, peer: Peer) -> None:
        """Run a command in a running VM."""
        vm = self._vms.find(request.vm)
        command = ExecRequest(
            argv=tuple(request.argv),
            env=vm_plan.environment(request.env),
            cwd=request.workdir or vm_plan.directory(vm.record, request.argv),
            user=request.user or vm.record.user or None,
            terminal=(request.terminal.rows, request.terminal.columns) if request.terminal else None,
        )
        if request.detach:
            vm.touch()
            _check_size(vm, command)
            agent = await self._agent(vm, peer)
            with guest_errors(_what_fails(request.argv, vm), argv=request.argv):
                await agent.spawn(command)
            await peer.send_event("started", result={})
            await peer.send_event("exit", signalled=False, value=0)
            return
        with vm.in_use():
            channel = await self._exec(vm, await self._agent(vm, peer), command)
            await self._carry(vm, peer, channel, command.terminal is not None, vm.refuse_paused)

    async def write_tree(self, request: m.TreeWrite, peer: Peer) -> None:
        """Extract a tar stream in a running VM."""
        vm = self._vms.find(request.vm)
        agent = await self._agent(vm, peer)
        with vm.in_use():
            with guest_errors(f"cannot write {vm.name}:{request.path}"):
                channel = await agent.write_tree(request.path, request.user or None)
            await self._carry(vm, peer, channel)

    async def read_tree(self, request: m.TreeRead, peer: Peer) -> None:
        """Read a tree of a running VM as a tar stream."""
        vm = self._vms.find(request.vm)
        agent = await self._agent(vm, peer)
        with vm.in_use():
            with guest_errors(f"cannot read {vm.name}:{request.path}"):
                channel = await agent.read_tree(request.path, follow=request.follow, contents=request.contents)
            await self._carry(vm, peer, channel)

    async def console(self, request: m.VmRef, peer: Peer) -> None:
        """Look at the serial console of a running VM, and type on it."""
        vm = self._vms.find(request.vm)
        with vm.in_use():
            await self._carry(vm, peer, await Console.connect(vm, self._vms.directory(vm)))

    async def _agent(self, vm: Vm, peer: Peer) -> Agent:
        """The agent of a VM, which may have to be waited for. Raises ClientGone when the client leaves meanwhile."""
        return await _unless_gone(peer, lambda report: self._vms.agent(vm))

    async def _carry(
        self, vm: Vm, peer: Peer, channel: Channel, terminal: bool = False, check: Callable[[], None] = lambda: None
    ) -> None:
        await peer.send_event("started", result={})
        with contextlib.suppress(ClientGone):
            await finish(peer, await _carry(vm, peer, channel, terminal, check))


async def _carry(
    vm: Vm, peer: Peer, channel: Channel, terminal: bool = False, check: Callable[[], None] = lambda: None
) -> Exit:
    """As `carry`; the error for a VM that goes down meanwhile is what became of it."""
    link = vm.link
    try:
        return await carry(peer, channel, terminal, check)
    except BangerError as error:
        if isinstance(error.__cause__, SessionLost) and (end := await how_it_ended(vm, link)):
            raise BangerError(Code.GUEST, f"{vm.name} {end}") from error
        raise


async def how_it_ended(vm: Vm, link: GuestLink | None) -> str:
    """What became of a VM after `web`, once the connection to its guest is lost; '' when it goes on running."""
    if vm.ends:
        return f"was {vm.ends[-1]}"
    if vm.record.state == REMOVING:
        return "was removed"
    if vm.record.state == RUNNING and link is not None and not await link.went_down():
        return ""
    reason = vm.record.reason
    if vm.record.state == RUNNING and link is not None:  # nobody has noticed yet
        reason = link.vmm.stop_reason or "the VMM process was killed or crashed"
    return f"was {reason}" if reason in ("stopped", "killed") else f"went down: {reason}"


def _check_size(vm: Vm, request: ExecRequest) -> None:
    given = [f"{name}={value}" for name, value in request.env.items()]
    vm_plan.check_environment(request.argv, [*vm.record.image_env, *vm.record.env, *given])


def _what_fails(argv: Sequence[str], vm: Vm) -> str:
    return f"cannot run {repr(argv[0]) if argv else 'a login shell'} in {vm.name!r}"


async def _unless_gone(peer: Peer, start: Callable[[Report], Awaitable[T]]) -> T:
    """Do the work, its progress sent to the client; cancel it and raise ClientGone when the client leaves."""
    queue: asyncio.Queue[Progress | None] = asyncio.Queue()
    reporter = asyncio.create_task(report_to(peer, queue))
    work = asyncio.ensure_future(start(queue.put_nowait))
    watcher = asyncio.create_task(peer.gone())
    try:
        await asyncio.wait((work, watcher), return_when=asyncio.FIRST_COMPLETED)
        if not work.done():
            raise ClientGone
        queue.put_nowait(None)
        await reporter
        return work.result()
    finally:
        for task in (work, watcher, reporter):
            task.cancel()
        await asyncio.gather(work, watcher, reporter, return_exceptions=True)
