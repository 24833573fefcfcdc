"""Sizes, ports and environment entries, before any daemon is asked."""

import contextlib
import errno

import pytest
from hypothesis import given
from hypothesis import strategies as st

from banger.cli.errors import UsageFault, report_bug
from banger.cli.main import run
from banger.cli.options import check_publish, parse_size, resolve_env
from banger.cli.vm_copy import Place, parse_place


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("512M", 512 << 20),
        ("2G", 2 << 30),
        ("2gb", 2 << 30),
        ("1.5GiB", 3 << 29),
        ("1 T", 1 << 40),
        ("64k", 64 << 10),
        ("4096", 4096),
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


@given(st.integers(1, 1 << 50), st.sampled_from(["", "K", "M", "G", "KiB", "MiB", "GiB"]))
def test_whole_sizes_are_exact(number: int, unit: str) -> None:
    scale = {"": 0, "K": 10, "M": 20, "G": 30}[unit.removesuffix("iB")]
    assert parse_size(f"{number}{unit}") == number << scale


@given(st.text(max_size=30))
def test_any_text_is_a_size_or_refused(text: str) -> None:
    with contextlib.suppress(ValueError):
        assert parse_size(text) >= 1


@pytest.mark.parametrize("text", ["80", "80:80", "8080:80", "127.0.0.1:8080:80", "0.0.0.0:1:65535"])
def test_ports_to_publish(text: str) -> None:
    assert check_publish(text) == text


@pytest.mark.parametrize(
    "text",
    [
        "",
        "0",
        "65536",
        ":80",
        "0:80",
        "80:0",
        "80:65536",
        "a:b",
        "::80",
        "1:2:3",
        "host:80:80",
        "::1:80:80",
        "[]:80:80",
        "[::1]80:80",
        "80:80:",
        ":80:80",
        "[::1]:80",
        "[::1]:8080:80",
    ],
)
def test_what_cannot_be_published_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="is not"):
        check_publish(text)


def test_environment_entries_take_values_of_the_caller(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TAKEN", "a=b")
    monkeypatch.delenv("MISSING", raising=False)
    assert resolve_env(("A=1", "EMPTY=", "TAKEN", "MISSING")) == ["A=1", "EMPTY=", "TAKEN=a=b"]
    with pytest.raises(UsageFault):
        resolve_env(("=x",))


@pytest.mark.parametrize(
    ("text", "place"),
    [
        ("web:/etc/hosts", Place("web", "/etc/hosts")),
        ("web:etc/", Place("web", "/etc/")),
        ("web:/a:b", Place("web", "/a:b")),
        ("./web:x", Place("", "./web:x")),
        ("/tmp/a:b", Place("", "/tmp/a:b")),
        ("notes.txt", Place("", "notes.txt")),
        ("-", Place("", "-")),
    ],
)
def test_ends_of_a_copy(text: str, place: Place) -> None:
    assert parse_place(text) == place


@pytest.mark.parametrize("text", ["", "web:", "a b:/x", "..:/x"])
def test_what_is_no_end_of_a_copy(text: str) -> None:
    with pytest.raises(UsageFault):
        parse_place(text)


def test_a_path_that_must_not_be_read_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    error = PermissionError(errno.EACCES, "Permission denied", "/root/edge.deb")
    report_bug(type(error), error, None)
    assert capsys.readouterr().err == "error: the system refuses '/root/edge.deb': Permission denied\n"


def test_an_argument_is_called_as_in_the_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["kernel", "pull", ""]) == 2
    assert capsys.readouterr().err.startswith("error: NAME|REF|URL is empty\n")
