"""Lengths of time as people write them."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from banger.durations import MAX_SECONDS, format_duration, parse_duration


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("45s", 45), ("30m", 1800), ("2h", 7200), ("1h30m", 5400), ("7d", 604800), ("1d1h1m1s", 90061), ("90", 90),
        (" 5M ", 300), ("0.5s", 0.5), ("1.25", 1.25), ("0", 0), ("0s", 0),
    ],
)  # fmt: skip
def test_parse(text: str, seconds: float) -> None:
    assert parse_duration(text) == seconds


@pytest.mark.parametrize("text", ["", " ", "m", "-5s", "5 m", "1.5h", "5m1h", "5x", "inf", "nan", "1e3", "٣s", "9999d"])
def test_what_is_none(text: str) -> None:
    with pytest.raises(ValueError, match=r"is not a length of time|longer than ten years"):
        parse_duration(text)


@given(st.integers(0, MAX_SECONDS))
def test_round_trip(seconds: int) -> None:
    assert parse_duration(format_duration(seconds)) == seconds


def test_fractions_are_shown() -> None:
    assert format_duration(0.5) == "0.5s"
