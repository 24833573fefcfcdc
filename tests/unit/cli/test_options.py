"""Ports and environment entries, before any daemon is asked."""

import errno

import pytest

from banger.cli.errors import UsageFault, report_bug
from banger.cli.main import run
from banger.cli.options import resolve_env
from banger.cli.vm_copy import Place, parse_place


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
