"""Stands between a VMM and a passt that would let the guest connect to the host itself: run as a script.

    passt_guard.py VMM_FD PASST_FD UID

Both are connected streams of frames, each after its length (u32, big-endian). It passes on all but what the guest sends
to addresses that mean the host itself, and ends when either end does. UID is the user to become when root, else -1.
"""

import contextlib
import ctypes
import os
import select
import socket
import struct
import sys

_LENGTH = struct.Struct("!I")
_ETHERNET = 14  # bytes of the header, of which the last two are the EtherType
_KIND = struct.Struct("!H")
_IPV4, _IPV6 = 0x0800, 0x86DD
# where a frame has its EtherType, and the destination's address in IPv4 and IPv6
_KIND_AT, _TO_4, _TO_6 = 12, 30, 38
MOST = 65536 + _ETHERNET + 4  # bytes of a frame: the largest packet, with a VLAN's tag
_BUFFER = 4 * MOST
_PR_SET_NO_NEW_PRIVS = 38


def is_for_the_host(data: memoryview, begin: int, end: int) -> bool:
    """Whether the frame there goes to 0.0.0.0/8, 127.0.0.0/8 or ::/64, in which are ::1 and IPv4 addresses mapped."""
    if end - begin <= _TO_4:
        return False
    (kind,) = _KIND.unpack_from(data, begin + _KIND_AT)
    if kind == _IPV4:
        return data[begin + _TO_4] in (0, 127)
    return kind == _IPV6 and data[begin + _TO_6 : begin + _TO_6 + 8] == bytes(8)


class Direction:
    """One way from an end to the other, with what has been read and not been sent yet."""

    def __init__(self, source: socket.socket, sink: socket.socket) -> None:
        self.source = source
        self.sink = sink
        self._buffer = bytearray(_BUFFER)
        self._view = memoryview(self._buffer)
        self._filled = 0  # bytes that were read
        self._ready = 0  # of these, what may be sent
        self._sent = 0

    @property
    def waiting(self) -> bool:
        """Whether something is ready and the other end has not taken it yet."""
        return self._sent < self._ready

    def move(self) -> bool:
        """Read when there is nothing left to send, and send as much as goes; False at the end of the stream."""
        if not self.waiting:
            self._begin()
            try:
                count = self.source.recv_into(self._view[self._filled :])
            except BlockingIOError:
                return True
            if count == 0:
                return False
            self._filled += count
            self._ready = self.allow(self._view[: self._filled])
        if self.waiting:
            with contextlib.suppress(BlockingIOError):
                self._sent += self.sink.send(self._view[self._sent : self._ready])
        return True

    def _begin(self) -> None:
        """Keep what is not whole yet at the beginning of the buffer."""
        rest = self._filled - self._ready
        self._buffer[:rest] = self._buffer[self._ready : self._filled]
        self._filled, self._ready, self._sent = rest, 0, 0

    def allow(self, data: memoryview) -> int:
        """How many of these bytes may be sent; all of them."""
        return len(data)


class FromGuest(Direction):
    """What the guest sends, without what it must not."""

    def allow(self, data: memoryview) -> int:
        """Those of whole frames. One that is refused becomes one of zeros, which has no meaning to anybody."""
        at, filled = 0, len(data)
        while at + _LENGTH.size <= filled:
            (length,) = _LENGTH.unpack_from(data, at)
            if length > MOST:
                raise ValueError(f"a frame of {length} bytes")
            begin = at + _LENGTH.size
            end = begin + length
            if end > filled:
                break
            if is_for_the_host(data, begin, end):
                data[begin:end] = bytes(length)
            at = end
        return at


def carry(vmm: socket.socket, passt: socket.socket) -> None:
    """Pass frames on until one end is closed. Raises OSError when it is broken, ValueError for what is no frame."""
    directions = (FromGuest(vmm, passt), Direction(passt, vmm))
    poll = select.poll()
    for end in (vmm, passt):
        end.setblocking(False)
        poll.register(end, 0)
    while True:
        wanted = {vmm: 0, passt: 0}
        for direction in directions:
            if direction.waiting:
                wanted[direction.sink] |= select.POLLOUT
            else:
                wanted[direction.source] |= select.POLLIN
        for end, events in wanted.items():
            poll.modify(end, events)
        happened = dict(poll.poll())
        if any(events & (select.POLLHUP | select.POLLERR) for events in happened.values()):
            return
        for direction in directions:
            end = direction.sink if direction.waiting else direction.source
            if end.fileno() in happened and not direction.move():
                return


def main() -> None:
    vmm, passt = (socket.socket(fileno=int(word)) for word in sys.argv[1:3])
    uid = int(sys.argv[3])
    if uid >= 0:
        os.setgroups([])
        os.setresgid(uid, uid, uid)
        os.setresuid(uid, uid, uid)
    ctypes.CDLL(None).prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    with contextlib.suppress(OSError, ValueError):
        carry(vmm, passt)


if __name__ == "__main__":
    main()
