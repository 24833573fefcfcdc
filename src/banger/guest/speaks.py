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
_ANSWER_SECONDS = 10.0  # for a whole answer, which may take a server some work
_MOST = 1 << 16  # bytes that are read in each; a TLS server sends its certificates first
_HEADERS = b" HTTP/1.1\r\nHost: localhost\r\nUser-Agent: banger\r\nAccept: */*\r\nConnection: close\r\n\r\n"
_HEAD = b"HEAD /" + _HEADERS
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
    plain = _Plain(_HEAD)
    await _attempt(dial, plain.ask)
    status = _STATUS_LINE.match(plain.reply)
    # servers that want TLS hang up, send an alert, or say "bad request" in plain HTTP
    if status is not None and status[1] != b"400":
        return HTTP
    if status is None and plain.reply and not plain.reply.startswith(_TLS_RECORDS):
        return UNKNOWN
    secured = _Secured(_HEAD)
    await _attempt(dial, secured.ask)
    return HTTP if secured.found == UNKNOWN and status is not None else secured.found


async def answers(dial: Dial, path: str, secured: bool) -> bool:
    """Whether an HTTP server, behind TLS if `secured`, answers GET for `path` with success or a redirection.

    The status code says so: RFC 9110, sections 15.3 and 15.4.
    """
    asking = (_Secured if secured else _Plain)(b"GET " + path.encode() + _HEADERS)
    await _attempt(dial, asking.ask, _ANSWER_SECONDS)
    status = _STATUS_LINE.match(asking.reply)
    return status is not None and status[1][:1] in (b"2", b"3")


async def _attempt(dial: Dial, ask: Callable[[Channel], Awaitable[None]], seconds: float = _SECONDS) -> None:
    """Let `ask` find out what it can in a connection."""
    with contextlib.suppress(GuestFailure, TimeoutError, ssl.SSLError):
        async with asyncio.timeout(seconds):
            channel = await dial()
            try:
                await ask(channel)
            finally:
                await channel.close()


class _Plain:
    """What comes back for a request, as far as it matters."""

    def __init__(self, request: bytes) -> None:
        self._request = request
        self.reply = b""

    async def ask(self, channel: Channel) -> None:
        await channel.send(self._request)
        while len(self.reply) < _STATUS_BYTES and (data := await _receive(channel)):
            self.reply += data


class _Secured:
    """The same in TLS; `found` is TLS once a record of it has come, and HTTPS when there is HTTP in it."""

    def __init__(self, request: bytes) -> None:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
        self._incoming, self._outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._tls = context.wrap_bio(self._incoming, self._outgoing, server_hostname="localhost")
        self._request = request
        self._received = 0
        self.reply = b""
        self.found = UNKNOWN

    async def ask(self, channel: Channel) -> None:
        await self._go_on(channel, self._tls.do_handshake)
        await self._go_on(channel, lambda: self._tls.write(self._request))
        while len(self.reply) < _STATUS_BYTES and (data := await self._go_on(channel, self._tls.read)):
            self.reply += data
        if _STATUS_LINE.match(self.reply):
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
