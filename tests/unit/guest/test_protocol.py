"""Frames and fields, and that the constants here are those of agent/protocol.h."""

import re
import zlib
from enum import IntEnum, IntFlag
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from banger.guest import protocol
from banger.guest.protocol import (
    MAX_FRAME,
    MAX_PAYLOAD,
    NONCE_SIZE,
    Fields,
    FieldValue,
    Frame,
    FrameParser,
    FrameType,
    ProtocolError,
    Tag,
    decode_hello,
    encode_fields,
    encode_frame,
    encode_hello,
)

_HEADER = Path(__file__).parents[3] / "agent/protocol.h"
_NONCE = bytes(range(NONCE_SIZE))

frames = st.builds(
    Frame,
    st.sampled_from(FrameType),
    st.integers(0, 1),
    st.integers(0, (1 << 32) - 1),
    st.binary(max_size=300),
)


def _encode(frame: Frame) -> bytes:
    return encode_frame(frame.type, frame.channel, frame.payload, frame.stream)


def _header_enums() -> dict[str, int]:
    """Every constant of every enum in protocol.h."""
    text = re.sub(r"/\*.*?\*/", "", _HEADER.read_text(), flags=re.DOTALL)
    values: dict[str, int] = {}
    for body in re.findall(r"enum\s*\w*\s*\{(.*?)\}", text, flags=re.DOTALL):
        for name, expression in re.findall(r"(\w+)\s*=\s*([^,}]+)", body):
            values[name] = eval(expression, {}, dict(values))
    return values


def test_texts_are_those_of_the_header() -> None:
    texts = dict(re.findall(r'^#define (\w+) "(.*)"$', _HEADER.read_text(), flags=re.MULTILINE))
    assert texts == {name: getattr(protocol, name) for name in ("AGENT_PORT", "LOG_PORT", "POWER_OFF_NOTICE")}


def test_constants_are_those_of_the_header() -> None:
    groups: dict[str, type[IntEnum] | type[IntFlag]] = {
        "FRAME_": FrameType,
        "STREAM_": protocol.Stream,
        "OPEN_": protocol.OpenKind,
        "CALL_": protocol.OpenKind,
        "TAG_": Tag,
        "ROLE_": protocol.DiskRole,
        "STATE_": protocol.GuestState,
        "INIT_": protocol.InitMode,
        "EXEC_": protocol.ExecFlags,
        "TREE_": protocol.TreeFlags,
    }
    here: dict[str, int] = {}
    there = _header_enums()
    for name in there:
        prefix, _, member = name.partition("_")
        group = groups.get(f"{prefix}_")
        here[name] = group[member] if group is not None else getattr(protocol, name)
    assert here == there
    members = sum(len(group.__members__) for group in set(groups.values()))
    assert members == len([name for name in there if f"{name.partition('_')[0]}_" in groups])


def test_a_frame_has_the_documented_layout() -> None:
    encoded = encode_frame(FrameType.DATA, 0x01020304, b"payload", stream=1)
    head = b"BG\x05\x01\x04\x03\x02\x01\x07\x00\x00\x00"
    check = (zlib.crc32(head) | 1).to_bytes(4, "little")
    assert encoded == head + check + b"payload" + check


def test_the_header_of_a_hello_is_constant() -> None:
    assert encode_hello(_NONCE, 1, 1)[:16] == encode_hello(bytes(16), 7, 9)[:16]


@given(st.lists(frames, max_size=8), st.lists(st.integers(0, 50), min_size=9), st.data())
def test_frames_survive_any_cut_and_any_zeros_between_them(
    sent: list[Frame], zeros: list[int], data: st.DataObject
) -> None:
    stream = b"".join(bytes(count) + _encode(frame) for count, frame in zip(zeros, sent, strict=False)) + bytes(
        zeros[-1]
    )
    cuts = sorted(data.draw(st.lists(st.integers(0, len(stream)), max_size=10)))
    parser = FrameParser()
    got: list[Frame] = []
    for start, end in zip([0, *cuts], [*cuts, len(stream)], strict=True):
        got += parser.feed(stream[start:end])
    assert got == sent


def test_many_large_frames_go_through_the_bounded_buffer() -> None:
    payload = bytes(range(256)) * 256
    sent = [Frame(FrameType.DATA, 0, number, payload[: MAX_PAYLOAD - number]) for number in range(40)]
    assert list(FrameParser().feed(b"".join(map(_encode, sent)))) == sent


@given(frames, st.data())
def test_a_damaged_header_or_trailer_is_noticed(frame: Frame, data: st.DataObject) -> None:
    encoded = bytearray(_encode(frame))
    places = [*range(1, 16), *range(len(encoded) - 4, len(encoded))]
    place = data.draw(st.sampled_from(places))
    encoded[place] ^= 1 << data.draw(st.integers(0, 7))
    with pytest.raises(ProtocolError):
        list(FrameParser().feed(bytes(encoded)))


def test_a_frame_completed_by_the_zeros_of_the_next_session_is_noticed() -> None:
    cut = _encode(Frame(FrameType.DATA, 0, 1, b"x" * MAX_PAYLOAD))[:1000]
    with pytest.raises(ProtocolError, match="cut off"):
        list(FrameParser().feed(cut + bytes(MAX_FRAME)))


def test_a_giant_length_is_refused_from_the_header_alone() -> None:
    head = b"BG\x05\x00\x01\x00\x00\x00" + (MAX_PAYLOAD + 1).to_bytes(4, "little")
    with pytest.raises(ProtocolError):
        list(FrameParser().feed(head + (zlib.crc32(head) | 1).to_bytes(4, "little")))
    with pytest.raises(ValueError, match="does not fit"):
        encode_frame(FrameType.DATA, 1, bytes(MAX_PAYLOAD + 1))


@given(st.binary(max_size=400), st.lists(frames, max_size=3), st.lists(st.integers(1, 60), max_size=20))
def test_everything_before_the_awaited_hello_is_discarded(garbage: bytes, stale: list[Frame], sizes: list[int]) -> None:
    other = encode_hello(bytes(reversed(_NONCE)), 1, 1)
    unfinished = encode_hello(_NONCE, 1, 1)[:40]
    end = _encode(Frame(FrameType.CLOSE, 0, 5, b""))
    stream = garbage + b"".join(map(_encode, stale)) + other + unfinished + encode_hello(_NONCE, 2, 3) + end
    parser = FrameParser(_NONCE)
    got: list[Frame] = []
    position = 0
    for size in [*sizes, len(stream)]:
        got += parser.feed(stream[position : position + size])
        position += size
    assert [frame.type for frame in got] == [FrameType.HELLO, FrameType.CLOSE]
    assert decode_hello(got[0].payload) == (_NONCE, 2, 3)


def test_a_megabyte_without_the_hello_is_discarded_in_bounded_memory() -> None:
    parser = FrameParser(_NONCE)
    junk = encode_hello(_NONCE, 1, 1)[:31] * 40_000
    assert list(parser.feed(junk)) == []
    assert len(parser.space()) >= MAX_FRAME


@given(
    st.lists(
        st.tuples(
            st.sampled_from(Tag),
            st.one_of(st.integers(0, (1 << 64) - 1), st.binary(max_size=50)),
        )
    )
)
def test_fields_round_trip(sent: list[tuple[Tag, int | bytes]]) -> None:
    fields = Fields(encode_fields(sent))
    for tag in Tag:
        values = [value for key, value in sent if key is tag]
        assert (tag in fields) == bool(values)
        if values and all(isinstance(value, int) for value in values):
            assert fields.numbers(tag) == values


def test_fields_nest_and_keep_undecodable_text() -> None:
    disk: list[tuple[Tag, FieldValue]] = [(Tag.SERIAL, "root"), (Tag.READONLY, 1)]
    fields = Fields(encode_fields([(Tag.DISK, disk), (Tag.PATH, "/caf\udce9"), (Tag.DISK, disk)]))
    assert fields.string(Tag.PATH).encode("utf-8", "surrogateescape") == b"/caf\xe9"
    assert [nested.number(Tag.READONLY) for nested in fields.nested(Tag.DISK)] == [1, 1]


@pytest.mark.parametrize("data", [b"\x01", b"\x01\x00\xff\xff\xff\xff", b"\x01\x00\x02\x00\x00\x00x"])
def test_fields_that_do_not_fit_are_refused(data: bytes) -> None:
    with pytest.raises(ProtocolError):
        Fields(data)


def test_accessors_check_what_they_return() -> None:
    fields = Fields(
        encode_fields([(Tag.PID, b"\x01"), (Tag.PATH, b"a\0b"), (Tag.UID, 70000), (Tag.ARG, "a"), (Tag.ARG, "b")])
    )
    assert fields.strings(Tag.ARG) == ["a", "b"]
    for read in (
        lambda: fields.number(Tag.PID),
        lambda: fields.string(Tag.PATH),
        lambda: fields.number(Tag.UID, limit=65535),
        lambda: fields.string(Tag.ARG),
        lambda: fields.number(Tag.GID),
    ):
        with pytest.raises(ProtocolError):
            read()


@pytest.mark.parametrize("value", ["a\0b", -1, 1 << 64])
def test_values_that_no_field_can_hold_are_refused(value: int | str) -> None:
    with pytest.raises(ValueError, match=r"contains a NUL|does not fit"):
        encode_fields([(Tag.ARG, value)])
