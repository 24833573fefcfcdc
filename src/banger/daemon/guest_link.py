"""The connection between the daemon and one running guest: made at boot, renewed when the guest reboots."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
import os
import socket
import time
from collections.abc import Awaitable, Callable
from typing import TypeVar

from banger.api.errors import BangerError, Code
from banger.guest.agent import Agent, GuestConfig, guest_errors
from banger.guest.protocol import DiskRole, GuestState, InitMode
from banger.guest.session import AgentSession, GuestFailure, SessionLost
from banger.vmm.driver import Vmm

_log = logging.getLogger(__name__)
_CALL_SECONDS = 30.0
_STEADY_SECONDS = 10.0  # a session that lasted so long was none of a guest that makes us reconnect all the time
_MAX_PAUSE = 5.0
_HALT_POLL_SECONDS = 0.5
_ENTROPY_BYTES = 64
_END_SECONDS = 2.0
_GROW_SECONDS, _GROW_POLL_SECONDS = 20.0, 0.1

T = TypeVar("T")


class GuestLink:
    """Keeps one agent connected and configured for as long as its VMM lives."""

    def __init__(
        self,
        vmm: Vmm,
        connect: Callable[[float], Awaitable[socket.socket]],
        name: str,
        config: GuestConfig,
        boot_timeout: float,
        on_reboot: Callable[[], None] = lambda: None,
    ) -> None:
        self.vmm = vmm
        self._connect_agent = connect
        self._name = name
        self._config = config
        self._boot_timeout = boot_timeout
        self._on_reboot = on_reboot
        self.init: InitMode | None = None  # who is PID 1, once it is configured by us
        self._agent: Agent | None = None
        self._connected = asyncio.Event()
        self.rebooted = asyncio.Event()  # cleared by whoever starts what is to run in it
        self._keeper: asyncio.Task[None] | None = None

    async def connect(self, stage: Callable[[str], None] = lambda stage: None) -> bool:
        """Wait for the agent, configure it when the guest has just booted, and keep the connection from then on.

        Returns whether it had. Raises BangerError(GUEST) when the VMM ends first or the agent does not answer in time.
        """
        booted = await self._while_alive(self._connect(stage))
        self._keeper = asyncio.create_task(self._keep())
        return booted

    async def _connect(self, stage: Callable[[str], None]) -> bool:
        """Whether the guest had just booted."""
        await self.vmm.set_reboot(False)
        begin = time.monotonic()
        connection = await self._connect_agent(self._boot_timeout)
        session = await AgentSession.connect(connection, max(1.0, self._boot_timeout + begin - time.monotonic()))
        try:
            agent = Agent(session, _CALL_SECONDS)
            stage("boot")
            booted = (await agent.health()).state is GuestState.WAITING
            if booted:
                with guest_errors("the guest cannot be configured"):
                    self.init = await Agent(session, self._boot_timeout).configure(self._config)
                await agent.clock(time.time_ns())
                await agent.reseed(os.urandom(_ENTROPY_BYTES))
                stage("configure")
            await self.vmm.set_reboot(True)
        except BaseException:
            await session.close()
            raise
        self._agent = agent
        self._connected.set()
        return booted

    async def _while_alive(self, work: Awaitable[T]) -> T:
        """Await `work`, unless the VMM ends before it is done."""
        task = asyncio.ensure_future(work)
        ended = asyncio.create_task(self.vmm.process.ended.wait())
        try:
            await asyncio.wait((task, ended), return_when=asyncio.FIRST_COMPLETED)
            if task.done() and isinstance(task.exception(), SessionLost | BangerError):
                # a VMM that ends breaks its connections first: wait a moment for what it has to say
                await asyncio.wait((ended,), timeout=_END_SECONDS)
            if ended.done():
                reason = self.vmm.stop_reason or "the VMM process ended"
                raise BangerError(Code.GUEST, f"the guest went down: {reason}")
            with guest_errors("the guest does not answer"):
                return task.result()
        finally:
            for waiting in (task, ended):
                waiting.cancel()
            await asyncio.gather(task, ended, return_exceptions=True)

    async def reconfigure(self, config: GuestConfig) -> None:
        """Tell the guest its new name and environment; all of `config` when it boots again.

        Raises BangerError(GUEST) when it does not take them.
        """
        self._config = dataclasses.replace(config, keys=self._config.keys)
        agent = await self.agent()
        with guest_errors("the guest refuses its new settings"):
            await agent.configure(GuestConfig(hostname=config.hostname, environment=config.environment))

    async def grow(self, role: DiskRole, size: int) -> None:
        """Grow the filesystem of a disk that the VMM has made this large; BangerError(GUEST) when it fails."""
        agent = await self.agent()
        with guest_errors("the guest cannot grow its disk"):
            async with asyncio.timeout(_GROW_SECONDS):
                while await agent.grow(role) < size:
                    await asyncio.sleep(
                        _GROW_POLL_SECONDS
                    )  # its kernel has not seen the new size yet, and tells nobody

    async def went_down(self) -> bool:
        """Whether a connection broke off because the VMM ended, of which word may come a moment later."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_END_SECONDS):
                await self.vmm.process.ended.wait()
        return not self.vmm.process.alive

    def _down(self) -> BangerError:
        reason = self.vmm.stop_reason or "the VMM process was killed or crashed"
        return BangerError(Code.GUEST, f"the guest went down: {reason}")

    async def _keep(self) -> None:
        """Reconnect whenever the session ends or the guest resets; one that goes on doing so has to wait."""
        pause = 0.0
        while True:
            since = time.monotonic()
            agent = self._agent
            assert agent is not None
            lost = asyncio.create_task(agent.session.closed.wait())
            reset = asyncio.create_task(self.vmm.wait_reset())
            try:
                await asyncio.wait((lost, reset), return_when=asyncio.FIRST_COMPLETED)
            finally:
                lost.cancel()
                reset.cancel()
            self._connected.clear()
            self._agent = None
            await agent.session.close()
            pause = 0.0 if time.monotonic() - since > _STEADY_SECONDS else min(2 * pause + 0.1, _MAX_PAUSE)
            await asyncio.sleep(pause)
            halt = asyncio.create_task(self._end_halted())
            try:
                await self._reconnect()
            finally:
                halt.cancel()
            if not self.vmm.process.alive:
                return

    async def _reconnect(self) -> None:
        """Connect again, however long that takes, unless the VMM ends."""
        told = False
        while not self._connected.is_set():
            try:
                if await self._while_alive(self._connect(lambda stage: None)):
                    self._on_reboot()
                    self.rebooted.set()
            except BangerError as error:
                if not self.vmm.process.alive:
                    return
                if not told:  # once: a hostile guest could fill the log
                    _log.warning("%s: %s", self._name, error)
                told = True
                await asyncio.sleep(1)  # the guest is up but its agent is not: nothing tells when it will be

    async def _end_halted(self) -> None:
        """End the VMM of a guest that has halted, and would go on so for ever."""
        while not self.vmm.halted:
            await asyncio.sleep(_HALT_POLL_SECONDS)
        await self.vmm.kill()

    async def agent(self) -> Agent:
        """The connected agent; waits while the guest reboots. Raises BangerError(GUEST) when it does not come back."""

        async def wait() -> Agent:
            await self._connected.wait()
            assert self._agent is not None
            return self._agent

        try:
            async with asyncio.timeout(self._boot_timeout):
                return await self._while_alive(wait())
        except TimeoutError as error:
            raise BangerError(Code.GUEST, "the guest's agent does not answer", hint="see its console log") from error

    @property
    def connected(self) -> bool:
        return self._connected.is_set()

    async def close(self) -> None:
        """Stop keeping the connection; the guest goes on."""
        if self._keeper is not None:
            self._keeper.cancel()
            await asyncio.gather(self._keeper, return_exceptions=True)
        if self._agent is not None:
            with contextlib.suppress(GuestFailure):
                await self._agent.session.close()
        self._connected.clear()
