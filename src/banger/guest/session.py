"""One connection to the agent in a guest: calls and channels with flow control, on asyncio."""

from __future__ import annotations

import asyncio
import errno
import itertools
import os
import socket
import struct
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

from banger.guest.protocol import (
    GUEST_CHANNELS,
    INITIAL_WINDOW,
    MAX_CHANNELS,
    MAX_FRAME,
    MAX_PAYLOAD,
    MAX_REQUEST,
    NONCE_SIZE,
    OLDEST_VERSION,
    PROTOCOL_VERSION,
    FieldList,
    Fields,
    Frame,
    FrameParser,
    FrameType,
    OpenKind,
    ProtocolError,
    Stream,
    decode_hello,
    encode_fields,
    encode_frame,
    encode_hello,
)
from banger.reasons import in_words
from banger.system import connect_unix

_WRITE_BUFFER = 256 * 1024  # above this senders wait
_WRITE_LIMIT = 8 << 20  # above this, reached only by answers to a guest that asks and never reads, the session ends
_FRAMES_AT_ONCE = 64  # half a millisecond; a guest that sends tiny ones without end must not keep others waiting
_GRANT_STEP = INITIAL_WINDOW // 4
_MERGE_BELOW = 16 * 1024
_MERGE_BEYOND = 256  # entries in a queue from which on the order between two streams is given up to save memory
_U32 = struct.Struct("<I")
_TWO_U32 = struct.Struct("<II")
_STREAMS = frozenset(Stream)


class GuestFailure(Exception):
    """What can go wrong on a session; the base of the three below."""


class AgentError(GuestFailure):
    """The agent's answer to a request that failed: a Linux errno and its sentence; `hint` where we know the fix."""

    def __init__(self, code: int, message: str, hint: str = "") -> None:
        super().__init__(code, message)
        self.errno = code
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return self.message or os.strerror(self.errno)


class SessionLost(GuestFailure):
    """The connection to the agent has ended, or was never there."""


class ChannelClosed(GuestFailure):
    """Nothing more comes from this channel, and nothing can be sent on it."""


@dataclass(frozen=True)
class Data:
    """Bytes of one stream."""

    stream: int
    data: bytes


@dataclass(frozen=True)
class End:
    """No more bytes come on this stream."""

    stream: int


@dataclass(frozen=True)
class Exit:
    """How a command ended: its status (0 to 255), or the number of the signal that killed it."""

    signalled: bool
    value: int

    @property
    def status(self) -> int:
        """As a shell tells it: 128 + n for signal n."""
        return 128 + self.value if self.signalled else self.value


def decode_exit(kind: int, value: int) -> Exit:
    """Checks the two numbers of EXIT (and of TAG_EXITED). Raises ProtocolError."""
    if kind not in (0, 1) or value > 255:
        raise ProtocolError(f"an exit status that is none: {kind}, {value}")
    return Exit(kind == 1, value)


class _State(Enum):
    CALL = "call"  # REPLY ends it
    OPENING = "opening"  # REPLY makes it a stream
    OPEN = "open"
    ABANDONED = "abandoned"  # a call that nobody waits for any more; it cannot be taken back
    CLOSING = "closing"  # we have sent CLOSE
    CLOSED = "closed"


class _Pending:
    """What waits in a channel; small pieces are joined, so that a guest cannot make it cost more than its bytes."""

    def __init__(self) -> None:
        self._items: deque[tuple[int, bytes | bytearray] | End | Exit] = deque()
        self._last: dict[int, bytearray] = {}  # the newest piece of each stream that can still grow

    def __len__(self) -> int:
        return len(self._items)

    def add(self, stream: int, data: bytes) -> None:
        last = self._last.get(stream)
        newest = self._items[-1] if self._items else None
        adjacent = isinstance(newest, tuple) and newest[0] == stream
        if last is not None and len(last) < _MERGE_BELOW and (adjacent or len(self._items) >= _MERGE_BEYOND):
            last += data
        elif len(data) < _MERGE_BELOW:
            self._last[stream] = bytearray(data)
            self._items.append((stream, self._last[stream]))
        else:
            self._last.pop(stream, None)
            self._items.append((stream, data))

    def finish(self, item: End | Exit) -> None:
        self._items.append(item)

    def take(self) -> Data | End | Exit:
        item = self._items.popleft()
        if not isinstance(item, tuple):
            return item
        stream, data = item
        if self._last.get(stream) is data:
            del self._last[stream]
        return Data(stream, bytes(data))

    def clear(self) -> None:
        self._items.clear()
        self._last.clear()


class Channel:
    """One stream channel. One task may send on it while another receives; cancelling either keeps it in order.

    `send_end`, `signal` and `resize` do nothing once the channel has ended, which `receive` and `send` tell.
    """

    def __init__(self, session: AgentSession, number: int, state: _State) -> None:
        self._session = session
        self._number = number
        self._state = state
        self._failure: GuestFailure | None = None
        self._reply: asyncio.Future[Fields] = session.loop.create_future()
        self._pending = _Pending()
        self._arrived = asyncio.Event()
        self._ended: set[int] = set()
        self._exited = False
        self._expected = INITIAL_WINDOW  # bytes the agent may still send
        self._taken = 0  # bytes the consumer took that have not been granted again
        self._credit = INITIAL_WINDOW  # bytes we may still send
        self._may_send = asyncio.Event()

    @property
    def reply(self) -> Fields:
        """The fields with which the agent opened the channel."""
        return self._reply.result()

    async def send(self, data: bytes | bytearray | memoryview, stream: int = Stream.MAIN) -> None:
        """Send bytes, as fast as the guest takes them. Raises ChannelClosed, AgentError, SessionLost."""
        rest = memoryview(data).cast("B")
        while rest:
            await self._until_may_send()
            count = min(len(rest), MAX_PAYLOAD, self._credit)
            self._session.write_frame(FrameType.DATA, self._number, rest[:count], stream)
            self._credit -= count
            rest = rest[count:]

    async def send_end(self, stream: int = Stream.MAIN) -> None:
        """Say that no more data comes on this stream: closes a command's standard input."""
        self._send_control(FrameType.END, b"", stream)

    async def signal(self, number: int) -> None:
        """Send a signal (Linux number) to the command's process group."""
        self._send_control(FrameType.SIGNAL, _U32.pack(number))

    async def resize(self, rows: int, columns: int) -> None:
        """Tell the command's terminal its new size, in characters."""
        self._send_control(FrameType.RESIZE, struct.pack("<HH", rows, columns))

    async def receive(self) -> Data | End | Exit:
        """What comes next; what arrived before the channel ended still comes.

        Raises AgentError when the agent ended the channel with an error, ChannelClosed after its regular end,
        SessionLost.
        """
        while not self._pending:
            if self._failure is not None:
                raise self._failure.with_traceback(None)
            self._arrived.clear()
            await self._arrived.wait()
        item = self._pending.take()
        if isinstance(item, Data):
            self._taken += len(item.data)
            if self._taken >= _GRANT_STEP and self._state is _State.OPEN:
                self._session.write_frame(FrameType.WINDOW, self._number, _U32.pack(self._taken))
                self._expected += self._taken
                self._taken = 0
        return item

    async def close(self) -> None:
        """Forget the channel: what is unread is dropped; a command that still runs gets SIGHUP."""
        self._pending.clear()
        if self._state in (_State.OPENING, _State.OPEN):
            self._state = _State.CLOSING
            self._session.write_frame(FrameType.CLOSE, self._number)
            self._fail(ChannelClosed("the channel has been closed"))

    def _send_control(self, frame_type: FrameType, payload: bytes, stream: int = 0) -> None:
        # a command may end at any time, so being too late is no error; `receive` tells how it ended
        if self._failure is None:
            self._session.write_frame(frame_type, self._number, payload, stream)

    async def _until_may_send(self) -> None:
        while True:
            if self._failure is not None:
                raise self._failure.with_traceback(None)
            if self._credit > 0 and self._session.writable.is_set():
                return
            self._may_send.clear()
            await self._may_send.wait()

    def _fail(self, failure: GuestFailure) -> None:
        if self._failure is None:
            self._failure = failure
        self._arrived.set()
        self._may_send.set()

    # What the session calls: -----------------------------------------------------------------------------------------

    async def opened(self) -> Fields:
        """Wait for the agent's REPLY. Raises AgentError, SessionLost. When cancelled, the channel winds itself up."""
        try:
            return await self._reply
        except asyncio.CancelledError:
            if self._state is _State.CALL:
                self._state = _State.ABANDONED
            await self.close()
            raise

    def wake_sender(self) -> None:
        """The session can be written to again."""
        self._may_send.set()

    @property
    def finished(self) -> bool:
        """True when neither side will send a frame for this channel again."""
        return self._state is _State.CLOSED

    def lose(self, failure: GuestFailure) -> None:
        """End the channel without a further frame."""
        self._state = _State.CLOSED
        self._fail(failure)
        if not self._reply.done():
            self._reply.set_exception(failure)
            self._reply.exception()  # nobody may be waiting for it

    def handle(self, frame: Frame) -> None:
        """Take one frame of this channel. Raises ProtocolError."""
        match frame.type, self._state:
            case FrameType.ERROR, _:
                if len(frame.payload) < _U32.size:
                    raise ProtocolError("an ERROR without a number")
                (code,) = _U32.unpack_from(frame.payload)
                self.lose(AgentError(code, frame.payload[_U32.size :].decode("utf-8", "replace")))
            case FrameType.REPLY, _State.CALL | _State.OPENING:
                self._reply.set_result(Fields(frame.payload))
                self._state = _State.CLOSED if self._state is _State.CALL else _State.OPEN
            case FrameType.REPLY, _State.ABANDONED:
                self._state = _State.CLOSED
            case FrameType.CLOSE, _State.OPEN:
                self._session.write_frame(FrameType.CLOSE, self._number)
                self.lose(ChannelClosed("the guest has closed the channel"))
            case FrameType.CLOSE, _State.CLOSING:
                self._state = _State.CLOSED
            case _, _State.CLOSING:
                pass  # it crossed our CLOSE
            case _, _State.OPEN if not self._exited:
                self._handle_stream(frame)
            case _:
                raise ProtocolError(f"{frame.type.name} on a channel that is {self._state.value}")

    def _handle_stream(self, frame: Frame) -> None:
        if frame.type is FrameType.WINDOW:
            self._credit += _unpack(_U32, frame)[0]
            self._may_send.set()
            return
        if frame.type is FrameType.EXIT:
            self._exited = True
            self._pending.finish(decode_exit(*_unpack(_TWO_U32, frame)))
        elif frame.type not in (FrameType.DATA, FrameType.END):
            raise ProtocolError(f"a {frame.type.name} frame from the guest")
        elif frame.stream not in _STREAMS or frame.stream in self._ended:
            raise ProtocolError(f"{frame.type.name} on stream {frame.stream}, which is not open")
        elif frame.type is FrameType.END:
            self._ended.add(frame.stream)
            self._pending.finish(End(frame.stream))
        else:
            if len(frame.payload) > self._expected:
                raise ProtocolError("more DATA than was granted")
            if not frame.payload:
                return
            self._expected -= len(frame.payload)
            self._pending.add(frame.stream, frame.payload)
        self._arrived.set()


class AgentSession(asyncio.BufferedProtocol):
    """The host's end of the connection to one agent; `connect` makes it, `closed` is set when it has ended.

    It is an asyncio protocol that receives into the parser's own buffer, which measures faster than streams do.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.loop = loop
        self.closed = asyncio.Event()
        self.reason = ""
        self.version = 0  # of the protocol; both speak it once `connect` has returned
        self.writable = asyncio.Event()
        self._nonce = os.urandom(NONCE_SIZE)
        self._parser = FrameParser(self._nonce)
        self._greeted: asyncio.Future[None] = loop.create_future()
        self._transport: asyncio.Transport | None = None
        self._channels: dict[int, Channel] = {}
        self._last_number = 0
        # Frames for the transport, joined while it takes none and while frames of the guest are handled: since
        # Python 3.12 it keeps every write apart, and counts them all at each.
        self._unsent = bytearray()
        self._handling = False

    @classmethod
    async def connect(cls, address: Path | socket.socket, timeout: float) -> AgentSession:
        """A session over the Unix stream socket at a path, or over a connected one, which it then owns.

        Raises SessionLost when nobody listens there or no agent answers within `timeout` seconds.
        """
        loop = asyncio.get_running_loop()
        if not isinstance(address, socket.socket):
            try:
                address = connect_unix(address, timeout=0)  # never blocks: it fails when the backlog is full
            except OSError as error:
                raise SessionLost(f"cannot connect to the guest's agent: {error.strerror}") from error
        address.setblocking(False)
        _, session = await loop.create_unix_connection(lambda: cls(loop), sock=address)
        try:
            async with asyncio.timeout(timeout):
                await session._greeted
        except TimeoutError:
            session._lose(f"the guest's agent did not answer within {timeout:g} s")
            raise SessionLost(session.reason) from None
        except asyncio.CancelledError:
            session._lose("connecting was cancelled")
            raise
        return session

    async def call(self, kind: OpenKind, fields: FieldList = (), timeout: float | None = None) -> Fields:
        """Make a call and return its reply. Raises AgentError, SessionLost, TimeoutError; ValueError for bad fields."""
        async with asyncio.timeout(timeout):
            return await (await self._request(kind, fields, _State.CALL)).opened()

    async def open(self, kind: OpenKind, fields: FieldList = (), timeout: float | None = None) -> Channel:
        """Open a stream; `timeout` bounds the wait for the agent's reply. Raises as `call` does."""
        async with asyncio.timeout(timeout):
            channel = await self._request(kind, fields, _State.OPENING)
            await channel.opened()
            return channel

    async def close(self) -> None:
        """End the session; channels that are still open get SessionLost, attached commands SIGHUP."""
        self._lose("the session has been closed")
        await self.closed.wait()

    async def _request(self, kind: OpenKind, fields: FieldList, state: _State) -> Channel:
        payload = memoryview(kind.to_bytes(2, "little") + encode_fields(fields))
        self._check_size(len(payload))
        while not self.writable.is_set():
            await self.writable.wait()
        self._check()
        if len(self._channels) >= MAX_CHANNELS:
            raise AgentError(errno.EAGAIN, f"{MAX_CHANNELS} channels are in use, which is the most there can be")
        number = self._free_number()
        channel = self._channels[number] = Channel(self, number, state)
        while len(payload) > MAX_PAYLOAD:
            self.write_frame(FrameType.PART, number, payload[:MAX_PAYLOAD])
            payload = payload[MAX_PAYLOAD:]
        self.write_frame(FrameType.OPEN, number, payload)
        return channel

    def _check_size(self, size: int) -> None:
        if size > MAX_REQUEST:
            raise AgentError(errno.E2BIG, f"the request has {size:,} bytes, and at most {MAX_REQUEST:,} are possible")
        if size > MAX_PAYLOAD and self.version < 2:
            raise AgentError(
                errno.E2BIG,
                f"the request has {size:,} bytes, and the agent of this VM, which is from an older banger, takes"
                f" {MAX_PAYLOAD:,}",
                "create the VM anew to give it today's agent, or pass less: in a file ('banger vm cp'), for example",
            )

    def _free_number(self) -> int:
        while True:
            self._last_number = self._last_number % (GUEST_CHANNELS - 1) + 1
            if self._last_number not in self._channels:
                return self._last_number

    def _check(self) -> None:
        if self.reason:
            raise SessionLost(self.reason)

    def write_frame(
        self, frame_type: FrameType, channel: int, payload: bytes | memoryview = b"", stream: int = 0
    ) -> None:
        """Queue one frame; nothing happens when the session has ended."""
        if self._transport is None or self.reason:
            return
        self._unsent += encode_frame(frame_type, channel, payload, stream)
        if not self._handling:
            self._send()

    def _send(self) -> None:
        """Hand over what is to be sent, as soon as the transport takes it."""
        if self._transport is None or self.reason or not self._unsent:
            return
        if self.writable.is_set():
            unsent, self._unsent = self._unsent, bytearray()
            self._transport.write(unsent)
        elif len(self._unsent) > _WRITE_LIMIT:
            self._lose("the guest has stopped reading")

    def _lose(self, reason: str) -> None:
        if self.reason:
            return
        self.reason = reason
        if self._transport is not None:
            self._transport.abort()
        failure = SessionLost(reason)
        for channel in self._channels.values():
            channel.lose(failure)
        self._channels.clear()
        if not self._greeted.done():
            self._greeted.set_exception(failure)
            self._greeted.exception()
        self.writable.set()

    def _handle(self, frame: Frame) -> None:
        if not self._greeted.done():
            self._handle_hello(frame)
        elif frame.type is FrameType.HELLO or frame.channel == 0:
            raise ProtocolError(f"{frame.type.name} for the session itself")
        elif (channel := self._channels.get(frame.channel)) is not None:
            channel.handle(frame)
            if channel.finished:
                self._channels.pop(frame.channel, None)
        elif frame.type is FrameType.OPEN:
            if frame.channel < GUEST_CHANNELS:
                raise ProtocolError("the guest opens a channel with an id of the host")
            refusal = _U32.pack(errno.EOPNOTSUPP) + b"the host takes no channels"
            self.write_frame(FrameType.ERROR, frame.channel, refusal)

    def _handle_hello(self, frame: Frame) -> None:
        _, oldest, newest = decode_hello(frame.payload)
        if oldest != newest or not OLDEST_VERSION <= newest <= PROTOCOL_VERSION:
            raise ProtocolError(f"the guest's agent speaks none of the versions {OLDEST_VERSION} to {PROTOCOL_VERSION}")
        self.version = newest
        self._greeted.set_result(None)

    # asyncio.BufferedProtocol ----------------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        transport.set_write_buffer_limits(high=_WRITE_BUFFER)
        self.writable.set()
        transport.write(bytes(MAX_FRAME) + encode_hello(self._nonce, OLDEST_VERSION, PROTOCOL_VERSION))

    def get_buffer(self, sizehint: int) -> memoryview:
        return self._parser.space()

    def buffer_updated(self, nbytes: int) -> None:
        self._take(self._parser.received(nbytes))

    def _take(self, frames: Iterator[Frame]) -> None:
        """Handle some frames, and the rest, before more is read, when others have had their turn on the loop."""
        if self._transport is None or self.reason:
            return
        self._handling = True
        try:
            for frame in itertools.islice(frames, _FRAMES_AT_ONCE):
                self._handle(frame)
                if self.reason:
                    return
            following = next(frames, None)
        except ProtocolError as error:
            self._lose(f"the guest broke the protocol: {error}")
            return
        finally:
            self._handling = False
            self._send()
        if self.reason:
            return
        if following is None:
            self._transport.resume_reading()
        else:
            self._transport.pause_reading()
            self.loop.call_soon(self._take, itertools.chain((following,), frames))

    def pause_writing(self) -> None:
        if not self.reason:
            self.writable.clear()

    def resume_writing(self) -> None:
        self.writable.set()
        self._send()
        for channel in self._channels.values():
            channel.wake_sender()

    def connection_lost(self, exc: Exception | None) -> None:
        self._lose(
            "the guest has closed the connection" if exc is None else f"the connection to the guest: {in_words(exc)}"
        )
        self.closed.set()


def _unpack(layout: struct.Struct, frame: Frame) -> tuple[int, ...]:
    if len(frame.payload) != layout.size:
        raise ProtocolError(f"a {frame.type.name} frame of {len(frame.payload)} bytes")
    return layout.unpack(frame.payload)
