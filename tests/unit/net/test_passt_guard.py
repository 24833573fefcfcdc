"""What the guard in front of an old passt lets through: everything but frames to the host itself."""

import contextlib
import socket
import struct
import threading
from collections.abc import Iterator, Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from banger.net.passt_guard import MOST, carry, is_for_the_host

TIMEOUT = 30.0
MACS = bytes(12)


def ipv4(address: str, size: int = 40) -> bytes:
    return MACS + b"\x08\0" + bytes(16) + socket.inet_aton(address) + bytes(size)


def ipv6(address: str) -> bytes:
    return MACS + b"\x86\xdd" + bytes(24) + socket.inet_pton(socket.AF_INET6, address) + bytes(40)


REFUSED = [
    *map(ipv4, ("127.0.0.1", "127.255.0.1", "0.0.0.0", "0.1.2.3")),
    *map(ipv6, ("::1", "::", "::ffff:127.0.0.1", "::127.0.0.1")),
]
ALLOWED = [
    *map(ipv4, ("10.0.2.2", "10.0.2.3", "192.0.2.1", "1.0.0.0", "126.0.0.1", "128.0.0.1", "255.255.255.255")),
    *map(ipv6, ("2001:db8::1", "fe80::1", "fd00::1", "ff02::1", "64:ff9b::1")),
    MACS + b"\x08\x06" + bytes(46),  # ARP
    b"",
    MACS + b"\x08\0",
    MACS + b"\x86\xdd\0",
]


def refused(frame: bytes) -> bool:
    return is_for_the_host(memoryview(frame), 0, len(frame))


@pytest.mark.parametrize("frame", REFUSED)
def test_frames_to_the_host_itself(frame: bytes) -> None:
    assert refused(frame)


@pytest.mark.parametrize("frame", ALLOWED)
def test_other_frames(frame: bytes) -> None:
    assert not refused(frame)


def stream(frames: Sequence[bytes]) -> bytes:
    return b"".join(struct.pack("!I", len(frame)) + frame for frame in frames)


@contextlib.contextmanager
def guard() -> Iterator[tuple[socket.socket, socket.socket]]:
    """The ends of a VMM and of passt with the guard between them, which is gone afterwards."""
    vmm, vmm_end = socket.socketpair()
    passt, passt_end = socket.socketpair()

    def work() -> None:
        with contextlib.suppress(OSError, ValueError), vmm_end, passt_end:
            carry(vmm_end, passt_end)

    thread = threading.Thread(target=work)
    thread.start()
    try:
        for end in (vmm, passt):
            end.settimeout(TIMEOUT)
        yield vmm, passt
    finally:
        vmm.close()
        passt.close()
        thread.join(TIMEOUT)
        assert not thread.is_alive()


def receive(end: socket.socket, size: int) -> bytes:
    received = b""
    while len(received) < size:
        data = end.recv(1 << 20)
        assert data
        received += data
    return received


FRAMES = st.lists(
    st.sampled_from(REFUSED + ALLOWED)
    | st.binary(max_size=200)
    | st.integers(34, MOST).map(lambda size: ipv4("192.0.2.1", size - 34)),
    max_size=8,
)


@settings(max_examples=60, deadline=None)
@given(FRAMES, FRAMES, st.integers(1, 100_000))
def test_streams_come_through_whole(out: list[bytes], back: list[bytes], piece: int) -> None:
    piece = max(piece, len(stream(out)) // 200)
    with guard() as (vmm, passt):

        def send() -> None:
            data = stream(out)
            for at in range(0, len(data), piece):
                vmm.sendall(data[at : at + piece])

        sender = threading.Thread(target=send)
        sender.start()
        answer = threading.Thread(target=passt.sendall, args=(stream(back),))
        answer.start()
        expected = stream([bytes(len(frame)) if refused(frame) else frame for frame in out])
        assert receive(passt, len(expected)) == expected
        assert receive(vmm, len(stream(back))) == stream(back)
        sender.join()
        answer.join()


def test_a_frame_that_is_too_long_ends_it() -> None:
    with guard() as (vmm, passt):
        vmm.sendall(struct.pack("!I", MOST + 1) + bytes(100))
        assert passt.recv(100) == b""


@pytest.mark.parametrize("closing", [0, 1])
def test_it_ends_with_either_end_even_when_nobody_reads(closing: int) -> None:
    with guard() as ends:
        for end in ends:
            end.setblocking(False)
            with contextlib.suppress(BlockingIOError):
                while True:
                    end.send(stream([ipv4("192.0.2.1", 1000)]) * 50)
        ends[closing].close()
