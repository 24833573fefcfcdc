"""Odd values for every option and argument of every command, against a real daemon: no answer is one of Python's."""

import re
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

from banger.cli.errors import report_bug
from banger.cli.lazy import LazyGroup
from banger.cli.main import ROOT, run
from tests.daemons import DaemonProcess, running_daemon

VALUES = {
    "empty": "",
    "negative": "-1",
    "zero": "0",
    "huge": "9" * 5000,
    "infinite": "1e999",
    "nul": "a\0b",
    "lines": "a\nb",
    "surrogate": "a\udcffb",
    "digits of another script": "١٢٣",
    "superscript": "²",
    "no user": "~no-such-user/x",
    "file": "/etc/passwd",
    "directory": ".",
    "long": "a" * 5000,
    "json": "{}",
    "limit": "on-failure:" + "9" * 5000,
    "unknown": "no-such:1",
}
# names of exceptions, errno numbers, codecs, bytes, and what else only programmers of Python have seen
PYTHON = re.compile(
    r"Traceback|has a bug|unexpectedly|\w+Error\b|Exception|Errno|codec|surrogates|set_int_max|\bb'|<class|object at 0x"
    r"|NoneType|None\b|embedded null|invalid literal|unhashable|JSON decode|Expecting value|Input should"
)
# what has no values that matter or those of `vm run`, or ends the daemon that is tested
_LEFT_OUT = {"vm create", "daemon start", "daemon stop", "daemon restart", "completion", "doctor", "version", "help"}
_ENDLESS = {"vm events": ["--no-follow", "--since", "1s"]}


def commands(group: LazyGroup = ROOT, path: str = "") -> Iterator[tuple[str, click.Command]]:
    for name, entry in group.entries.items():
        command = group.get_command(click.Context(group), name)
        assert command is not None
        if isinstance(command, LazyGroup):
            yield from commands(command, f"{path}{name} ")
        elif not entry.short_for and f"{path}{name}" not in _LEFT_OUT:
            yield f"{path}{name}", command


COMMANDS = dict(commands())


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DaemonProcess]:
    # names that no catalog has are looked for in this registry, which refuses the connection
    with running_daemon(tmp_path_factory.mktemp("daemon"), config='default_registry = "127.0.0.1:1"\n') as running:
        yield running


def lines(path: str, command: click.Command) -> Iterator[list[str]]:
    """Command lines in which one parameter after the other has each of the values, and the others what is needed."""
    for swept in command.params:
        if isinstance(swept, click.Option) and (swept.is_flag or swept.is_eager):
            continue
        others: list[str] = []
        words: list[list[str]] = [[]]
        missing = "no-such:x" if path == "vm cp" else "no-such"
        for parameter in command.params:
            if isinstance(parameter, click.Argument):
                words = [
                    [*before, word]
                    for before in words
                    for word in (VALUES.values() if parameter is swept else [missing])
                    if parameter is swept or parameter.required
                ] or words
            elif parameter is not swept and parameter.required:
                others += [parameter.opts[-1], "/etc/hostname"]
        if path == "vm run" and "--image" not in swept.opts:
            others += ["--image", "/etc/hostname"]  # nothing is made of it
        start = [*path.split(), *_ENDLESS.get(path, []), *others]
        for arguments in words:
            given = ["--", *arguments] if arguments else []
            if isinstance(swept, click.Argument):
                yield [*start, *given]
            else:
                yield from ([*start, f"{swept.opts[-1]}={value}", *given] for value in VALUES.values())


@pytest.mark.parametrize("path", COMMANDS)
def test_no_value_is_answered_in_python(
    path: str,
    daemon: DaemonProcess,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    for name, value in daemon.environment.items():
        monkeypatch.setenv(name, value)
    for line in lines(path, COMMANDS[path]):
        try:
            run(line)
        except SystemExit:  # around the command of a guest
            pass
        except Exception as error:  # noqa: BLE001 - as the excepthook has it
            report_bug(type(error), error, error.__traceback__)
        output = "".join(capfd.readouterr())
        assert not PYTHON.search(output), f"{ascii(line)[:300]}: {output[:600]}"
