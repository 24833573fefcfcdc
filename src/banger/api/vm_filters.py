"""Picking VMs by what they are: `state=running`, `label=tier=web`, `name=web-*`."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from banger.api.errors import BangerError, Code

VM_KEYS = ("state", "label", "image", "kernel", "name", "id", "driver", "restart")
VM_STATES = ("created", "starting", "running", "stopping", "stopped", "restarting", "removing", "broken")
EVENT_KEYS = ("kind", "label", "image", "name", "id")


class _Labelled(Protocol):
    """A VM or one of its events."""

    @property
    def labels(self) -> Mapping[str, str]: ...


@dataclass(frozen=True)
class Filter:
    """One condition; `negated` turns it round."""

    key: str
    value: str
    negated: bool


def parse_filters(texts: Iterable[str], keys: Sequence[str]) -> list[Filter]:
    """The conditions KEY=VALUE and KEY!=VALUE with these keys; raises BangerError(INVALID) naming what is none."""
    filters = []
    for text in texts:
        key, equals, value = text.partition("=")
        negated = key.endswith("!")
        key = key.removesuffix("!")
        if not equals or key not in keys or not value:
            raise BangerError(
                Code.INVALID,
                f"{text!r} is not a filter",
                hint=f"write KEY=VALUE or KEY!=VALUE with one of {', '.join(keys)}; values may hold * and ?",
            )
        if key == "state" and not fnmatch.filter(VM_STATES, value):
            raise BangerError(
                Code.INVALID, f"{text!r}: {value!r} is no state of a VM", hint=f"there are {', '.join(VM_STATES)}"
            )
        filters.append(Filter(key, value, negated))
    return filters


def matches(subject: _Labelled, filters: Sequence[Filter]) -> bool:
    """Whether a VM or an event meets all conditions; of several with one key (but labels) any one is enough.

    A condition that is negated has to be met by itself. `label=NAME` asks for a label of any value.
    """
    wanted: dict[str, list[bool]] = {}
    for condition in filters:
        met = _meets(subject, condition)
        if condition.negated:
            if met:
                return False
        elif condition.key == "label":
            if not met:
                return False
        else:
            wanted.setdefault(condition.key, []).append(met)
    return all(any(met) for met in wanted.values())


def _meets(subject: _Labelled, condition: Filter) -> bool:
    if condition.key == "label":
        name, equals, value = condition.value.partition("=")
        if name not in subject.labels:
            return False
        return not equals or fnmatch.fnmatchcase(subject.labels[name], value)
    field = str(getattr(subject, condition.key))
    return field.startswith(condition.value) if condition.key == "id" else fnmatch.fnmatchcase(field, condition.value)
