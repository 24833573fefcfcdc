"""Sizes the way people write them: 512M, 2G, 1.5GiB."""

from __future__ import annotations

import re

EXAMPLES = "write sizes like 512M, 2G or 1.5GiB"
_SIZE = r"(?ia)([0-9]{1,18})(?:\.([0-9]{1,9}))? ?(?:([kmgt])(?:i?b)?|b)?"
_SHIFTS = {"": 0, "k": 10, "m": 20, "g": 30, "t": 40}
_LEAST_PLAIN = 1 << 20  # bytes; whoever writes a smaller number meant another unit


def parse_size(text: str) -> int:
    """The bytes of a size like 512M, 2G or 1.5GiB; units are binary with or without the `i`.

    Raises ValueError when it is none, below one byte, or a small number without a unit.
    """
    written = text.strip()
    match = re.fullmatch(_SIZE, written)
    if match is None:
        raise ValueError(f"{text!r} is not a size")
    whole, fraction, unit = match[1], match[2] or "", match[3] or ""
    # integers throughout: a float cannot hold every size exactly
    size = (int(whole + fraction) << _SHIFTS[unit.lower()]) // int("1" + "0" * len(fraction))
    if size < 1:
        raise ValueError(f"{text!r} is not a size")
    if written.isdigit() and size < _LEAST_PLAIN:
        raise ValueError(f"{text!r} without a unit means bytes")
    return size
