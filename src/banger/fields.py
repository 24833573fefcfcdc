"""Typed reading of the JSON objects that catalogs are made of."""

from __future__ import annotations

import json
import re

from banger.api.errors import BangerError, Code
from banger.reasons import in_words

ARCHITECTURES = ("amd64", "arm64")

# what other distributions call them (uname -m)
_ARCH_ALIASES = {"x86_64": "amd64", "aarch64": "arm64"}


class Fields:
    """One JSON object from outside, in which null is as absent; `where` names the file in the errors (CORRUPT)."""

    def __init__(self, value: object, where: str) -> None:
        if not isinstance(value, dict):
            raise BangerError(Code.CORRUPT, f"{where} is not a JSON object")
        self._values: dict[str, object] = value
        self.where = where

    @classmethod
    def parse(cls, text: str | bytes, where: str) -> Fields:
        """Read one JSON document."""
        try:
            return cls(json.loads(text), where)
        except (ValueError, RecursionError) as error:
            raise BangerError(Code.CORRUPT, f"{where} is not valid JSON: {in_words(error)}") from error

    @classmethod
    def parse_list(cls, text: str | bytes, where: str, most: int) -> list[Fields]:
        """Read one JSON document that is a list of at most so many objects."""
        try:
            values = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise BangerError(Code.CORRUPT, f"{where} is not valid JSON: {in_words(error)}") from error
        if not isinstance(values, list) or len(values) > most:
            raise BangerError(Code.CORRUPT, f"{where} is not a JSON list of at most {most:,} objects")
        return [cls(value, f"{where}, [{index}]") for index, value in enumerate(values)]

    def wrong(self, key: str, expected: str) -> BangerError:
        """The error for a field that is not what it must be."""
        return BangerError(Code.CORRUPT, f"{where_key(self.where, key)} must be {expected}")

    def text(self, key: str, default: str | None = None) -> str:
        """A string; required, and then not empty, when no default is given."""
        value = self._get(key, default)
        if not isinstance(value, str) or (default is None and not value):
            raise self.wrong(key, "a string")
        return value

    def sha256(self, key: str) -> str:
        """A SHA-256 in hexadecimal; required."""
        value = self.text(key)
        if not re.fullmatch(r"[0-9a-f]{64}", value):
            raise self.wrong(key, "64 hexadecimal digits")
        return value

    def utc_time(self, key: str) -> str:
        """A time in UTC as RFC 3339 writes it; required."""
        value = self.text(key)
        if not re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d+)?Z", value):
            raise self.wrong(key, "a UTC time as in 2026-01-31T12:00:00Z")
        return value

    def number(self, key: str, default: int) -> int:
        """An integer that is not negative."""
        value = self._get(key, default)
        if not isinstance(value, int) or isinstance(value, bool) or value < 0:
            raise self.wrong(key, "a non-negative integer")
        return value

    def seconds(self, key: str) -> float:
        """A time in seconds that may be written as a string; 0 when absent, and for what is none."""
        value = self._get(key, 0)
        try:
            return float(value) if isinstance(value, int | float | str) else 0
        except (ValueError, OverflowError):
            return 0

    def flag(self, key: str) -> bool:
        """A boolean, False when absent."""
        value = self._get(key, False)
        if not isinstance(value, bool):
            raise self.wrong(key, "true or false")
        return value

    def texts(self, key: str) -> tuple[str, ...]:
        """A list of strings, empty when absent."""
        value = self._get(key, [])
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            raise self.wrong(key, "a list of strings")
        return tuple(value)

    def digests(self, key: str) -> dict[str, str]:
        """SHA-256 digests by plain file name, empty when absent."""
        value = self._get(key, {})
        if not isinstance(value, dict):
            raise self.wrong(key, "an object")
        digests = Fields(value, where_key(self.where, key))
        for name in value:
            if "/" in name or name in ("", ".", ".."):
                raise self.wrong(key, f"an object of file names, not {name!r}")
        return {name: digests.sha256(name) for name in value}

    def _get(self, key: str, default: object) -> object:
        """A member, or its default; programs write null for what is absent, too."""
        value = self._values.get(key)
        return default if value is None else value

    def has(self, key: str) -> bool:
        """Whether there is such a field, and it is not null."""
        return self._values.get(key) is not None

    def object(self, key: str) -> Fields:
        """One object, an empty one when absent."""
        return Fields(self._get(key, {}), where_key(self.where, key))

    def keys(self, key: str) -> tuple[str, ...]:
        """The keys of an object, sorted, none when absent."""
        return tuple(sorted(self.object(key)._values))

    def objects(self, key: str, most: int | None = None) -> list[Fields]:
        """A list of objects, of at most so many: each takes some memory, however short it is written.

        It must be there, but may be null: so Go writes a list without anything in it.
        """
        value = self._values.get(key, "")
        if value is None:
            return []
        if not isinstance(value, list):
            raise self.wrong(key, "a list of objects")
        if most is not None and len(value) > most:
            raise self.wrong(key, f"a list of at most {most:,} objects, not of {len(value):,}")
        return [Fields(item, f"{self.where}, {key}[{index}]") for index, item in enumerate(value)]

    def arch(self, key: str = "arch", default: str | None = None) -> str:
        """An architecture by Debian's name for it; the kernel's own names are understood too."""
        value = self.text(key, default)
        value = _ARCH_ALIASES.get(value, value)
        if value not in ARCHITECTURES and value != default:
            raise self.wrong(key, " or ".join(ARCHITECTURES))
        return value


def where_key(where: str, key: str) -> str:
    """How errors name a field."""
    return f"{key!r} in {where}"
