"""What the models of all operations are made of."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, cast, dataclass_transform

_completing = threading.RLock()


class _Deferred(type):
    """A class that becomes a dataclass when somebody makes one, or asks for its fields.

    To generate the constructors of all of them would cost each start of the command line, which needs a few, a sixth of
    its time.
    """

    _deferred: bool

    def __getattr__(cls, name: str) -> object:
        if name.startswith("__dataclass_") and cls._complete():
            return getattr(cls, name)
        raise AttributeError(f"type object {cls.__name__!r} has no attribute {name!r}")

    def _complete(cls) -> bool:
        """Whether it is a dataclass."""
        with _completing:
            if cls.__dict__.get("_deferred", False):
                cls._deferred = False
                dataclass(cast("type[object]", cls), eq=False, repr=False)
        return "__dataclass_fields__" in cls.__dict__


@dataclass_transform(frozen_default=True, field_specifiers=(field,))
class Model(metaclass=_Deferred):
    """What makes its subclasses dataclasses: they count as frozen, which the type checker sees to.

    Only their constructors are generated.
    """

    def __init_subclass__(cls) -> None:
        cls._deferred = True
        if cls.__bases__ != (Model,):  # it would be taken for the one that it extends
            cls._complete()

    if not TYPE_CHECKING:

        def __init__(self, *arguments: object, **named: object) -> None:
            type(self)._complete()  # which gives the class an `__init__` of its own
            type(self).__init__(self, *arguments, **named)

    def __eq__(self, other: object) -> bool:
        return type(other) is type(self) and vars(other) == vars(self)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{name}={value!r}' for name, value in vars(self).items())})"


def complete_models() -> None:
    """Make all of them dataclasses now, for whoever looks into classes by other ways than their attributes."""
    for model in Model.__subclasses__():
        model._complete()


class Empty(Model):
    """A request or response without content."""


class NameRequest(Model):
    name: str
