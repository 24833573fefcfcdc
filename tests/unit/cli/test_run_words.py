"""What the words after the options of `run` and `create` mean: an image, a command, or nothing that is clear."""

import click
import pytest

from banger.cli.lazy import LazyGroup
from banger.cli.main import ROOT, run


def parsed(line: list[str]) -> tuple[str | None, tuple[str, ...]]:
    """The image and the command of a command line."""
    command: click.Command = ROOT
    while isinstance(command, LazyGroup):
        below = command.get_command(click.Context(command), line[0])
        assert below is not None
        command, line = below, line[1:]
    with command.make_context("run", line) as context:
        return context.params["image"], context.params["command"]


@pytest.mark.parametrize(
    ("words", "image", "command"),
    [
        ([], None, []),
        (["debian-trixie"], "debian-trixie", []),
        (["--rm", "alpine", "--", "cmd"], "alpine", ["cmd"]),
        (["--rm", "alpine", "cmd", "args"], "alpine", ["cmd", "args"]),
        (["alpine", "-it", "sh"], "alpine", ["-it", "sh"]),
        (["-it", "--rm", "alpine", "sh", "-c", "ls -l"], "alpine", ["sh", "-c", "ls -l"]),
        (["alpine", "sh", "--", "x"], "alpine", ["sh", "--", "x"]),
        (["alpine", "--", "--", "x"], "alpine", ["--", "x"]),
        (["alpine", "--rm"], "alpine", ["--rm"]),
        (["--", "uname", "-a"], None, ["uname", "-a"]),
        (["--rm", "--", "alpine"], None, ["alpine"]),
        (["--image", "alpine", "ls"], "alpine", ["ls"]),
        (["--image=alpine", "--", "ls"], "alpine", ["ls"]),
        (["-p", "80", "-e", "A=1", "nginx"], "nginx", []),
    ],
)
def test_the_first_word_of_run_is_the_image(words: list[str], image: str | None, command: list[str]) -> None:
    assert parsed(["run", *words]) == (image, tuple(command))


@pytest.mark.parametrize("verb", ["run", "create"])
@pytest.mark.parametrize(
    ("words", "image", "command"),
    [
        ([], None, []),
        (["--", "alpine"], None, ["alpine"]),
        (["--image", "alpine", "ls", "-l"], "alpine", ["ls", "-l"]),
        (["--image", "alpine", "--", "ls"], "alpine", ["ls"]),
    ],
)
def test_a_command_of_vm_run(verb: str, words: list[str], image: str | None, command: list[str]) -> None:
    assert parsed(["vm", verb, *words]) == (image, tuple(command))


@pytest.mark.parametrize(
    ("arguments", "hint"),
    [
        (
            ["vm", "run", "ubuntu"],
            "'banger run ubuntu', 'banger vm run --image ubuntu' or 'banger vm run -- ubuntu'",
        ),
        (
            ["vm", "run", "--rm", "ls", "-l", "a b"],
            "'banger run ls', 'banger vm run --image ls' or 'banger vm run -- ls -l 'a b''",
        ),
        (
            ["vm", "create", "x1"],
            "'banger vm create --name x1', 'banger vm create --image x1' or 'banger vm create -- x1'",
        ),
    ],
)
def test_a_word_that_may_be_an_image_boots_nothing(
    arguments: list[str], hint: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", "/proc/nonexistent")  # where no daemon answers, and none can be started
    monkeypatch.setenv("XDG_STATE_HOME", "/proc/nonexistent")
    assert run(arguments) == 2
    message, advice = capsys.readouterr().err.splitlines()
    assert message.startswith("error: what is '")
    assert advice == f"hint: {hint}"


def test_usage_of_both(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["run", "--help"]) == 0
    assert capsys.readouterr().out.startswith("Usage: banger run [OPTIONS] [IMAGE [CMD...] | -- CMD...]\n")
    assert run(["vm", "run", "--help"]) == 0
    assert capsys.readouterr().out.startswith("Usage: banger vm run [OPTIONS] [-- CMD...]\n")
