"""The manual page, banger(1), made from the help of every command; `python -m banger.cli.manual` prints it."""

from __future__ import annotations

import inspect
from collections.abc import Iterator

import click

from banger import __version__
from banger.cli.lazy import LazyGroup

_SECTIONS = (
    (
        "EXIT STATUS",
        "0 after success, 1 when an operation failed, 2 for wrong usage. Commands that run one in a guest end with its "
        "status, 128 and more when a signal ended it; 124 when what they wait for does not come in time, 125 when "
        "banger itself failed, 126 when the command cannot be executed, 127 when it is not found.",
    ),
    (
        "FILES",
        "~/.config/banger/config.toml: what new machines get unless you say otherwise.\n\n"
        "~/.local/state/banger: kernels, images and machines.\n\n"
        "~/.cache/banger: downloads.",
    ),
    (
        "ENVIRONMENT",
        "BANGER_LOG_LEVEL: debug, info, warning or error.\n\n"
        "XDG_CONFIG_HOME, XDG_STATE_HOME, XDG_CACHE_HOME, XDG_RUNTIME_DIR: where the directories lie.",
    ),
)


def manual(root: LazyGroup) -> str:
    """The page in the man(7) macros."""
    lines = [
        f'.TH BANGER 1 "" "banger {__version__}" "User Commands"',
        ".SH NAME",
        "banger \\- microVMs in one command",
    ]
    with click.Context(root, info_name=root.name) as context:
        lines += [".SH SYNOPSIS", _bold(" ".join([context.command_path, *root.collect_usage_pieces(context)]))]
        lines += [".SH DESCRIPTION", *_text(root.help), *_options(root, context), *_examples(root.epilog)]
        lines += [".SH COMMANDS", *_commands(root, context, {})]
    for title, text in _SECTIONS:
        lines += [f".SH {title}", *_text(text)]
    return "\n".join(lines) + "\n"


def _commands(group: LazyGroup, above: click.Context, seen: dict[click.Command, str]) -> Iterator[str]:
    """Every command below a group; one that has more than one name is described once."""
    for name in group.list_commands(above):
        command = group.get_command(above, name)
        if command is None or command.hidden:
            continue
        with click.Context(command, parent=above, info_name=name) as context:
            if isinstance(command, LazyGroup):
                yield from _commands(command, context, seen)
                continue
            yield f".SS {_escape(context.command_path)}"
            if command in seen:
                yield from _text(f"The same as '{seen[command]}'.")
                continue
            seen[command] = context.command_path
            yield _bold(" ".join([context.command_path, *command.collect_usage_pieces(context)]))
            yield ".PP"
            yield from _text(command.help)
            yield from _options(command, context)
            yield from _examples(command.epilog)


def _options(command: click.Command, context: click.Context) -> Iterator[str]:
    for parameter in command.get_params(context):
        record = parameter.get_help_record(context)
        if record is not None:
            yield from (".TP", _bold(record[0]), *_text(record[1]))


def _examples(epilog: str | None) -> Iterator[str]:
    if epilog:
        yield from (".PP", "Examples:", ".PP", ".nf", *map(_escape, inspect.cleandoc(epilog).splitlines()), ".fi")


def _text(text: str | None) -> Iterator[str]:
    for number, paragraph in enumerate(inspect.cleandoc(text or "").split("\n\n")):
        if number:
            yield ".PP"
        yield _escape(" ".join(paragraph.replace("\b", "").split()))


def _bold(text: str) -> str:
    return f"\\fB{_escape(text)}\\fR"


def _escape(text: str) -> str:
    """Text for troff: its escape character, hyphens that are minus signs, and no line that would be a request."""
    escaped = text.replace("\\", "\\e").replace("-", "\\-")
    return f"\\&{escaped}" if escaped.startswith((".", "'")) else escaped


if __name__ == "__main__":
    from banger.cli.main import ROOT

    print(manual(ROOT), end="")
