"""What the daemon does for its clients right now: each request counted, the long ones listed, watched and cancelled."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import Awaitable, Callable
from typing import TypeVar

from banger.api import models as m
from banger.api.codec import Json, decode
from banger.api.errors import BangerError, Code
from banger.daemon.jobs import Report
from banger.daemon.streams import Input, Peer
from banger.daemon.vm_plan import now
from banger.job import Progress
from banger.reasons import in_words

T = TypeVar("T")


class Operation:
    """One request that is being served. `shown`: it is long enough for others to see and cancel it."""

    def __init__(self, name: str, subject: str, shown: bool) -> None:
        self.id = secrets.token_hex(3)
        self.name = name
        self.subject = subject
        self.shown = shown
        self.ended = asyncio.Event()  # for others: it goes on where only the client's command is left
        self.over = asyncio.Event()
        self.watchers: list[Report] = []
        self.latest: Progress | None = None
        self._state = "running"
        self._failure = ""
        self._started_at = now()
        self._began = self._since = time.monotonic()
        self._seconds = 0.0
        self._timings: list[m.Timing] = []
        self._abort: Callable[[], bool] | None = None
        self._cancelled = False
        self._reason: BangerError | None = None

    async def carry_out(self, work: Awaitable[T]) -> T:
        """Do the work; when it is cancelled, for its client's leaving or by `cancel`, it is so once and awaited.

        What undoes the work can so await whatever it has to. Raises what `cancel` was called with.
        """
        task = asyncio.ensure_future(work)
        self._abort = task.cancel
        while not task.done():
            try:
                await asyncio.wait((task,))
            except asyncio.CancelledError:
                self.cancel(None)
        if task.cancelled():
            self.settle("cancelled")
            if self._reason is not None:
                raise self._reason
        elif (error := task.exception()) is not None:
            self.settle("failed", in_words(error))
        else:
            self.settle("done")
        return task.result()

    def cancel(self, reason: BangerError | None) -> None:
        """Cancel the work, once; `reason` is what its client is told if it is still there."""
        if self._abort is None or self._cancelled:
            return
        self._cancelled = True
        self._reason = reason
        if not self.ended.is_set():
            self._state = "cancelling"
        self._abort()

    def settle(self, state: str, failure: str = "") -> None:
        """Note how the work ended, as far as others are concerned."""
        if self.ended.is_set():
            return
        self._finish_stage()
        self._seconds = time.monotonic() - self._began
        self._state, self._failure = state, failure
        self.shown = False
        self.ended.set()

    def note(self, progress: Progress) -> None:
        """Take a step of the work, and pass it on to those who watch."""
        if self.latest is not None and self.latest.stage != progress.stage:
            self._finish_stage()
        self.latest = progress
        if progress.ended:
            self._finish_stage()
        for report in self.watchers:
            report(progress)

    def _finish_stage(self) -> None:
        if self.latest is not None:
            at = time.monotonic()
            self._timings.append(m.Timing(self.latest.stage, at - self._since))
            self._since, self.latest = at, None

    def info(self) -> m.OperationInfo:
        step = self.latest or Progress("")
        return m.OperationInfo(
            id=self.id,
            name=self.name,
            subject=self.subject,
            state=self._state,
            started_at=self._started_at,
            seconds=self._seconds if self.ended.is_set() else time.monotonic() - self._began,
            stage=step.stage,
            message=step.message,
            done=step.done,
            total=step.total,
            unit=step.unit,
            timings=[*self._timings],
            error=self._failure,
        )

    def __str__(self) -> str:
        return f"{self.name} {self.subject}".rstrip()


class Operations:
    """All requests that are being served."""

    def __init__(self) -> None:
        self._running: list[Operation] = []

    def __len__(self) -> int:
        return len(self._running)

    async def run(self, operation: Operation, work: Awaitable[T]) -> T:
        """Do the work of an operation, which is one of these for as long as that takes."""
        self._running.append(operation)
        try:
            return await operation.carry_out(work)
        finally:
            self._running.remove(operation)
            operation.over.set()

    async def stop(self) -> None:
        """Cancel all that is under way, since the daemon ends, and wait until it is undone; its clients are told."""
        for operation in self._running:
            operation.cancel(
                BangerError(
                    Code.DAEMON, "the daemon was stopped", hint="VMs go on; the next command starts the daemon again"
                )
            )
        for operation in [*self._running]:
            await operation.over.wait()

    def _find(self, reference: str) -> Operation:
        found = [each for each in self._running if each.shown and reference and each.id.startswith(reference)]
        if len(found) > 1:
            raise BangerError(Code.INVALID, f"{reference!r} is the beginning of several ids", hint="give more of it")
        if not found:
            raise BangerError(
                Code.NOT_FOUND,
                f"there is no operation {reference!r} under way; it may have ended",
                hint="see 'banger operation list'",
            )
        return found[0]

    async def list(self, request: m.Empty, report: Report) -> m.OperationList:
        return m.OperationList([operation.info() for operation in self._running if operation.shown])

    async def watch(self, request: m.OperationRef, report: Report) -> m.OperationInfo:
        """Report the steps of an operation as they come; returns how it ended."""
        operation = self._find(request.id)
        if operation.latest is not None:
            report(operation.latest)
        operation.watchers.append(report)
        try:
            await operation.ended.wait()
        finally:
            operation.watchers.remove(report)
        return operation.info()

    async def cancel(self, request: m.OperationRef, report: Report) -> m.OperationInfo:
        """Cancel an operation and wait until what it did is undone; it may also have been done before that."""
        operation = self._find(request.id)
        operation.cancel(
            BangerError(Code.CANCELLED, f"{operation} was cancelled by another client", hint="nothing of it is left")
        )
        await operation.ended.wait()
        return operation.info()


def subject(request: object) -> str:
    """What a request is about: the name of a VM, an image or a kernel, as far as its client gave one."""
    if isinstance(request, m.VmRun):
        request = request.create
    if isinstance(request, m.VmCreate):
        return request.name or request.image
    values = [getattr(request, name, "") for name in ("vm", "name", "target", "location")]
    return next((value for value in values if isinstance(value, str) and value), "")


class Noting(Peer):
    """A peer whose progress is noted for an operation, which has done its work for others once it has started."""

    def __init__(self, peer: Peer, operation: Operation) -> None:
        self._peer = peer
        self._operation = operation

    async def receive(self) -> Input | None:
        return await self._peer.receive()

    async def gone(self) -> None:
        await self._peer.gone()

    async def send_data(self, stream: int, data: bytes) -> None:
        await self._peer.send_data(stream, data)

    async def send_event(self, event: str, **fields: Json) -> None:
        if event == "progress":
            self._operation.note(decode(Progress, dict(fields)))
        elif event == "started":
            self._operation.settle("done")
        await self._peer.send_event(event, **fields)


def noting(operation: Operation, report: Report) -> Callable[[Progress], None]:
    """A report that also notes each step for an operation."""

    def both(progress: Progress) -> None:
        operation.note(progress)
        report(progress)

    return both
