"""JSON to and from the dataclasses of the API, strictly, with nothing but the standard library."""

from __future__ import annotations

import dataclasses
import functools
import json
import types
import typing
from collections.abc import Callable, Hashable
from typing import TypeVar

from banger.api.errors import BangerError, Code

Json = None | bool | int | float | str | list["Json"] | dict[str, "Json"]
T = TypeVar("T")
_SCALARS = (bool, int, float, str)
_SAID: dict[object, str] = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}
_PLAIN = frozenset((*_SCALARS, type(None)))  # and no enumerations, which are strings too


def encode(value: object) -> Json:
    """A dataclass (or a list, tuple, dictionary or scalar of them) as JSON values."""
    # what there is most of comes first: lists of a thousand VMs are encoded by every `vm list`
    if value is None or isinstance(value, _SCALARS):
        return value
    if isinstance(value, list | tuple):
        return [encode(item) for item in value] if value else []
    if isinstance(value, dict):
        return {str(key): encode(item) for key, item in value.items()}
    if dataclasses.is_dataclass(value):
        encoded: dict[str, Json] = {}
        for name in _names(typing.cast(Hashable, type(value))):
            item = getattr(value, name)
            encoded[name] = item if type(item) in _PLAIN else encode(item)
        return encoded
    raise TypeError(f"{type(value).__name__} has no JSON form")


def decode(kind: type[T], value: Json) -> T:
    """JSON values as a dataclass. Unknown keys are ignored, so that a newer peer may add some.

    Raises ValueError naming the key that is missing or of the wrong type.
    """
    try:
        return typing.cast(T, _decoder(typing.cast(Hashable, kind))(value))
    except _WrongError as error:
        raise ValueError(f"{kind.__name__}{''.join(reversed(error.path))}: {error}") from None


def decode_error(value: Json) -> BangerError:
    """The error in an `error` reply; a code that this version does not know counts as `daemon`."""
    if not isinstance(value, dict):
        return BangerError(Code.DAEMON, "the daemon sent an error without content")
    code, message, hint, details = (value.get(key) for key in ("code", "message", "hint", "details"))
    known = Code(code) if isinstance(code, str) and code in set(Code) else Code.DAEMON
    texts = {key: str(text) for key, text in details.items()} if isinstance(details, dict) else {}
    return BangerError(known, str(message), str(hint or ""), texts)


def encode_error(error: BangerError) -> dict[str, Json]:
    """The JSON shape of every error: code, message, hint, details."""
    details: dict[str, Json] = dict(error.details)
    return {"code": str(error.code), "message": error.message, "hint": error.hint, "details": details}


@functools.cache
def _names(kind: object) -> tuple[str, ...]:
    assert dataclasses.is_dataclass(kind)
    assert isinstance(kind, type)
    return tuple(entry.name for entry in dataclasses.fields(kind))


class _WrongError(ValueError):
    """A value that does not fit; `path` leads to it from the inside out."""

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.path: list[str] = []


_Decoder = Callable[[Json], object]


@functools.cache
def _decoder(kind: object) -> _Decoder:
    """What decodes values of one type. Made once for each: lists of a thousand VMs are decoded by every `vm list`."""
    if dataclasses.is_dataclass(kind) and isinstance(kind, type):
        return _object_decoder(kind)
    origin, parameters = typing.get_origin(kind), typing.get_args(kind)
    if origin in (list, tuple):
        return _list_decoder(origin, _decoder(parameters[0]))
    if origin is dict:
        return _dict_decoder(_decoder(parameters[1]))
    if origin in (types.UnionType, typing.Union):
        present = _decoder(next(parameter for parameter in parameters if parameter is not type(None)))
        if type(None) in parameters:
            return lambda value: None if value is None else present(value)
        return present
    return _scalar_decoder(kind)


def _object_decoder(kind: type[object]) -> _Decoder:
    assert dataclasses.is_dataclass(kind)
    hints = typing.get_type_hints(kind)
    missing = dataclasses.MISSING
    fields = [
        (entry.name, _decoder(hints[entry.name]), entry.default is missing and entry.default_factory is missing)
        for entry in dataclasses.fields(kind)
    ]

    def decode_object(value: Json) -> object:
        if not isinstance(value, dict):
            raise _WrongError("expected an object")
        arguments: dict[str, object] = {}
        name = ""
        try:
            for name, decode_field, required in fields:
                if name in value:
                    arguments[name] = decode_field(value[name])
                elif required:
                    raise _WrongError("missing")
        except _WrongError as error:
            error.path.append(f".{name}")
            raise
        return kind(**arguments)

    return decode_object


def _list_decoder(origin: object, decode_item: _Decoder) -> _Decoder:
    def decode_list(value: Json) -> object:
        if not isinstance(value, list):
            raise _WrongError("expected a list")
        items: list[object] = []
        try:
            for item in value:
                items.append(decode_item(item))  # how many went well says which did not
        except _WrongError as error:
            error.path.append(f"[{len(items)}]")
            raise
        return items if origin is list else tuple(items)

    return decode_list


def _dict_decoder(decode_item: _Decoder) -> _Decoder:
    def decode_dict(value: Json) -> object:
        if not isinstance(value, dict):
            raise _WrongError("expected an object")
        items: dict[str, object] = {}
        key = ""
        try:
            for key, item in value.items():
                items[key] = decode_item(item)
        except _WrongError as error:
            error.path.append(f".{key}")
            raise
        return items

    return decode_dict


def _scalar_decoder(kind: object) -> _Decoder:
    def decode_scalar(value: Json) -> object:
        if type(value) is kind or kind is object:
            return value
        if kind is float and type(value) is int:
            return float(value)
        if isinstance(kind, type) and isinstance(value, kind) and (kind is bool or not isinstance(value, bool)):
            return value
        raise _WrongError(f"expected {_SAID.get(kind, 'a word')}, got {json.dumps(value)[:100]}")

    return decode_scalar
