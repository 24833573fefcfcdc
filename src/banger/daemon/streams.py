"""Carrying bytes and events between a client's stream and a channel of a guest."""

from __future__ import annotations

import asyncio
import contextlib
import signal
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from banger.api.codec import Json
from banger.api.operations import STDERR, STDOUT
from banger.guest import session as guest
from banger.guest.agent import guest_errors
from banger.job import Progress

# what a client whose user wants to leave sends: a signal, or Ctrl-C typed on a terminal
_LEAVING = {signal.SIGHUP, signal.SIGINT, signal.SIGQUIT, signal.SIGTERM}
_CTRL_C = b"\x03"


@dataclass(frozen=True)
class End:
    """The client sends no more input."""


@dataclass(frozen=True)
class Resize:
    rows: int
    columns: int


@dataclass(frozen=True)
class Signal:
    number: int


Input = memoryview | End | Resize | Signal


class Peer(Protocol):
    """The client end of a stream."""

    async def receive(self) -> Input | None:
        """The next input; None once the client is gone."""

    async def gone(self) -> None:
        """Return when the client is gone; what it sends meanwhile waits for `receive`."""

    async def send_data(self, stream: int, data: bytes) -> None:
        """Send output; waits while the client does not take it."""

    async def send_event(self, event: str, **fields: Json) -> None:
        """Send an event of the table in operations.py."""


class Channel(Protocol):
    """What a client's stream leads to: a channel of a guest, or what behaves like one."""

    async def receive(self) -> guest.Data | guest.End | guest.Exit:
        """What comes next; Exit is the last."""

    async def send(self, data: memoryview) -> None: ...

    async def send_end(self) -> None: ...

    async def signal(self, number: int) -> None: ...

    async def resize(self, rows: int, columns: int) -> None: ...

    async def close(self) -> None: ...


class ClientGone(Exception):
    """The client closed its stream before the end."""


async def report_to(peer: Peer, queue: asyncio.Queue[Progress | None]) -> None:
    """Send queued progress to a client until None comes."""
    while (progress := await queue.get()) is not None:
        await peer.send_event(
            "progress",
            stage=progress.stage,
            message=progress.message,
            done=progress.done,
            total=progress.total,
            unit=progress.unit,
            ended=progress.ended,
        )


async def carry(
    peer: Peer, channel: Channel, terminal: bool = False, check: Callable[[], None] = lambda: None
) -> guest.Exit:
    """Carry both directions until the guest's side ends; returns how.

    `check` is called when the user wants to end what runs (also by Ctrl-C, on a `terminal`), and raises what keeps the
    guest from hearing of it. Raises ClientGone when the client leaves first, BangerError when the guest's side fails.
    """
    outward = asyncio.create_task(_outward(peer, channel))
    inward = asyncio.create_task(_inward(peer, channel, terminal, check))
    try:
        await asyncio.wait((outward, inward), return_when=asyncio.FIRST_COMPLETED)
        if not outward.done():
            # the client left, or its input failed: a failure of the guest's side is told by `outward`
            inward.result()
            raise ClientGone
        with guest_errors("the guest broke off"):
            return outward.result()
    finally:
        for task in (outward, inward):
            task.cancel()
        await asyncio.gather(outward, inward, return_exceptions=True)
        await channel.close()


async def _outward(peer: Peer, channel: Channel) -> guest.Exit:
    while True:
        message = await channel.receive()
        match message:
            case guest.Data():
                await peer.send_data(STDERR if message.stream else STDOUT, message.data)
            case guest.Exit():
                return message


async def _inward(peer: Peer, channel: Channel, terminal: bool, check: Callable[[], None]) -> None:
    """Returns when the client is gone. Input waits in a queue, so that it never holds up signals."""
    queue: asyncio.Queue[memoryview | End] = asyncio.Queue()
    feeder = asyncio.create_task(_feed(peer, channel, queue))
    try:
        while (message := await peer.receive()) is not None:
            match message:
                case Resize():
                    with contextlib.suppress(guest.GuestFailure):  # its end comes through the channel itself
                        await channel.resize(message.rows, message.columns)
                case Signal():
                    if message.number in _LEAVING:
                        check()
                    with contextlib.suppress(guest.GuestFailure):
                        await channel.signal(message.number)
                case _:
                    if terminal and not isinstance(message, End) and _CTRL_C in bytes(message):
                        check()
                    queue.put_nowait(message)
    finally:
        feeder.cancel()
        await asyncio.gather(feeder, return_exceptions=True)


async def _feed(peer: Peer, channel: Channel, queue: asyncio.Queue[memoryview | End]) -> None:
    while True:
        message = await queue.get()
        if isinstance(message, End):
            await channel.send_end()
        else:
            await channel.send(message)
            await peer.send_event("window", bytes=len(message))


async def finish(peer: Peer, end: guest.Exit) -> None:
    """Send the last message of a stream that ended well."""
    await peer.send_event("exit", signalled=end.signalled, value=end.value)
