"""What a TCP port in a guest speaks: asked as a browser asks, within bounds of time and bytes."""

from __future__ import annotations

import asyncio
import contextlib
import re
import ssl
from collections.abc import Awaitable, Callable
from typing import TypeVar

from banger.guest.session import Channel, Data, GuestFailure

HTTP, HTTPS, TLS, UNKNOWN = "http", "https", "tls", ""

_SECONDS = 1.0  # for each of the two attempts
_MOST = 1 << 16  # bytes that are read in each; a TLS server sends its certificates first
_REQUEST = b"HEAD / HTTP/1.1\r\nHost: localhost\r\nUser-Agent: banger\r\nAccept: */*\r\nConnection: close\r\n\r\n"
_STATUS_LINE = re.compile(rb"HTTP/1\.[01] ([1-5][0-9]{2})")  # RFC 9112, section 4
_STATUS_BYTES = 12
# what a TLS record begins with that holds an alert or a part of a handshake: RFC 8446, section 5.1
_TLS_RECORDS = (b"\x15\x03", b"\x16\x03")

T = TypeVar("T")
Dial = Callable[[], Awaitable[Channel]]


async def speaks(dial: Dial) -> str:
    """HTTP, HTTPS, TLS (something else in it) or UNKNOWN, of what is at the other end of the connections of `dial`.

    What a TLS server shows of itself is not checked: nothing is trusted to it.
    """
    plain = _Plain()
    await _attempt(dial, plain.ask)
    status = _STATUS_LINE.match(plain.reply)
    # servers that want TLS hang up, send an alert, or say "bad request" in plain HTTP
    if status is not None and status[1] != b"400":
        return HTTP
    if status is None and plain.reply and not plain.reply.startswith(_TLS_RECORDS):
        return UNKNOWN
    secured = _Secured()
    await _attempt(dial, secured.ask)
    return HTTP if secured.found == UNKNOWN and status is not None else secured.found


async def _attempt(dial: Dial, ask: Callable[[Channel], Awaitable[None]]) -> None:
    """Let `ask` find out what it can in a connection."""
    with contextlib.suppress(GuestFailure, TimeoutError, ssl.SSLError):
        async with asyncio.timeout(_SECONDS):
            channel = await dial()
            try:
                await ask(channel)
            finally:
                await channel.close()


class _Plain:
    """What comes back for a request, as far as it matters."""

    def __init__(self) -> None:
        self.reply = b""

    async def ask(self, channel: Channel) -> None:
        await channel.send(_REQUEST)
        while len(self.reply) < _STATUS_BYTES and (data := await _receive(channel)):
            self.reply += data


class _Secured:
    """The same in TLS; `found` is TLS once a record of it has come, and HTTPS when there is HTTP in it."""

    def __init__(self) -> None:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
        self._incoming, self._outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._tls = context.wrap_bio(self._incoming, self._outgoing, server_hostname="localhost")
        self._received = 0
        self.found = UNKNOWN

    async def ask(self, channel: Channel) -> None:
        await self._go_on(channel, self._tls.do_handshake)
        await self._go_on(channel, lambda: self._tls.write(_REQUEST))
        if _STATUS_LINE.match(await self._go_on(channel, lambda: self._tls.read(_STATUS_BYTES))):
            self.found = HTTPS

    async def _go_on(self, channel: Channel, work: Callable[[], T]) -> T:
        """Do `work`, and send and receive what it needs for that. Raises ssl.SSLError."""
        while True:
            try:
                return work()
            except ssl.SSLWantReadError:
                pass
            finally:
                if unsent := self._outgoing.read():
                    await channel.send(unsent)
            data = await _receive(channel)
            if not data or self._received > _MOST:
                raise ssl.SSLEOFError("the other side has hung up, or does not come to an end")
            if data.startswith(_TLS_RECORDS) and not self._received:
                self.found = TLS
            self._received += len(data)
            self._incoming.write(data)


async def _receive(channel: Channel) -> bytes:
    """The next bytes; b"" at their end."""
    item = await channel.receive()
    return item.data if isinstance(item, Data) else b""
