"""Platforms: the ways to write them, and which image serves which."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from banger.api.errors import BangerError, Code
from banger.oci.platform import Platform


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("amd64", "linux/amd64"),
        ("linux/amd64", "linux/amd64"),
        ("Linux/x86_64", "linux/amd64"),
        ("linux/amd64/v1", "linux/amd64"),
        ("linux/amd64/v3", "linux/amd64/v3"),
        ("aarch64", "linux/arm64"),
        ("linux/arm64/v8", "linux/arm64"),
        ("arm64/8", "linux/arm64"),
        ("arm64/v8.2", "linux/arm64/v8.2"),
        ("armhf", "linux/arm/v7"),
        ("armel", "linux/arm/v6"),
        ("linux/arm/v6", "linux/arm/v6"),
        ("arm", "linux/arm"),
        ("i686", "linux/386"),
        ("linux/ppc64el", "linux/ppc64le"),
        ("linux/s390x", "linux/s390x"),
    ],
)
def test_ways_to_write_one(text: str, shown: str) -> None:
    platform = Platform.parse(text)
    assert str(platform) == shown
    assert Platform.parse(shown) == platform


@pytest.mark.parametrize(
    "text",
    ["", "/", "linux", "linux/", "windows/amd64", "amd46", "linux/amd64/v1/x", "linux/arm/", "arm64/v", "arm/../v7"],
)
def test_what_is_none(text: str) -> None:
    with pytest.raises(BangerError) as caught:
        Platform.parse(text)
    assert caught.value.code is Code.INVALID
    assert "linux/ARCHITECTURE" in caught.value.hint


@given(st.text())
def test_any_text_is_one_or_is_refused(text: str) -> None:
    try:
        platform = Platform.parse(text)
    except BangerError:
        return
    assert Platform.parse(str(platform)) == platform


@pytest.mark.parametrize(
    ("wanted", "offered", "order"),
    [
        ("amd64", "amd64/v2 amd64 amd64/v3", "amd64 amd64/v2 amd64/v3"),
        ("amd64/v3", "amd64 amd64/v2 amd64/v3 amd64/v4", "amd64/v3 amd64 amd64/v2"),
        ("arm64", "arm64/v9 amd64 arm64/v8 arm64/v8.1", "arm64/v8 arm64/v8.1 arm64/v9"),
        ("arm", "arm/v5 arm/v7 arm/v6", "arm/v7 arm/v6 arm/v5"),
        ("arm", "arm/v5 arm", "arm arm/v5"),
        ("arm/v6", "arm/v7 arm/v5 arm arm/v6", "arm/v6 arm arm/v5"),
        ("arm/v7", "arm64 arm/v8 386", ""),
        ("riscv64", "riscv64", "riscv64"),
    ],
)
def test_what_serves_a_platform(wanted: str, offered: str, order: str) -> None:
    ranks = [(Platform.parse(wanted).rank(Platform.parse(text)), text) for text in offered.split()]
    assert [text for _, text in sorted((rank, text) for rank, text in ranks if rank is not None)] == order.split()


def test_other_systems_and_unknown_variants_serve_none() -> None:
    wanted = Platform.parse("amd64")
    for offered in (Platform.of("windows", "amd64"), Platform.of("linux", "amd64", "x"), Platform.of("", "")):
        assert wanted.rank(offered) is None
