"""Signals by the names and numbers that container engines take."""

from __future__ import annotations

import re
import signal

TERM = "SIGTERM"
# as Linux numbers them; glibc and musl, and so Python, keep the first few for themselves (signal(7))
_FIRST_REALTIME, _LAST = 34, 64


def signal_number(text: str) -> int:
    """The number of QUIT, SIGQUIT, 3 or RTMIN+3, in any case. Raises ValueError for what is none."""
    name = text.strip().upper().removeprefix("SIG")
    number = getattr(signal.Signals.__members__.get(f"SIG{name}"), "value", 0)
    if re.fullmatch(r"[0-9]{1,2}", name, re.ASCII):
        number = int(name)
    elif realtime := re.fullmatch(r"RTM(?:IN(?:\+([0-9]{1,2}))?|AX(?:-([0-9]{1,2}))?)", name, re.ASCII):
        above, below = realtime.groups(default="0")
        number = _LAST - int(below) if name.startswith("RTMAX") else _FIRST_REALTIME + int(above)
        number = number if number >= _FIRST_REALTIME else 0
    if not 1 <= number <= _LAST:
        raise ValueError(f"{text!r} is not a signal")
    return number
