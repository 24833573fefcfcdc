"""What a guest can be waited for to do, as it is written."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from banger.api.errors import BangerError, Code
from banger.api.vm_conditions import EXEC, HEALTH, LOG, PORT, URL, Condition, parse_condition


@pytest.mark.parametrize(
    ("text", "kind", "port", "value"),
    [
        ("80", PORT, 80, ""),
        ("65535", PORT, 65535, ""),
        ("http://:8080/health", URL, 8080, "/health"),
        ("http://localhost:8080", URL, 8080, "/"),
        ("http://127.0.0.1/", URL, 80, "/"),
        ("https://:/x?a=b", None, 0, ""),
        ("https:///x?a=b&c", URL, 443, "/x?a=b&c"),
        ("log:listening on :80", LOG, 0, "listening on :80"),
        ("exec:test -e /run/ready", EXEC, 0, "test -e /run/ready"),
        ("health", HEALTH, 0, ""),
    ],
)
def test_conditions(text: str, kind: str | None, port: int, value: str) -> None:
    if kind is None:
        with pytest.raises(BangerError):
            parse_condition(text)
    else:
        assert parse_condition(text) == Condition(kind, text, port, value)


@pytest.mark.parametrize(
    "text",
    ["", "0", "65536", "80/tcp", "٨٠", "-1", "9" * 5000, "running", "healthy", "log:", "log: ", "exec:", "exec:a\0b",
     "http://example.org/", "http://:0/", "http://:99999/", "http://:80/a b", "http://:80/\r\nX: y", "ftp://:80/"],
)  # fmt: skip
def test_mistakes(text: str) -> None:
    with pytest.raises(BangerError, match="is not a condition to wait for") as caught:
        parse_condition(text)
    assert caught.value.code is Code.INVALID
    assert "log:TEXT" in caught.value.hint


@given(st.text(max_size=40))
def test_a_path_stays_one_line_of_a_request(path: str) -> None:
    try:
        condition = parse_condition(f"http://:80/{path}")
    except BangerError:
        return
    assert not set(condition.value) & set(" \r\n\0")
    assert condition.unmet.isprintable()
