"""The API's JSON: what is encoded decodes to the same, and what is wrong is refused by name."""

import contextlib
import dataclasses
import json
import types
import typing

import pytest
from hypothesis import given
from hypothesis import strategies as st

from banger.api import models as m
from banger.api.codec import decode, decode_error, encode, encode_error
from banger.api.errors import BangerError, Code
from banger.api.operations import CALLS, STREAMS
from banger.job import Progress

_MODELS = {Progress}.union(
    *((call.request, call.response) for call in CALLS), *((stream.request, stream.response) for stream in STREAMS)
)
KINDS = sorted(_MODELS, key=lambda kind: kind.__name__)


def values(kind: object) -> st.SearchStrategy[object]:
    """Every value of an annotation that the models use."""
    if dataclasses.is_dataclass(kind) and isinstance(kind, type):
        hints = typing.get_type_hints(kind)
        return st.builds(kind, **{entry.name: values(hints[entry.name]) for entry in dataclasses.fields(kind)})
    origin, parameters = typing.get_origin(kind), typing.get_args(kind)
    if origin is list:
        return st.lists(values(parameters[0]), max_size=3)
    if origin is types.UnionType:
        return st.one_of(*map(values, parameters))
    if origin is dict:
        return st.dictionaries(values(parameters[0]), values(parameters[1]), max_size=3)
    if kind is float:
        return st.floats(allow_nan=False, allow_infinity=False)
    plain = {str: st.text(), int: st.integers(), bool: st.booleans(), type(None): st.none()}
    if kind is object:  # any JSON
        return st.recursive(
            st.one_of(*plain.values()), lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner)
        )
    assert isinstance(kind, type)
    return plain[kind]


@pytest.mark.parametrize("kind", KINDS)
@given(data=st.data())
def test_round_trip_through_json(kind: type[object], data: st.DataObject) -> None:
    value = data.draw(values(kind))
    assert decode(kind, json.loads(json.dumps(encode(value)))) == value


@pytest.mark.parametrize("kind", KINDS)
@given(
    value=st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    )
)
def test_anything_else_is_a_value_or_refused(kind: type[object], value: object) -> None:
    with contextlib.suppress(ValueError):
        assert isinstance(decode(kind, typing.cast(typing.Any, value)), kind)


@pytest.mark.parametrize(
    ("kind", "value", "message"),
    [
        (m.NameRequest, {}, "NameRequest.name: missing"),
        (m.NameRequest, {"name": 1}, "NameRequest.name: expected text, got 1"),
        (m.NameRequest, {"name": None}, "NameRequest.name: expected text, got null"),
        (m.NameRequest, [], "NameRequest: expected an object"),
        (m.Terminal, {"rows": True, "columns": 1}, "Terminal.rows: expected a whole number, got true"),
        (m.Terminal, {"rows": 1.5, "columns": 1}, "Terminal.rows: expected a whole number, got 1.5"),
        (m.VmRemoved, {"names": "a", "freed_bytes": 1}, "VmRemoved.names: expected a list"),
        (m.VmRemoved, {"names": ["a", 2], "freed_bytes": 1}, r"VmRemoved.names\[1\]: expected text, got 2"),
        (m.VmStop, {"vm": "a", "grace": "long"}, 'VmStop.grace: expected a number, got "long"'),
        (m.VmRun, {"create": {"vcpu": "2"}}, 'VmRun.create.vcpu: expected a whole number, got "2"'),
    ],
)
def test_the_wrong_key_is_named(kind: type[object], value: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        decode(kind, typing.cast(typing.Any, value))


def test_keys_of_a_newer_peer_are_ignored() -> None:
    assert decode(m.NameRequest, {"name": "a", "colour": "red"}) == m.NameRequest("a")


def test_whole_numbers_are_floats_too() -> None:
    assert decode(m.VmStop, {"vm": "a", "grace": 2}) == m.VmStop("a", 2.0)


@given(st.sampled_from(Code), st.text(), st.text(), st.dictionaries(st.text(), st.text(), max_size=3))
def test_errors_round_trip(code: Code, message: str, hint: str, details: dict[str, str]) -> None:
    error = decode_error(json.loads(json.dumps(encode_error(BangerError(code, message, hint, details)))))
    assert (error.code, error.message, error.hint, error.details) == (code, message, hint, details)


@pytest.mark.parametrize("value", [None, [], "x", {}, {"code": "from the future", "message": "m"}, {"code": 7}])
def test_an_error_that_makes_no_sense_blames_the_daemon(value: object) -> None:
    assert decode_error(typing.cast(typing.Any, value)).code is Code.DAEMON


def test_what_has_no_json_form_is_refused() -> None:
    with pytest.raises(TypeError, match="bytes"):
        encode(b"")
