"""JSON to and from the dataclasses of the API, strictly, with nothing but the standard library."""

from __future__ import annotations

import dataclasses
import functools
import types
import typing
from typing import TypeVar

from banger.api.errors import BangerError, Code

Json = None | bool | int | float | str | list["Json"] | dict[str, "Json"]
T = TypeVar("T")


def encode(value: object) -> Json:
    """A dataclass (or a list, tuple, dictionary or scalar of them) as JSON values."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, list | tuple):
        return [encode(item) for item in value]
    if isinstance(value, dict):
        return {str(key): encode(item) for key, item in value.items()}
    if dataclasses.is_dataclass(value):
        return {entry.name: encode(getattr(value, entry.name)) for entry in dataclasses.fields(value)}
    raise TypeError(f"{type(value).__name__} has no JSON form")


def decode(kind: type[T], value: Json) -> T:
    """JSON values as a dataclass. Unknown keys are ignored, so that a newer peer may add some.

    Raises ValueError naming the key that is missing or of the wrong type.
    """
    return typing.cast(T, _decode(kind, value, kind.__name__))


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
def _hints(kind: type[object]) -> dict[str, object]:
    return typing.get_type_hints(kind)


def _decode(kind: object, value: Json, where: str) -> object:
    if dataclasses.is_dataclass(kind) and isinstance(kind, type):
        if not isinstance(value, dict):
            raise ValueError(f"{where}: expected an object")
        arguments: dict[str, object] = {}
        for entry in dataclasses.fields(kind):
            if entry.name in value:
                arguments[entry.name] = _decode(_hints(kind)[entry.name], value[entry.name], f"{where}.{entry.name}")
            elif entry.default is dataclasses.MISSING and entry.default_factory is dataclasses.MISSING:
                raise ValueError(f"{where}.{entry.name}: missing")
        return kind(**arguments)
    origin, parameters = typing.get_origin(kind), typing.get_args(kind)
    if origin in (list, tuple):
        if not isinstance(value, list):
            raise ValueError(f"{where}: expected a list")
        items = [_decode(parameters[0], item, f"{where}[{index}]") for index, item in enumerate(value)]
        return items if origin is list else tuple(items)
    if origin is dict:
        if not isinstance(value, dict):
            raise ValueError(f"{where}: expected an object")
        return {key: _decode(parameters[1], item, f"{where}.{key}") for key, item in value.items()}
    if origin in (types.UnionType, typing.Union):
        if value is None and type(None) in parameters:
            return None
        present = [parameter for parameter in parameters if parameter is not type(None)]
        return _decode(present[0], value, where)
    if kind is object:  # any JSON: what a document of another program's holds
        return value
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if isinstance(kind, type) and isinstance(value, kind) and (kind is bool or not isinstance(value, bool)):
        return value
    raise ValueError(f"{where}: expected {getattr(kind, '__name__', kind)}, got {value!r}")
