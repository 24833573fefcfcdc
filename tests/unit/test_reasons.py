"""Errors of Python and its libraries, in the words of users."""

import json
import subprocess
import tomllib
from collections.abc import Callable
from pathlib import Path

import pytest

from banger.api.errors import BangerError, Code
from banger.reasons import in_words

_EMPTY: dict[str, str] = {}
_ERRORS = (OSError, ValueError, RecursionError, LookupError, subprocess.SubprocessError, BangerError)


def _raise(error: Exception) -> None:
    raise error


@pytest.mark.parametrize(
    ("fails", "words"),
    [
        (lambda: Path("/nonexistent/x").read_bytes(), "No such file or directory: /nonexistent/x"),
        (lambda: json.loads(""), "something is wrong at line 1, column 1"),
        (lambda: json.loads('{\n"a": }'), "something is wrong at line 2, column 6"),
        (lambda: json.loads("9" * 5000), "a number has too many digits"),
        (lambda: tomllib.loads(f"vcpu = {'9' * 5000}"), "a number has too many digits"),
        (lambda: json.loads("[" * 100_000), "it is nested too deeply"),
        (lambda: b"\xff".decode(), "it is not UTF-8"),
        (lambda: "\udcff".encode(), "it is not UTF-8"),
        (lambda: Path("a\0b").read_bytes(), "a NUL character cannot be in it"),
        (lambda: _EMPTY["size"], "'size' is missing in it"),
        (lambda: subprocess.run(["sleep", "9"], timeout=0.01), "it did not end in time"),
        (lambda: subprocess.run(["false"], check=True), "it ended with status 1"),
        (lambda: _raise(BangerError(Code.INVALID, "it is wrong")), "it is wrong"),
        (lambda: _raise(ValueError("'x' is not a size")), "'x' is not a size"),
    ],
)
def test_words(fails: Callable[[], object], words: str) -> None:
    with pytest.raises(_ERRORS) as caught:
        fails()
    assert in_words(caught.value) == words
