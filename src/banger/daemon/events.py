"""What happens to VMs, as it happens: kept for a while, also for the next daemon, told to whoever subscribes.

Publishing never waits. What a subscriber does not take in time it loses, the oldest first, and is told how much.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import deque
from collections.abc import Callable, Iterator
from datetime import UTC, datetime

from banger.api import models as m
from banger.daemon.event_log import EventLog
from banger.store.records import VmRecord

KEPT = 1024
_QUEUED = 1024


class Subscription:
    """Events for one reader; `missed` counts those that it was too slow for since it last asked."""

    def __init__(self) -> None:
        self._queue: deque[m.VmEvent] = deque()
        self._filled = asyncio.Event()
        self.missed = 0

    def put(self, event: m.VmEvent) -> None:
        if len(self._queue) == _QUEUED:
            self._queue.popleft()
            self.missed += 1
        self._queue.append(event)
        self._filled.set()

    async def next(self) -> tuple[int, m.VmEvent]:
        """How many events were lost before the next one, and that one, once there is one."""
        await self._filled.wait()
        event = self._queue.popleft()
        if not self._queue:
            self._filled.clear()
        missed, self.missed = self.missed, 0
        return missed, event


class Events:
    """The events of all VMs. Used by the daemon's event loop only."""

    def __init__(self, log: EventLog | None = None) -> None:
        self._log = log
        self._kept = deque(log.read(KEPT) if log is not None else (), maxlen=KEPT)
        self._subscriptions: set[Subscription] = set()
        self._listeners: list[Callable[[m.VmEvent], None]] = []
        self._sequence = max((event.sequence for _, event in self._kept), default=0)

    def publish(self, kind: str, vm: VmRecord, **details: str | int) -> None:
        """Tell that something has happened to a VM; `kind` is one word or two with a hyphen."""
        self._sequence += 1
        event = m.VmEvent(
            sequence=self._sequence,
            time=datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z"),
            kind=kind,
            id=vm.id,
            name=vm.name,
            image=vm.image,
            labels=vm.labels,
            details={name: str(value) for name, value in details.items()},
        )
        self._kept.append((_elapsed(), event))
        if self._log is not None:
            self._log.append(*self._kept[-1])
        for subscription in self._subscriptions:
            subscription.put(event)
        for listener in self._listeners:
            listener(event)

    def listen(self, listener: Callable[[m.VmEvent], None]) -> None:
        """Call `listener` from now on for each event, before `publish` returns; it must neither wait nor raise."""
        self._listeners.append(listener)

    def past(self, seconds: float) -> list[m.VmEvent]:
        """The events of the last so many seconds, as far as they are still kept."""
        earliest = _elapsed() - seconds
        return [event for when, event in self._kept if when >= earliest]

    def close(self) -> None:
        """Let go of the files; nothing is published any more."""
        if self._log is not None:
            self._log.close()
            self._log = None

    @contextlib.contextmanager
    def subscribed(self) -> Iterator[Subscription]:
        """All events from here on, until the block ends."""
        subscription = Subscription()
        self._subscriptions.add(subscription)
        try:
            yield subscription
        finally:
            self._subscriptions.discard(subscription)


def _elapsed() -> float:
    """Seconds that no change of the wall clock touches and that go on while the host sleeps."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)
