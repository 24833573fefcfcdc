"""Words of other tools are answered with what exists here, and every answer names commands and options that do."""

import re
import shlex
from collections.abc import Iterator

import click
import pytest

from banger.cli import vocabulary
from banger.cli.lazy import LazyGroup
from banger.cli.main import ROOT, run


def groups(group: LazyGroup = ROOT, path: str = "banger") -> Iterator[tuple[str, LazyGroup]]:
    yield path, group
    for name in group.entries:
        command = group.get_command(click.Context(group), name)
        if isinstance(command, LazyGroup):
            yield from groups(command, f"{path} {name}")


GROUPS = dict(groups())
WORDS = {word.rpartition(" ")[2] for word in (*vocabulary._COMMANDS, *vocabulary._SAME_COMMANDS)}


def find(words: list[str]) -> tuple[click.Command, list[str]]:
    """The command that the words of a command line call, and its arguments."""
    command: click.Command = ROOT
    while words and isinstance(command, LazyGroup):
        below = command.get_command(click.Context(command), words[0])
        assert below is not None, f"there is no command {words[0]!r} in {command.name!r}"
        command, words = below, words[1:]
    return command, words


def assert_exists(advice: str) -> None:
    """Every command line in the advice exists, with its options."""
    for line in re.findall(r"'banger ([^']*)'", advice):
        words = shlex.split(line)
        command, words = find(words[: words.index("--help")] if "--help" in words else words)
        known = {name for parameter in command.params for name in parameter.opts}
        options = [word for word in words[: words.index("--") if "--" in words else None] if word.startswith("-")]
        assert set(options) <= known, line


def hint(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    assert run(arguments) == 2
    message, advice = capsys.readouterr().err.splitlines()
    assert message.startswith("error: there is no ")
    assert advice.startswith("hint: ")
    return advice.removeprefix("hint: ")


@pytest.mark.parametrize("path", GROUPS)
def test_every_group_answers_every_word_with_what_exists(path: str, capsys: pytest.CaptureFixture[str]) -> None:
    for word in sorted(WORDS):
        if GROUPS[path].get_command(click.Context(GROUPS[path]), word) is None:
            assert_exists(hint([*path.split()[1:], word], capsys))


@pytest.mark.parametrize("advice", [*vocabulary._COMMANDS.values(), *vocabulary._OPTIONS.values()])
def test_what_is_advised_exists(advice: str) -> None:
    assert_exists(advice)


def test_no_word_hides_a_command() -> None:
    for word in vocabulary._COMMANDS:
        group, _, name = word.rpartition(" ")
        for path, commands in GROUPS.items():
            if group == path.rpartition(" ")[2]:
                assert name not in commands.entries, word


def test_no_option_is_hidden_and_what_replaces_it_exists() -> None:
    commands = [ROOT, *(command for group in GROUPS.values() for command in _commands(group))]
    assert set(vocabulary._SAME_OPTIONS.values()) <= {option for command in commands for option in _options(command)}
    for given in vocabulary._OPTIONS:
        name, option = given.split()
        found = [command for command in commands if command.name == name]
        assert found, given
        assert not any(option in _options(command) for command in found), given


def _commands(group: LazyGroup) -> list[click.Command]:
    found = [group.get_command(click.Context(group), name) for name in group.entries]
    return [command for command in found if command is not None]


def _options(command: click.Command) -> list[str]:
    return [option for parameter in command.params for option in parameter.opts]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["ssh"], "use 'banger vm shell VM'"),
        (["vm", "ssh"], "use 'banger vm shell'"),
        (["vm", "ps"], "use 'banger ps'"),
        (["image", "ps"], "use 'banger ps'"),
        (["vm", "images"], "did you mean 'banger images'?"),
        (["vm", "pull"], "did you mean 'banger pull'?"),
        (["build"], "banger builds no images"),
        (["image", "build"], "banger builds no images"),
        (["kernel", "build"], "build it with another tool"),
        (["up"], "use 'banger run -d IMAGE'"),
        (["down"], "use 'banger stop VM'"),
        (["launch"], "use 'banger run -d IMAGE'"),
        (["shell"], "use 'banger vm shell VM'"),
        (["vm", "destroy"], "use 'banger vm rm'"),
        (["remove"], "use 'banger rm'"),
        (["info"], "use 'banger inspect VM'"),
        (["daemon", "info"], "use 'banger daemon status'"),
        (["kernel", "info"], "use 'banger kernel show'"),
        (["image", "inspect"], "use 'banger image show'"),
        (["image", "catalog", "update"], "use 'banger image catalog refresh'"),
        (["uninstall"], "run 'banger system uninstall'"),
        (["upgrade"], "use 'banger update'"),
        (["attach"], "use 'banger logs -f VM'"),
        (["commit"], "no image can be made of a VM yet"),
        (["vm", "snapshot"], "the state of a VM cannot be saved yet"),
        (["vm", "run", "-v", "/a:/b"], "no directory of the host can be mounted yet"),
        (["run", "-v", "/a:/b", "alpine"], "no directory of the host can be mounted yet"),
        (["vm", "create", "--volume=/a:/b"], "no directory of the host can be mounted yet"),
        (["vm", "run", "--mount", "type=bind"], "no directory of the host can be mounted yet"),
        (["vm", "run", "-m", "512m"], "use --memory"),
        (["run", "-m512m", "alpine"], "use --memory"),
        (["run", "-itm", "1g", "alpine"], "use --memory"),
        (["vm", "set", "a", "--mem", "1G"], "use --memory"),
        (["vm", "run", "--cpus", "2"], "use --vcpu"),
        (["vm", "run", "--cpu", "2"], "use --vcpu"),
        (["vm", "run", "-c", "2"], "use --vcpu"),
        (["vm", "run", "--network", "none"], "use --net"),
        (["vm", "run", "--hostname", "a"], "use --name"),
        (["vm", "run", "--privileged"], "it is not needed"),
        (["vm", "run", "--disk", "20G"], "use --disk-size"),
        (["vm", "list", "--mem"], "see 'banger vm list --help'"),
        (["stop", "-t", "3", "a"], "use --grace"),
        (["rm", "-v", "a"], "it is not needed"),
        (["-d", "alpine"], "options come after the command"),
    ],
)
def test_answers(arguments: list[str], expected: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert hint(arguments, capsys).startswith(expected)


@pytest.mark.parametrize(
    ("words", "usage"),
    [
        ([], "banger [OPTIONS] COMMAND"),
        (["run"], "banger run [OPTIONS] [IMAGE"),
        (["vm"], "banger vm [OPTIONS] COMMAND"),
        (["vm", "run"], "banger vm run [OPTIONS]"),
        (["image", "catalog", "add"], "banger image catalog add [OPTIONS]"),
        (["image", "ls"], "banger image ls [OPTIONS]"),
        (["run", "alpine"], "banger run [OPTIONS] [IMAGE"),
    ],
)
def test_help_is_a_command_too(words: list[str], usage: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["help", *words]) == 0
    assert capsys.readouterr().out.startswith(f"Usage: {usage}")


@pytest.mark.parametrize("path", GROUPS)
def test_every_group_has_help(path: str, capsys: pytest.CaptureFixture[str]) -> None:
    words = path.split()[1:]
    assert run([*words, "help"]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith(f"Usage: {path} [OPTIONS] COMMAND")
    assert run([*words, "--help"]) == 0
    assert capsys.readouterr().out == shown
    first = next(iter(GROUPS[path].entries))
    assert run([*words, "help", first]) == 0
    assert capsys.readouterr().out.startswith(f"Usage: {path} {first} ")


def test_help_of_what_there_is_not(capsys: pytest.CaptureFixture[str]) -> None:
    assert hint(["help", "ssh"], capsys) == "use 'banger vm shell VM': no SSH server is needed in it"
    assert hint(["vm", "help", "strat"], capsys) == "did you mean 'banger vm start'?"
