"""The real agent against hosts that break rules, vanish in mid-frame and come back, frame by frame."""

import asyncio
import errno
import random
import signal
import socket
import struct
import zlib

import pytest

from banger.guest.agent import Agent, ExecRequest
from banger.guest.protocol import (
    GUEST_CHANNELS,
    INITIAL_WINDOW,
    MAX_CHANNELS,
    MAX_PAYLOAD,
    MAX_REQUEST,
    PROTOCOL_VERSION,
    FrameType,
    OpenKind,
    Tag,
    encode_fields,
    encode_frame,
    encode_hello,
)
from banger.guest.session import AgentSession
from banger.system import connect_unix
from tests.process.agents import TIMEOUT, AgentProcess, Fifo, RawHost, reports_signal, run

SEED = 20_240_601
_CAT = encode_fields([(Tag.ARG, "cat")])
_ZEROS = ExecRequest(("cat", "/dev/zero"))


def _error(payload: bytes) -> int:
    return int(struct.unpack_from("<I", payload)[0])


def _assert_healthy(host: RawHost) -> None:
    assert host.greet() == (PROTOCOL_VERSION, PROTOCOL_VERSION)
    host.open(1, OpenKind.HEALTH)
    reply = host.receive()
    assert (reply.type, reply.channel) == (FrameType.REPLY, 1)


@pytest.mark.parametrize(
    ("offered", "answered"),
    [
        ((1, 1), (1, 1)),
        ((1, 2), (2, 2)),
        ((2, 2), (2, 2)),
        ((0, 9), (2, 2)),
        ((2, 9), (2, 2)),
        ((3, 9), (0, 0)),
        ((0, 0), (0, 0)),
        ((9, 1), (0, 0)),
    ],
)
def test_versions(process: AgentProcess, offered: tuple[int, int], answered: tuple[int, int]) -> None:
    with RawHost(process.socket) as host:
        assert host.greet(*offered) == answered
        if answered == (0, 0):
            host.open(1, OpenKind.HEALTH)
        _assert_healthy(host)


def test_nothing_is_answered_before_a_hello(process: AgentProcess) -> None:
    with RawHost(process.socket) as host:
        host.open(1, OpenKind.HEALTH)
        _assert_healthy(host)
        assert host.silent()


def test_all_channels_and_one_too_many(process: AgentProcess) -> None:
    with RawHost(process.socket) as host:
        host.greet()
        for number in range(1, MAX_CHANNELS + 1):
            host.open(number, OpenKind.EXEC, _CAT)
        opened = {host.receive().channel for _ in range(MAX_CHANNELS)}
        assert opened == set(range(1, MAX_CHANNELS + 1))
        host.open(1000, OpenKind.WAIT)
        refusal = host.receive()
        assert (refusal.type, refusal.channel, _error(refusal.payload)) == (FrameType.ERROR, 1000, errno.EAGAIN)
        host.open(1000, OpenKind.HEALTH)
        assert host.receive().type is FrameType.REPLY
        host.send(encode_frame(FrameType.CLOSE, 77))
        assert host.receive()[:3] == (FrameType.CLOSE, 0, 77)
        host.open(77, OpenKind.WAIT)
        assert host.receive().type is FrameType.REPLY
        host.send(*(encode_frame(FrameType.DATA, number, b"%d" % number) for number in range(1, 77)))
        echoed = {frame.channel: frame.payload for frame in (host.receive() for _ in range(1, 77))}
        assert echoed == {number: b"%d" % number for number in range(1, 77)}


def test_the_agent_sends_no_more_than_was_granted(process: AgentProcess) -> None:
    with RawHost(process.socket) as host:
        host.greet()
        host.exec(1, _ZEROS)
        received = 0
        while received < INITIAL_WINDOW:
            received += len(host.receive().payload)
        assert received == INITIAL_WINDOW
        for grant in (1, 70_000):
            host.send(encode_frame(FrameType.WINDOW, 1, struct.pack("<I", grant)))
            while grant:
                grant -= len(host.receive().payload)
            assert grant == 0
        host.open(2, OpenKind.HEALTH)
        assert host.receive().channel == 2


def test_unknown_tags_and_late_frames_are_ignored(process: AgentProcess) -> None:
    with RawHost(process.socket) as host:
        host.greet()
        special = (FrameType.HELLO, FrameType.OPEN, FrameType.PART)
        late = [frame_type for frame_type in FrameType if frame_type not in special]
        host.send(*(encode_frame(frame_type, 5, b"late") for frame_type in late))
        host.open(6, OpenKind.HEALTH, struct.pack("<HI", 65000, 3) + b"new")
        assert host.receive()[:3] == (FrameType.REPLY, 0, 6)


def test_malformed_requests_are_refused(process: AgentProcess) -> None:
    number_of_three_bytes = struct.pack("<HI", Tag.FLAGS, 3) + b"abc"
    text_with_nul = encode_fields([(Tag.ARG, b"ls\0-l")])
    cut_off = encode_fields([(Tag.ARG, "ls")])[:-1]
    giant = struct.pack("<HI", Tag.ARG, 0xFFFFFFFF)
    with RawHost(process.socket) as host:
        host.greet()
        for fields in (number_of_three_bytes, text_with_nul, cut_off, giant, b"\1"):
            host.open(3, OpenKind.EXEC, fields)
            refusal = host.receive()
            assert (refusal.type, refusal.channel) == (FrameType.ERROR, 3)
            assert _error(refusal.payload) == errno.EINVAL
        host.open(GUEST_CHANNELS | 3, OpenKind.EXEC, _CAT)
        assert host.receive().type is FrameType.ERROR
        host.open(4, OpenKind.HEALTH)
        assert host.receive().type is FrameType.REPLY


def _with_header(channel: int, length: int, frame_type: int, check_error: int = 0) -> bytes:
    head = struct.pack("<2sBBII", b"BG", frame_type, 0, channel, length)
    return head + struct.pack("<I", (zlib.crc32(head) | 1) ^ check_error)


@pytest.mark.parametrize(
    "violation",
    [
        pytest.param(b"garbage of sixteen bytes or more", id="garbage"),
        pytest.param(_with_header(1, 0, FrameType.DATA, check_error=2), id="wrong check"),
        pytest.param(_with_header(1, MAX_PAYLOAD + 1, FrameType.DATA), id="giant frame"),
        pytest.param(_with_header(1, 0xFFFFFFFF, FrameType.DATA), id="length of all ones"),
        pytest.param(_with_header(1, 0, 13), id="unknown type"),
        pytest.param(encode_frame(FrameType.DATA, 1, b"x" * 100)[:-4] + bytes(4), id="wrong trailer"),
        pytest.param(encode_frame(FrameType.HELLO, 0, b"short"), id="short hello"),
        pytest.param(encode_frame(FrameType.DATA, 0, b"x"), id="data for the session"),
        pytest.param(encode_frame(FrameType.OPEN, 1, OpenKind.WAIT.to_bytes(2, "little")), id="id in use"),
        pytest.param(encode_frame(FrameType.OPEN, 2, b"\1"), id="open without a kind"),
        pytest.param(encode_frame(FrameType.REPLY, 1), id="reply from the host"),
        pytest.param(encode_frame(FrameType.EXIT, 1, bytes(8)), id="exit from the host"),
        pytest.param(encode_frame(FrameType.DATA, 1, b"x", stream=1), id="data on stderr"),
        pytest.param(encode_frame(FrameType.END, 1) * 2, id="second end"),
        pytest.param(encode_frame(FrameType.WINDOW, 1, b"abc"), id="short window"),
        pytest.param(encode_frame(FrameType.RESIZE, 1, b"abcde"), id="long resize"),
        pytest.param(encode_frame(FrameType.SIGNAL, 1), id="empty signal"),
        pytest.param(encode_frame(FrameType.PART, 0, b"x"), id="a part for the session"),
        pytest.param(encode_frame(FrameType.PART, 2) + encode_frame(FrameType.PART, 3), id="parts of two requests"),
        pytest.param(
            encode_frame(FrameType.PART, 2, b"\x12") + encode_frame(FrameType.OPEN, 3, b"\x12\0"), id="parts of another"
        ),
        pytest.param(
            encode_frame(FrameType.PART, 1, b"\x12") + encode_frame(FrameType.OPEN, 1, b"\0"),
            id="parts for an id in use",
        ),
        pytest.param(
            encode_frame(FrameType.PART, 2, b"\1") + encode_frame(FrameType.OPEN, 2), id="parts without a kind"
        ),
        pytest.param(
            encode_frame(FrameType.PART, 2, bytes(MAX_PAYLOAD)) * (MAX_REQUEST // MAX_PAYLOAD + 1), id="endless parts"
        ),
        # the command reads nothing: its pipe takes a megabyte and the window half of one
        pytest.param(encode_frame(FrameType.DATA, 1, bytes(MAX_PAYLOAD)) * 64, id="credit overrun"),
    ],
)
@pytest.mark.anyio
async def test_a_broken_rule_ends_the_session_and_not_the_agent(
    process: AgentProcess, fifo: Fifo, violation: bytes
) -> None:
    with RawHost(process.socket) as host:
        host.greet()
        host.exec(1, reports_signal(signal.SIGHUP, fifo))
        assert host.receive().payload == b"ready\n"
        host.send(violation)
        assert await fifo.line() == "SIGHUP"
        host.open(1, OpenKind.HEALTH)
        _assert_healthy(host)
        host.open(1, OpenKind.WAIT)
        assert host.receive()[:3] == (FrameType.REPLY, 0, 1)
        assert host.silent()


def test_a_request_in_parts_of_any_size(process: AgentProcess) -> None:
    whole = OpenKind.EXEC.to_bytes(2, "little") + encode_fields([(Tag.ARG, "echo"), (Tag.ARG, "x" * 300)])
    with RawHost(process.socket) as host:
        host.greet()
        for number, step in enumerate((1, 2, 7, 100, len(whole)), 1):
            pieces = [whole[start : start + step] for start in range(0, len(whole), step)]
            host.send(*(encode_frame(FrameType.PART, number, piece) for piece in pieces[:-1]))
            host.send(encode_frame(FrameType.OPEN, number, pieces[-1]))
            assert host.receive()[:3] == (FrameType.REPLY, 0, number)
            assert host.receive().payload == b"x" * 300 + b"\n"
            while host.receive().type is not FrameType.CLOSE:
                pass


def test_a_session_of_the_first_version_has_no_parts(process: AgentProcess) -> None:
    with RawHost(process.socket) as host:
        assert host.greet(1, 1) == (1, 1)
        host.send(encode_frame(FrameType.PART, 1, b"\x12"))
        host.open(1, OpenKind.HEALTH)
        _assert_healthy(host)


def test_the_parts_of_an_ended_session_are_forgotten(process: AgentProcess) -> None:
    with RawHost(process.socket) as host:
        for _ in range(3):
            host.greet()
            host.send(*(encode_frame(FrameType.PART, 1, bytes(MAX_PAYLOAD)) for _ in range(60)))
            _assert_healthy(host)


@pytest.mark.parametrize("round", range(5))
def test_random_bytes_never_hurt(process: AgentProcess, round: int) -> None:
    randomness = random.Random(SEED + round)
    pieces = [
        encode_frame(FrameType.OPEN, 1, OpenKind.EXEC.to_bytes(2, "little") + _CAT),
        encode_frame(FrameType.DATA, 1, randomness.randbytes(3000)),
        encode_frame(FrameType.OPEN, 2, OpenKind.STAT.to_bytes(2, "little") + encode_fields([(Tag.PATH, "/etc")])),
        encode_frame(FrameType.END, 1),
        encode_hello(randomness.randbytes(16), 1, 1),
        bytes(500),
    ]
    with RawHost(process.socket) as host:
        host.greet()
        for _ in range(200):
            piece = bytearray(randomness.choice(pieces))
            for _ in range(randomness.choice((0, 0, 1, 5))):
                piece[randomness.randrange(len(piece))] = randomness.randrange(256)
            host.send(bytes(piece[: randomness.choice((len(piece), randomness.randrange(len(piece))))]))
        host.send(encode_hello(randomness.randbytes(16), 1, 1)[:16])
        _assert_healthy(host)


def _receive_exactly(connection: socket.socket, count: int) -> None:
    while count:
        count -= len(connection.recv(count))


@pytest.mark.anyio
async def test_hosts_that_vanish_in_mid_frame_without_a_hang_up(process: AgentProcess) -> None:
    """As on virtio-serial: the newcomer goes on in the middle of both directions of its predecessor's stream."""
    randomness = random.Random(SEED)
    unfinished = (
        encode_frame(FrameType.OPEN, 7, OpenKind.EXEC.to_bytes(2, "little") + _CAT)
        + encode_frame(FrameType.DATA, 7, randomness.randbytes(MAX_PAYLOAD))
        + encode_frame(FrameType.OPEN, 8, OpenKind.HEALTH.to_bytes(2, "little"))
        + encode_hello(randomness.randbytes(16), 1, 1)
    )
    with connect_unix(process.socket, TIMEOUT) as connection:
        for _ in range(60):
            with RawHost(connection.dup()) as host:
                host.greet()
                host.exec(1, _ZEROS)
                await asyncio.to_thread(_receive_exactly, host.socket, randomness.randrange(INITIAL_WINDOW // 2))
                host.send(unfinished[: randomness.randrange(len(unfinished) + 1)])
            session = await AgentSession.connect(connection.dup(), TIMEOUT)
            content = randomness.randbytes(100_000)
            assert (await run(Agent(session), "cat", input=content)).stdout == content
            await session.close()


@pytest.mark.anyio
async def test_hosts_that_hang_up_in_mid_frame(process: AgentProcess) -> None:
    randomness = random.Random(SEED)
    frames = encode_hello(bytes(16), 1, 1) + encode_frame(FrameType.OPEN, 7, OpenKind.EXEC.to_bytes(2, "little") + _CAT)
    frames += encode_frame(FrameType.DATA, 7, randomness.randbytes(5000))
    for cut in [*range(60), *(randomness.randrange(len(frames)) for _ in range(40))]:
        with connect_unix(process.socket) as connection:
            connection.sendall(frames[:cut])
        if cut % 10 == 0:
            async with process.connected() as agent:
                assert (await run(agent, "echo", "here")).stdout == b"here\n"
    async with process.connected() as agent:
        assert (await run(agent, "echo", "here")).stdout == b"here\n"


def test_a_host_that_never_reads_is_survived(process: AgentProcess) -> None:
    with RawHost(process.socket) as host:
        host.greet()
        for number in range(1, 60):
            host.open(number, OpenKind.EXEC, encode_fields([(Tag.ARG, word) for word in _ZEROS.argv]))
        ask = encode_frame(FrameType.OPEN, 1000, OpenKind.HEALTH.to_bytes(2, "little"))
        host.socket.settimeout(0.2)
        with pytest.raises(TimeoutError):  # the agent stops reading once its output is full
            _send_forever(host, ask * 1000)
    with RawHost(process.socket) as host:
        _assert_healthy(host)


def _send_forever(host: RawHost, data: bytes) -> None:
    while True:
        host.send(data)
