"""Signals by name and number."""

import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from banger.signals import signal_number


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("SIGQUIT", 3),
        ("QUIT", 3),
        ("sigquit", 3),
        ("3", 3),
        (" 15 ", 15),
        ("SIGWINCH", 28),
        ("64", 64),
        ("RTMIN", 34),
        ("RTMIN+3", 37),
        ("SIGRTMIN+30", 64),
        ("SIGRTMAX", 64),
        ("RTMAX-14", 50),
    ],
)
def test_signals(text: str, number: int) -> None:
    assert signal_number(text) == number


@pytest.mark.parametrize(
    "text",
    [
        "",
        "0",
        "65",
        "-1",
        "+3",
        "SIG",
        "SIGNAL",
        "SIGSIGTERM",
        "TERM KILL",
        "RTMIN+31",
        "RTMAX-31",
        "RTMIN-1",
        "٣",
        "3\0",
    ],
)
def test_what_is_none(text: str) -> None:
    with pytest.raises(ValueError, match="is not a signal"):
        signal_number(text)


@given(st.text(max_size=12))
def test_any_text_is_a_signal_or_refused(text: str) -> None:
    with contextlib.suppress(ValueError):
        assert 1 <= signal_number(text) <= 64
