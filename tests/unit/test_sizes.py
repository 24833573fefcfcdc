"""Sizes as people write them."""

import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from banger.sizes import parse_size


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("512M", 512 << 20),
        ("2G", 2 << 30),
        ("2gb", 2 << 30),
        ("1.5GiB", 3 << 29),
        ("1 T", 1 << 40),
        ("64k", 64 << 10),
        ("1048576", 1 << 20),
        ("4096B", 4096),
        ("0.1K", 102),
    ],
)
def test_sizes_are_binary(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize(
    "text", ["", "G", "0", "-1G", "1.G", ".5G", "1..5G", "1e3", "12X", "1GG", "1iB", "\u0663G", "1_0M", "5 5M"]
)
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="is not a size"):
        parse_size(text)


def test_a_small_number_needs_a_unit() -> None:
    with pytest.raises(ValueError, match="'4096' without a unit means bytes"):
        parse_size("4096")


@given(st.integers(1, 1 << 50), st.sampled_from(["B", "K", "M", "G", "KiB", "MiB", "GiB"]))
def test_whole_sizes_are_exact(number: int, unit: str) -> None:
    scale = {"B": 0, "K": 10, "M": 20, "G": 30}[unit.removesuffix("iB")]
    assert parse_size(f"{number}{unit}") == number << scale


@given(st.text(max_size=30))
def test_any_text_is_a_size_or_refused(text: str) -> None:
    with contextlib.suppress(ValueError):
        assert parse_size(text) >= 1
