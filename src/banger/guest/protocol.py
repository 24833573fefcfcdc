"""The guest protocol without I/O: constants, frames and fields (docs/guest-protocol.md, agent/protocol.h)."""

from __future__ import annotations

import re
import struct
import zlib
from collections.abc import Iterable, Iterator, Sequence
from enum import IntEnum, IntFlag
from typing import NamedTuple, TypeAlias

OLDEST_VERSION = 1
PROTOCOL_VERSION = 2
HEADER_SIZE = 16
TRAILER_SIZE = 4
MAX_FRAME = 65536
MAX_PAYLOAD = MAX_FRAME - HEADER_SIZE - TRAILER_SIZE
MAX_REQUEST = 4 << 20
HELLO_SIZE = 32
NONCE_SIZE = 16
INITIAL_WINDOW = 512 * 1024
MAX_CHANNELS = 256
AGENT_PORT, LOG_PORT = "banger.agent", "banger.log"
VSOCK_AGENT_PORT, VSOCK_LOG_PORT = 1024, 1025
POWER_OFF_NOTICE = "powering off by a reset"
GUEST_CHANNELS = 1 << 31  # ids from here on belong to channels that the guest opens


class FrameType(IntEnum):
    HELLO = 1
    OPEN = 2
    REPLY = 3
    ERROR = 4
    DATA = 5
    END = 6
    WINDOW = 7
    SIGNAL = 8
    RESIZE = 9
    EXIT = 10
    CLOSE = 11
    PART = 12


class Stream(IntEnum):
    MAIN = 0
    STDERR = 1


class OpenKind(IntEnum):
    EXEC = 1
    WRITE_TREE = 2
    READ_TREE = 3
    DIAL = 4
    WAIT = 5
    CONFIGURE = 16
    STAT = 17
    HEALTH = 18
    STATS = 19
    PORTS = 20
    CLOCK = 21
    RESEED = 22
    SHUTDOWN = 23
    GROW = 24
    PROCESSES = 25


class Tag(IntEnum):
    ARG = 1
    ENV = 2
    CWD = 3
    USER = 4
    TERMINAL = 5
    FLAGS = 6
    PID = 7
    PATH = 8
    ADDRESS = 9
    PORT = 10
    TIME = 11
    ENTROPY = 12
    MODE = 13
    GRACE = 14
    SIGNAL = 15

    HOSTNAME = 20
    INTERFACE = 21
    MAC = 22
    CIDR = 23
    GATEWAY = 24
    MTU = 25
    NAMESERVER = 26
    SEARCH = 27
    HOST = 28
    KEY = 29
    DISK = 30
    SERIAL = 31
    ROLE = 32
    FSTYPE = 33
    TARGET = 34
    READONLY = 35
    INIT = 36
    VOLUME = 37
    DIRECTORY = 38

    UID = 40
    GID = 41
    SIZE = 42
    MTIME = 43
    LINK = 44

    STATE = 50
    UPTIME = 51
    BOOT_ID = 52
    AGENT = 53
    EXITED = 54
    RELEASE = 55

    CPU_TOTAL = 60
    CPU_BUSY = 61
    CPUS = 62
    MEM_TOTAL = 63
    MEM_FREE = 64
    LOAD = 65
    FILESYSTEM = 66
    USED = 67
    NET = 68
    NAME = 69
    RECEIVED = 70
    SENT = 71
    BLOCK = 72
    READ = 73
    WRITTEN = 74
    PROCESSES = 75

    LISTENER = 80
    PROTOCOL = 81

    PROCESS = 84
    PARENT = 85
    CONDITION = 86
    RESIDENT = 87
    THREADS = 88
    STARTED = 89
    KERNEL = 90
    COMMAND = 91
    MORE = 92


class ExecFlags(IntFlag):
    DETACHED = 1
    LOG = 2
    MAIN = 4
    INIT = 8


class TreeFlags(IntFlag):
    FOLLOW = 1
    CONTENTS = 2


class DiskRole(IntEnum):
    IMAGE = 1
    OVERLAY = 2
    HOME = 3
    MODULES = 4
    OTHER = 5


class InitMode(IntEnum):
    """Who is PID 1: the agent, an init of the image, what the main command asks for, or that command in a namespace."""

    AGENT = 0
    IMAGE = 1
    AUTO = 2
    COMMAND = 3


class GuestState(IntEnum):
    WAITING = 0
    RUNNING = 1
    STOPPING = 2


class ProtocolError(Exception):
    """The peer sent something that the protocol does not allow."""


class Frame(NamedTuple):
    """One frame; `payload` is a copy that nothing else refers to."""

    type: FrameType
    stream: int
    channel: int
    payload: bytes


_HEAD = struct.Struct("<2sBBII")  # magic, type, stream, channel, length: what the check covers
_HEADER = struct.Struct("<2sBBIII")
_MAGIC = b"BG"
_TYPES = {int(frame_type): frame_type for frame_type in FrameType}
_HELLO = struct.Struct(f"<{NONCE_SIZE}sHH12x")
_BUFFER_SIZE = 8 * MAX_FRAME
_NOT_ZERO = re.compile(rb"[^\0]")


def encode_frame(frame_type: FrameType, channel: int, payload: bytes | memoryview = b"", stream: int = 0) -> bytes:
    """A whole frame with header and trailer; `payload` holds at most MAX_PAYLOAD bytes (ValueError)."""
    if len(payload) > MAX_PAYLOAD:
        raise ValueError(f"a payload of {len(payload)} bytes does not fit into a frame")
    head = _HEAD.pack(_MAGIC, frame_type, stream, channel, len(payload))
    check = (zlib.crc32(head) | 1).to_bytes(4, "little")
    return b"".join((head, check, payload, check))


def encode_hello(nonce: bytes, oldest: int, newest: int) -> bytes:
    """A HELLO frame with the range of protocol versions that its sender speaks."""
    return encode_frame(FrameType.HELLO, 0, _HELLO.pack(nonce, oldest, newest))


def decode_hello(payload: bytes) -> tuple[bytes, int, int]:
    """Nonce, oldest and newest version of a HELLO."""
    if len(payload) != HELLO_SIZE:
        raise ProtocolError(f"a HELLO of {len(payload)} bytes")
    nonce, oldest, newest = _HELLO.unpack(payload)
    return nonce, oldest, newest


class FrameParser:
    """Takes frames out of a byte stream; holds no more than `_BUFFER_SIZE` bytes, whatever the peer sends.

    With a nonce it first discards everything up to the HELLO that carries it. A caller that reads from a socket puts
    the bytes into `space()` and tells how many there were with `received`; `feed` does the same for bytes in hand.
    """

    def __init__(self, nonce: bytes | None = None) -> None:
        hello = encode_hello(nonce or bytes(NONCE_SIZE), 0, 0)
        # header and nonce are known, so finding the HELLO is a search for a constant
        self._awaited = hello[: HEADER_SIZE + NONCE_SIZE] if nonce is not None else b""
        self._hello_trailer = hello[-TRAILER_SIZE:]
        self._buffer = bytearray(_BUFFER_SIZE)
        self._view = memoryview(self._buffer)
        self._start = 0
        self._end = 0

    def space(self) -> memoryview:
        """Where the next bytes of the stream belong; at least MAX_FRAME bytes."""
        if self._start == self._end:
            self._start = self._end = 0
        elif _BUFFER_SIZE - self._end < 2 * MAX_FRAME:
            kept = self._end - self._start
            self._view[:kept] = self._view[self._start : self._end]
            self._start, self._end = 0, kept
        return self._view[self._end :]

    def received(self, count: int) -> Iterator[Frame]:
        """The frames that are complete now that `count` more bytes lie in `space()`. Raises ProtocolError."""
        self._end += count
        if self._awaited:
            if (hello := self._find_hello()) is None:
                return
            yield hello
        while (frame := self._next_frame()) is not None:
            yield frame

    def feed(self, data: bytes | memoryview) -> Iterator[Frame]:
        """The frames that are complete with `data`. Raises ProtocolError."""
        rest = memoryview(data)
        while rest:
            space = self.space()
            count = min(len(space), len(rest))
            space[:count] = rest[:count]
            rest = rest[count:]
            yield from self.received(count)

    def _find_hello(self) -> Frame | None:
        size = HEADER_SIZE + HELLO_SIZE + TRAILER_SIZE
        while True:
            found = self._buffer.find(self._awaited, self._start, self._end)
            if found < 0:
                self._start = max(self._start, self._end - len(self._awaited) + 1)
                return None
            self._start = found
            if self._end - found < size:
                return None
            if self._buffer[found + size - TRAILER_SIZE : found + size] == self._hello_trailer:
                break
            self._start = found + 1
        self._awaited = b""
        return self._next_frame()

    def _next_frame(self) -> Frame | None:
        start = self._start
        if start < self._end and self._buffer[start] == 0:
            found = _NOT_ZERO.search(self._buffer, start, self._end)
            self._start = start = self._end if found is None else found.start()
        if self._end - start < HEADER_SIZE:
            return None
        magic, number, stream, channel, length, check = _HEADER.unpack_from(self._buffer, start)
        frame_type = _TYPES.get(number)
        covered = self._view[start : start + _HEAD.size]
        if magic != _MAGIC or frame_type is None or length > MAX_PAYLOAD or check != zlib.crc32(covered) | 1:
            raise ProtocolError(f"a frame header that is not one: {bytes(self._view[start : start + HEADER_SIZE])!r}")
        payload = start + HEADER_SIZE
        trailer = payload + length
        if self._end < trailer + TRAILER_SIZE:
            return None
        if int.from_bytes(self._view[trailer : trailer + TRAILER_SIZE], "little") != check:
            raise ProtocolError(f"a {frame_type.name} frame that was cut off")
        self._start = trailer + TRAILER_SIZE
        return Frame(frame_type, stream, channel, bytes(self._view[payload:trailer]))


FieldValue: TypeAlias = "int | str | bytes | Sequence[tuple[Tag, FieldValue]]"
FieldList: TypeAlias = Iterable[tuple[Tag, FieldValue]]

_FIELD = struct.Struct("<HI")


def encode_fields(fields: FieldList) -> bytes:
    """Fields as they stand in OPEN and REPLY: numbers as u64, text in UTF-8, sequences nested.

    Text may hold undecodable bytes as surrogates (PEP 383). Raises ValueError for a NUL in a text and for a number
    that is not a u64.
    """
    parts: list[bytes] = []
    for tag, value in fields:
        if isinstance(value, int):
            if not 0 <= value < 1 << 64:
                raise ValueError(f"{value} does not fit into 64 bits")
            data = value.to_bytes(8, "little")
        elif isinstance(value, str):
            data = value.encode("utf-8", "surrogateescape")
            if b"\0" in data:
                raise ValueError(f"{value!r} contains a NUL character")
        elif isinstance(value, bytes):
            data = value
        else:
            data = encode_fields(value)
        parts += (_FIELD.pack(tag, len(data)), data)
    return b"".join(parts)


class Fields:
    """Decoded fields; every accessor checks the form of what it returns and raises ProtocolError."""

    def __init__(self, data: bytes) -> None:
        self._values: dict[int, list[bytes]] = {}
        position = 0
        while position < len(data):
            if len(data) - position < _FIELD.size:
                raise ProtocolError("fields that end within a field")
            tag, length = _FIELD.unpack_from(data, position)
            position += _FIELD.size
            if length > len(data) - position:
                raise ProtocolError(f"field {tag} is longer than the fields that hold it")
            self._values.setdefault(tag, []).append(data[position : position + length])
            position += length

    def __contains__(self, tag: Tag) -> bool:
        return int(tag) in self._values

    def number(self, tag: Tag, limit: int = (1 << 64) - 1) -> int:
        """The number in a field that must be there once, at most `limit`."""
        return _number(tag, self._only(tag), limit)

    def numbers(self, tag: Tag) -> list[int]:
        """The numbers in all fields of that tag."""
        return [_number(tag, value, (1 << 64) - 1) for value in self._values.get(tag, [])]

    def string(self, tag: Tag) -> str:
        """The text in a field that must be there once; bytes that are not UTF-8 become surrogates (PEP 383)."""
        return _text(tag, self._only(tag))

    def strings(self, tag: Tag) -> list[str]:
        """The texts in all fields of that tag."""
        return [_text(tag, value) for value in self._values.get(tag, [])]

    def nested(self, tag: Tag) -> list[Fields]:
        """The fields within each field of that tag."""
        return [Fields(value) for value in self._values.get(tag, [])]

    def _only(self, tag: Tag) -> bytes:
        values = self._values.get(tag, [])
        if len(values) != 1:
            raise ProtocolError(f"{len(values)} fields {tag.name} instead of one")
        return values[0]


def _number(tag: Tag, value: bytes, limit: int) -> int:
    number = int.from_bytes(value, "little")
    if len(value) != 8 or number > limit:
        raise ProtocolError(f"field {tag.name} holds no number up to {limit}")
    return number


def _text(tag: Tag, value: bytes) -> str:
    if b"\0" in value:
        raise ProtocolError(f"field {tag.name} holds a NUL")
    return value.decode("utf-8", "surrogateescape")
