"""Lengths of time the way people write them: 45s, 30m, 2h, 1h30m, 7d."""

from __future__ import annotations

import math
import re

_SECONDS = {"d": 86400, "h": 3600, "m": 60, "s": 1}
_PATTERN = r"(?:([0-9]{1,9})d)?(?:([0-9]{1,9})h)?(?:([0-9]{1,9})m)?(?:([0-9]{1,9}(?:\.[0-9]{1,9})?)s)?"
MAX_SECONDS = 10 * 365 * 86400


def parse_duration(text: str) -> float:
    """The seconds of 45s, 30m, 2h, 1h30m or 7d; a number alone counts seconds. Raises ValueError for what is none."""
    written = text.strip().lower()
    if re.fullmatch(r"[0-9]{1,9}(\.[0-9]{1,9})?", written, re.ASCII):
        written += "s"
    match = re.fullmatch(_PATTERN, written, re.ASCII)
    if match is None or not written:
        raise ValueError(f"{text!r} is not a length of time")
    seconds = sum(float(part or 0) * scale for part, scale in zip(match.groups(), _SECONDS.values(), strict=True))
    if not seconds <= MAX_SECONDS:
        raise ValueError(f"{text!r} is longer than ten years")
    return seconds


def format_duration(seconds: float) -> str:
    """The length of time as `parse_duration` reads it: 1h30m; '0s' for none."""
    if seconds != math.floor(seconds):
        return f"{seconds:g}s"
    left, parts = int(seconds), []
    for unit, scale in _SECONDS.items():
        count, left = divmod(left, scale)
        parts += [f"{count}{unit}"] if count else []
    return "".join(parts) or "0s"
