"""Labels: names and values that users give to VMs to find them by."""

from __future__ import annotations

import re

_NAME = r"[A-Za-z0-9](?:[A-Za-z0-9._/-]{0,61}[A-Za-z0-9])?"
MAX_VALUE = 1024
MAX_LABELS = 100


def check_label(name: str, value: str) -> None:
    """Raise ValueError unless a label may have this name and this value."""
    if not re.fullmatch(_NAME, name, re.ASCII):
        raise ValueError(
            f"{name!r} is not the name of a label: use letters, digits, dots, dashes and slashes, up to 63"
        )
    if len(value) > MAX_VALUE or not value.isprintable():
        raise ValueError(f"the value of the label {name!r} is longer than {MAX_VALUE} characters or not printable")


def parse_label(text: str) -> tuple[str, str]:
    """The name and the value of NAME=VALUE; NAME alone has the value ''. Raises ValueError for what is none."""
    name, _, value = text.partition("=")
    check_label(name, value)
    return name, value
