"""Tables, sizes and ages; nothing hostile reaches a terminal."""

import json
from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from banger.api import models as m
from banger.cli import render


@given(st.text())
def test_plain_text_is_printable_and_one_line(text: str) -> None:
    shown = render.plain(text)
    assert shown.isprintable()
    if text.isprintable():
        assert shown == text


def test_escapes_show_what_was_there() -> None:
    assert render.plain("a\x1b[31m\n\x9b\udcff") == "a\\x1b[31m\\n\\x9b\\udcff"


def test_table(capsys: pytest.CaptureFixture[str]) -> None:
    render.print_lines(
        render.table_lines(["NAME", "SIZE", "NOTE"], [["long-name", "", ""], ["b", "2\x1b", ""]], optional=("NOTE",))
    )
    assert capsys.readouterr().out.splitlines() == ["NAME        SIZE", "long-name   -", "b           2\\x1b"]


def test_a_table_ends_at_the_edge_of_a_terminal(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "20")
    rows = [["debian", "a machine to work on"], ["x", "short"]]
    render.print_lines(render.table_lines(["NAME", "DESCRIPTION"], rows, cut=True))
    assert "debian   a machine to work on" in capsys.readouterr().out
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    render.print_lines(render.table_lines(["NAME", "DESCRIPTION"], rows, cut=True))
    assert capsys.readouterr().out.splitlines() == ["NAME     DESCRIPTION", "debian   a machine…", "x        short"]


@pytest.mark.parametrize(
    ("columns", "lines"),
    [
        (60, ["NAME   PORTS               USED      REASON", "a      8080:80, 8443:443   1.5 MiB   powered off"]),
        (40, ["NAME   PORTS               REASON", "a      8080:80, 8443:443   powered off"]),
        (36, ["NAME   PORTS             REASON", "a      8080:80, 8443:…   powered off"]),
        (22, ["NAME   PORTS…", "a      8080:80, 84…"]),
        (5, ["NAME…", "a…"]),
    ],
)
def test_a_narrow_terminal_gets_less(columns: int, lines: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    headers, rows = ["NAME", "PORTS", "USED", "REASON"], [["a", "8080:80, 8443:443", "1.5 MiB", "powered off"]]
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    shown = render.table_lines(headers, rows, (), True, narrow=["PORTS"], least=["USED"])
    assert all(len(line) <= columns for line in shown)
    assert shown == lines
    assert len(render.table_lines(headers, rows, narrow=["PORTS"], least=["USED"])[1]) == 48


def test_fields_leave_out_what_has_no_value(capsys: pytest.CaptureFixture[str]) -> None:
    render.print_fields([("name", "x"), ("longer", "y"), ("none", "")])
    assert capsys.readouterr().out == "name:   x\nlonger: y\n"


def test_json_is_one_document(capsys: pytest.CaptureFixture[str]) -> None:
    render.print_json([m.Check("a", "ok", "é\x1b\x9b")])
    text = capsys.readouterr().out
    assert json.loads(text) == [{"name": "a", "status": "ok", "message": "é\x1b\x9b", "fix": "", "package": ""}]
    assert text.isascii()


def test_sizes_that_are_not_known() -> None:
    assert (render.known_size(0), render.known_size(1 << 30)) == ("", "1 GiB")


@pytest.mark.parametrize(
    ("seconds", "text"), [(-5, "0s"), (59, "59s"), (119, "119s"), (120, "2m"), (7200, "2h"), (172800, "2d")]
)
def test_durations(seconds: float, text: str) -> None:
    assert render.duration(seconds) == text


def test_ages() -> None:
    then = datetime.now(UTC) - timedelta(hours=5, minutes=10)
    assert render.age(then.isoformat()) == "5h"
    assert render.age(then.strftime("%Y-%m-%dT%H:%M:%SZ")) == "5h"
    assert render.age(then.replace(tzinfo=None).isoformat()) == "5h"
    assert render.age("") == ""
    assert render.age("yesterday") == "yesterday"


def test_long_texts_are_cut() -> None:
    assert render.shorten("Debian", 6) == "Debian"
    assert render.shorten("Debian GNU/Linux", 8) == "Debian…"
