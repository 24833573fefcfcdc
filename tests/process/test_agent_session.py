"""AgentSession against agents that lie, overrun and hang up: a fake one at the other end of a socket pair."""

import asyncio
import errno
import random
import socket
import struct
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager

import pytest

from banger.api.errors import BangerError, Code
from banger.guest.agent import Agent, ExecRequest, GuestConfig, guest_errors
from banger.guest.protocol import (
    GUEST_CHANNELS,
    INITIAL_WINDOW,
    MAX_CHANNELS,
    MAX_FRAME,
    MAX_PAYLOAD,
    MAX_REQUEST,
    PROTOCOL_VERSION,
    Fields,
    FieldValue,
    Frame,
    FrameParser,
    FrameType,
    OpenKind,
    ProtocolError,
    Tag,
    decode_hello,
    encode_fields,
    encode_frame,
    encode_hello,
)
from banger.guest.session import AgentError, AgentSession, Channel, ChannelClosed, Data, End, Exit, SessionLost

pytestmark = pytest.mark.anyio
TIMEOUT = 30.0


class FakeAgent:
    """Speaks raw frames over its end of a socket pair."""

    def __init__(self, end: socket.socket, version: int = PROTOCOL_VERSION) -> None:
        end.setblocking(False)
        self.version = version
        self.socket = end
        self._loop = asyncio.get_running_loop()
        self._parser = FrameParser()
        self._frames: list[Frame] = []

    async def receive(self) -> Frame:
        while not self._frames:
            data = await self._loop.sock_recv(self.socket, MAX_FRAME)
            if not data:
                raise EOFError
            self._frames += self._parser.feed(data)
        return self._frames.pop(0)

    async def expect(self, frame_type: FrameType) -> Frame:
        frame = await self.receive()
        assert frame.type is frame_type
        return frame

    async def send(self, *frames: bytes) -> None:
        await self._loop.sock_sendall(self.socket, b"".join(frames))

    async def greet(self) -> None:
        nonce, oldest, newest = decode_hello((await self.expect(FrameType.HELLO)).payload)
        assert (oldest, newest) == (1, PROTOCOL_VERSION)
        await self.send(encode_hello(nonce, self.version, self.version))


@pytest.fixture
def ends() -> Iterator[tuple[socket.socket, socket.socket]]:
    host, guest = socket.socketpair()
    with host, guest:
        yield host, guest


@asynccontextmanager
async def _connected(
    ends: tuple[socket.socket, socket.socket], version: int = PROTOCOL_VERSION
) -> AsyncIterator[tuple[AgentSession, FakeAgent]]:
    fake = FakeAgent(ends[1], version)
    async with asyncio.timeout(TIMEOUT), asyncio.TaskGroup() as group:
        greeting = group.create_task(fake.greet())
        session = await AgentSession.connect(ends[0], TIMEOUT)
        await greeting
    try:
        async with asyncio.timeout(TIMEOUT):
            yield session, fake
    finally:
        await session.close()


@pytest.fixture
async def pair(ends: tuple[socket.socket, socket.socket]) -> AsyncIterator[tuple[AgentSession, FakeAgent]]:
    async with _connected(ends) as connected:
        yield connected


async def _opened(session: AgentSession, fake: FakeAgent) -> tuple[Channel, int]:
    opening = asyncio.create_task(session.open(OpenKind.DIAL))
    number = (await fake.expect(FrameType.OPEN)).channel
    await fake.send(encode_frame(FrameType.REPLY, number))
    return await opening, number


async def _receive_into(items: list[Data | End | Exit], channel: Channel) -> None:
    while True:
        items.append(await channel.receive())


async def _send_forever(fake: FakeAgent, data: bytes) -> None:
    while True:
        await fake.send(data)


async def test_connect_sends_zeros_first_and_discards_until_its_nonce(
    ends: tuple[socket.socket, socket.socket],
) -> None:
    connecting = asyncio.create_task(AgentSession.connect(ends[0], TIMEOUT))
    loop = asyncio.get_running_loop()
    ends[1].setblocking(False)
    begin = b""
    while len(begin) < MAX_FRAME + 52:
        begin += await loop.sock_recv(ends[1], MAX_FRAME)
    assert begin[:MAX_FRAME] == bytes(MAX_FRAME)
    nonce, _, _ = decode_hello(next(FrameParser().feed(begin)).payload)
    stale = encode_frame(FrameType.DATA, 9, random.Random(1).randbytes(MAX_PAYLOAD))
    await loop.sock_sendall(ends[1], stale * 20 + stale[:777] + encode_hello(bytes(16), 1, 1))
    assert not connecting.done()
    await loop.sock_sendall(ends[1], encode_hello(nonce, 1, 1))
    await (await connecting).close()


async def test_a_wrong_nonce_is_no_answer(ends: tuple[socket.socket, socket.socket]) -> None:
    fake = FakeAgent(ends[1])
    await fake.send(encode_hello(bytes(16), 1, 1))
    with pytest.raises(SessionLost, match="did not answer"):
        await AgentSession.connect(ends[0], 0.05)


async def test_zeros_without_end_are_no_answer(ends: tuple[socket.socket, socket.socket]) -> None:
    pouring = asyncio.create_task(_send_forever(FakeAgent(ends[1]), bytes(MAX_FRAME)))
    with pytest.raises(SessionLost, match="did not answer"):
        await AgentSession.connect(ends[0], 0.05)
    with pytest.raises((BrokenPipeError, ConnectionResetError)):
        await pouring


@pytest.mark.parametrize("versions", [(0, 0), (3, 3), (1, 2)])
async def test_an_agent_without_a_common_version_is_refused(
    ends: tuple[socket.socket, socket.socket], versions: tuple[int, int]
) -> None:
    fake = FakeAgent(ends[1])
    connecting = asyncio.create_task(AgentSession.connect(ends[0], TIMEOUT))
    nonce, _, _ = decode_hello((await fake.receive()).payload)
    await fake.send(encode_hello(nonce, *versions))
    with pytest.raises(SessionLost, match="version"):
        await connecting


async def test_the_end_of_the_stream_at_every_byte_ends_every_waiter() -> None:
    def replies(number: int) -> bytes:
        hello = encode_frame(FrameType.DATA, number, b"hello")
        return encode_frame(FrameType.REPLY, number) + hello + encode_frame(FrameType.END, number)

    for cut in range(len(replies(1))):
        host, guest = socket.socketpair()
        with host, guest:
            async with _connected((host, guest)) as (session, fake):
                opening = asyncio.create_task(session.open(OpenKind.DIAL))
                calling = asyncio.create_task(session.call(OpenKind.HEALTH))
                number = (await fake.expect(FrameType.OPEN)).channel
                await fake.expect(FrameType.OPEN)
                await fake.send(replies(number)[:cut])
                guest.close()
                with pytest.raises(SessionLost):
                    await calling
                got: list[Data | End | Exit] = []
                with pytest.raises(SessionLost):
                    await _receive_into(got, await opening)
                assert got == [Data(0, b"hello"), End(0)][: len(got)]
                await session.closed.wait()
                assert session.reason == "the guest has closed the connection"
                with pytest.raises(SessionLost):
                    await session.call(OpenKind.HEALTH)


_REPLY = encode_frame(FrameType.REPLY, 1)


@pytest.mark.parametrize(
    "frames",
    [
        pytest.param([b"garbage that is no header"], id="garbage"),
        pytest.param([encode_hello(bytes(16), 1, 1)], id="second hello"),
        pytest.param([encode_frame(FrameType.REPLY, 0)], id="frame for the session"),
        pytest.param([_REPLY, _REPLY], id="second reply"),
        pytest.param([encode_frame(FrameType.DATA, 1, b"x")], id="data before the reply"),
        pytest.param([encode_frame(FrameType.REPLY, 1, b"\x01\x00\xff\xff\xff\xff")], id="giant field"),
        pytest.param([encode_frame(FrameType.ERROR, 1, b"\x01")], id="error without a number"),
        pytest.param([_REPLY, encode_frame(FrameType.DATA, 1, b"x", stream=2)], id="unknown stream"),
        pytest.param(
            [_REPLY, encode_frame(FrameType.END, 1), encode_frame(FrameType.DATA, 1, b"x")], id="data after its end"
        ),
        pytest.param([_REPLY, *[encode_frame(FrameType.END, 1)] * 2], id="second end"),
        pytest.param([_REPLY, encode_frame(FrameType.EXIT, 1, bytes(4))], id="short exit"),
        pytest.param([_REPLY, encode_frame(FrameType.EXIT, 1, struct.pack("<II", 2, 0))], id="unknown exit"),
        pytest.param([_REPLY, *[encode_frame(FrameType.EXIT, 1, bytes(8))] * 2], id="second exit"),
        pytest.param([_REPLY, encode_frame(FrameType.WINDOW, 1, b"xyz")], id="short window"),
        pytest.param([_REPLY, encode_frame(FrameType.SIGNAL, 1, bytes(4))], id="signal for the host"),
        pytest.param([encode_frame(FrameType.OPEN, 7, bytes(2))], id="open with an id of the host"),
        pytest.param([_REPLY, *[encode_frame(FrameType.DATA, 1, bytes(MAX_PAYLOAD))] * 9], id="credit overrun"),
    ],
)
async def test_a_broken_rule_ends_the_session(pair: tuple[AgentSession, FakeAgent], frames: list[bytes]) -> None:
    session, fake = pair
    opening = asyncio.create_task(session.open(OpenKind.DIAL))
    waiting = asyncio.create_task(session.call(OpenKind.HEALTH))
    assert (await fake.expect(FrameType.OPEN)).channel == 1
    await fake.expect(FrameType.OPEN)
    await fake.send(*frames)
    with pytest.raises(SessionLost, match="broke the protocol"):
        await waiting
    await session.closed.wait()
    await asyncio.gather(opening, return_exceptions=True)


async def test_frames_for_unknown_channels_are_ignored_and_guest_channels_refused(
    pair: tuple[AgentSession, FakeAgent],
) -> None:
    session, fake = pair
    noise = [encode_frame(kind, 77, bytes(8)) for kind in FrameType if kind not in (FrameType.HELLO, FrameType.OPEN)]
    await fake.send(*noise, encode_frame(FrameType.OPEN, GUEST_CHANNELS + 3, bytes(2)))
    refusal = await fake.expect(FrameType.ERROR)
    assert refusal.channel == GUEST_CHANNELS + 3
    calling = asyncio.create_task(session.call(OpenKind.HEALTH))
    await fake.send(encode_frame(FrameType.REPLY, (await fake.expect(FrameType.OPEN)).channel))
    await calling


async def test_a_guest_that_asks_and_never_reads_is_dropped(pair: tuple[AgentSession, FakeAgent]) -> None:
    session, fake = pair
    ask = encode_frame(FrameType.OPEN, GUEST_CHANNELS, bytes(2)) * 2000
    with pytest.raises((BrokenPipeError, ConnectionResetError)):
        await _send_forever(fake, ask)
    assert session.reason == "the guest has stopped reading"


async def test_others_have_their_turn_while_a_guest_sends_tiny_frames(pair: tuple[AgentSession, FakeAgent]) -> None:
    """However many arrive in one read; and the order of all is kept."""
    session, fake = pair
    turns = 0

    async def others() -> None:
        nonlocal turns
        while True:
            turns += 1
            await asyncio.sleep(0)

    calling = asyncio.create_task(session.call(OpenKind.HEALTH))
    number = (await fake.expect(FrameType.OPEN)).channel
    working = asyncio.create_task(others())
    tiny = encode_frame(FrameType.WINDOW, 77, bytes(4))
    await fake.send(tiny * 20_000, encode_frame(FrameType.REPLY, number))
    await calling
    working.cancel()
    assert turns > 20_000 / 100


async def test_credit_is_granted_as_the_consumer_takes(pair: tuple[AgentSession, FakeAgent]) -> None:
    session, fake = pair
    channel, number = await _opened(session, fake)
    window, total, received = INITIAL_WINDOW, 0, 0
    piece = bytes(MAX_PAYLOAD)
    while total < 8 * INITIAL_WINDOW:
        while window >= len(piece):
            await fake.send(encode_frame(FrameType.DATA, number, piece))
            window -= len(piece)
            total += len(piece)
        while received < total:
            item = await channel.receive()
            assert isinstance(item, Data)
            received += len(item.data)
        while window < len(piece):
            (granted,) = struct.unpack("<I", (await fake.expect(FrameType.WINDOW)).payload)
            window += granted
    assert window <= INITIAL_WINDOW


async def test_a_sender_waits_for_credit_and_can_be_cancelled(pair: tuple[AgentSession, FakeAgent]) -> None:
    session, fake = pair
    channel, number = await _opened(session, fake)
    content = random.Random(2).randbytes(INITIAL_WINDOW + 10)
    sending = asyncio.create_task(channel.send(content))
    got = b""
    while len(got) < INITIAL_WINDOW:
        got += (await fake.expect(FrameType.DATA)).payload
    assert not sending.done()
    sending.cancel()
    await asyncio.gather(sending, return_exceptions=True)
    await fake.send(encode_frame(FrameType.WINDOW, number, struct.pack("<I", 6)))
    await channel.send(b"after!")
    got += (await fake.expect(FrameType.DATA)).payload
    assert got == content[:INITIAL_WINDOW] + b"after!"


async def test_a_stuck_consumer_costs_no_more_than_its_window_in_small_pieces(
    pair: tuple[AgentSession, FakeAgent],
) -> None:
    session, fake = pair
    channel, number = await _opened(session, fake)
    letters = [encode_frame(FrameType.DATA, number, letter, stream) for stream, letter in enumerate((b"a", b"b"))]
    empty = encode_frame(FrameType.DATA, number)
    for _ in range(20):
        await fake.send(b"".join([*letters, empty]) * 1000)
    await fake.send(encode_frame(FrameType.EXIT, number, bytes(8)), encode_frame(FrameType.CLOSE, number))
    await fake.expect(FrameType.CLOSE)
    received = {0: b"", 1: b""}
    items = 0
    while isinstance(item := await channel.receive(), Data):
        received[item.stream] += item.data
        items += 1
    assert received == {0: b"a" * 20_000, 1: b"b" * 20_000}
    assert item == Exit(False, 0)
    assert items < 1000
    with pytest.raises(ChannelClosed):
        await channel.receive()


async def test_a_stuck_consumer_holds_up_its_own_channel_only(pair: tuple[AgentSession, FakeAgent]) -> None:
    session, fake = pair
    stuck, first = await _opened(session, fake)
    flowing, second = await _opened(session, fake)
    await fake.send(*[encode_frame(FrameType.DATA, first, bytes(MAX_FRAME // 2))] * 16)
    await fake.send(encode_frame(FrameType.DATA, second, b"flows"))
    assert await flowing.receive() == Data(0, b"flows")
    await stuck.close()


async def test_ids_come_back_only_after_both_closes(pair: tuple[AgentSession, FakeAgent]) -> None:
    session, fake = pair
    numbers = []
    for _ in range(MAX_CHANNELS):
        channel, number = await _opened(session, fake)
        await channel.close()
        await channel.close()
        await fake.expect(FrameType.CLOSE)
        numbers.append(number)
    assert len(set(numbers)) == MAX_CHANNELS
    with pytest.raises(AgentError) as caught:
        await session.call(OpenKind.HEALTH)
    assert caught.value.errno == errno.EAGAIN
    await fake.send(encode_frame(FrameType.CLOSE, numbers[0]), encode_frame(FrameType.OPEN, GUEST_CHANNELS, bytes(2)))
    await fake.expect(FrameType.ERROR)
    await _opened(session, fake)


async def test_cancelling_an_open_or_a_call_leaves_no_trace(pair: tuple[AgentSession, FakeAgent]) -> None:
    session, fake = pair
    opening = asyncio.create_task(session.open(OpenKind.DIAL))
    calling = asyncio.create_task(session.call(OpenKind.HEALTH))
    opened = (await fake.expect(FrameType.OPEN)).channel
    called = (await fake.expect(FrameType.OPEN)).channel
    opening.cancel()
    calling.cancel()
    await asyncio.gather(opening, calling, return_exceptions=True)
    assert (await fake.expect(FrameType.CLOSE)).channel == opened
    await fake.send(
        encode_frame(FrameType.REPLY, opened),
        encode_frame(FrameType.DATA, opened, b"crossed"),
        encode_frame(FrameType.CLOSE, opened),
        encode_frame(FrameType.REPLY, called),
    )
    _, number = await _opened(session, fake)
    assert number not in (opened, called)


async def test_errors_reach_the_one_who_waits(pair: tuple[AgentSession, FakeAgent]) -> None:
    session, fake = pair
    channel, number = await _opened(session, fake)
    sending = asyncio.create_task(channel.send(bytes(2 * INITIAL_WINDOW)))
    await fake.expect(FrameType.DATA)
    await fake.send(
        encode_frame(FrameType.DATA, number, b"before"),
        encode_frame(FrameType.ERROR, number, struct.pack("<I", errno.ECONNRESET) + b"reset"),
    )
    with pytest.raises(AgentError, match="reset"):
        await sending
    assert await channel.receive() == Data(0, b"before")
    with pytest.raises(AgentError) as caught:
        await channel.receive()
    assert caught.value.errno == errno.ECONNRESET


async def test_values_from_the_guest_are_checked(pair: tuple[AgentSession, FakeAgent]) -> None:
    session, fake = pair
    agent = Agent(session)
    hostile: list[list[tuple[Tag, FieldValue]]] = [
        [(Tag.PROTOCOL, "sctp"), (Tag.ADDRESS, "127.0.0.1"), (Tag.PORT, 1)],
        [(Tag.PROTOCOL, "tcp"), (Tag.ADDRESS, "\x1b[2J"), (Tag.PORT, 1)],
        [(Tag.PROTOCOL, "tcp"), (Tag.ADDRESS, "127.0.0.1"), (Tag.PORT, 65536)],
    ]
    for listener in hostile:
        asking = asyncio.create_task(agent.ports())
        number = (await fake.expect(FrameType.OPEN)).channel
        await fake.send(encode_frame(FrameType.REPLY, number, encode_fields([(Tag.LISTENER, listener)])))
        with pytest.raises(ProtocolError):
            await asking
    asking = asyncio.create_task(agent.ports())
    number = (await fake.expect(FrameType.OPEN)).channel
    listener = [(Tag.PROTOCOL, "tcp"), (Tag.ADDRESS, "::1"), (Tag.PORT, 80), (Tag.NAME, b"\x1b[2Jsh\xff\n")]
    await fake.send(encode_frame(FrameType.REPLY, number, encode_fields([(Tag.LISTENER, listener)])))
    (found,) = await asking
    assert found.process == "\\x1b[2Jsh\\udcff\\n"
    assert session.reason == ""


async def test_a_request_that_does_not_fit_is_refused_here(pair: tuple[AgentSession, FakeAgent]) -> None:
    with pytest.raises(AgentError) as caught:
        await Agent(pair[0]).exec(ExecRequest(("x" * MAX_REQUEST,)))
    assert caught.value.errno == errno.E2BIG


async def test_a_long_request_goes_in_parts(pair: tuple[AgentSession, FakeAgent]) -> None:
    session, fake = pair
    words = ("x" * 100_000, "y" * MAX_PAYLOAD, "")
    asking = asyncio.create_task(Agent(session).spawn(ExecRequest(words)))
    payload = b""
    while (frame := await fake.receive()).type is FrameType.PART:
        payload += frame.payload
    assert frame.type is FrameType.OPEN
    payload += frame.payload
    assert Fields(payload[2:]).strings(Tag.ARG) == list(words)
    await fake.send(encode_frame(FrameType.REPLY, frame.channel, encode_fields([(Tag.PID, 7)])))
    assert await asking == 7


async def test_what_an_old_agent_cannot_take_is_told_with_the_fix(ends: tuple[socket.socket, socket.socket]) -> None:
    long = GuestConfig(environment={"A": "x", "BIG": "x" * 40_000})
    many = GuestConfig(environment={f"V{number}": "x" for number in range(1025)})
    async with _connected(ends, version=1) as (session, fake):
        agent = Agent(session)
        with pytest.raises(BangerError, match="older banger") as caught, guest_errors("cannot", argv=["x"]):
            await agent.exec(ExecRequest(("x" * MAX_PAYLOAD,)))
        assert (caught.value.code, caught.value.hint[:20]) == (Code.CANNOT_EXECUTE, "create the VM anew t")
        for config, said in ((long, "'BIG' has 40,004 bytes"), (many, "too many variables")):
            with pytest.raises(BangerError, match=said) as caught, guest_errors("cannot"):
                await agent.configure(config)
            assert "--unset-env" in caught.value.hint
        asking = asyncio.create_task(agent.spawn(ExecRequest(("x" * (MAX_PAYLOAD - 100),))))
        number = (await fake.expect(FrameType.OPEN)).channel
        await fake.send(encode_frame(FrameType.REPLY, number, encode_fields([(Tag.PID, 7)])))
        assert await asking == 7
