"""Click commands whose modules are imported only when they run: start-up time is part of the interface."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import NamedTuple

import click

from banger.cli.errors import UsageFault

_ELSEWHERE = {"rename": "vm set --name", "update": "vm set", "resize": "vm set"}  # what is no command of its own
ALIASES = {"ls": "list", "delete": "rm", "op": "operation"}


class Entry(NamedTuple):
    """Where a command is defined (a module of banger.cli), its one line of help, its section in the help."""

    module: str
    attribute: str
    summary: str
    section: str = "Commands"


class LazyGroup(click.Group):
    """A group that knows its commands from a table and imports the one that is called."""

    def __init__(self, name: str, entries: Mapping[str, Entry], help: str, examples: str = "") -> None:
        super().__init__(
            name,
            help=help,
            epilog=examples,
            no_args_is_help=True,
            context_settings={"help_option_names": ["-h", "--help"]},
        )
        self.entries = entries

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.entries)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        name = cmd_name if cmd_name in self.entries else ALIASES.get(cmd_name, cmd_name)
        if name not in self.entries:
            return None
        entry = self.entries[name]
        command = getattr(importlib.import_module(f"banger.cli.{entry.module}"), entry.attribute)
        if not isinstance(command, click.Command):
            raise TypeError(f"banger.cli.{entry.module}.{entry.attribute} is not a command")
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        command = self.get_command(ctx, args[0])
        if command is None and not args[0].startswith("-"):
            from banger.system import nearest

            if self.name == "vm" and args[0] in _ELSEWHERE:
                raise UsageFault(
                    f"there is no command '{ctx.command_path} {args[0]}'", f"use 'banger {_ELSEWHERE[args[0]]}'"
                )
            close = self._below(ctx, args[0]) or nearest(args[0], [*self.entries])
            raise UsageFault(
                f"there is no command '{ctx.command_path} {args[0]}'",
                f"did you mean '{ctx.command_path} {close}'?" if close else f"see '{ctx.command_path} --help'",
            )
        return super().resolve_command(ctx, args)

    def _below(self, ctx: click.Context, name: str) -> str:
        """The command of that name in one of the groups below, or ''."""
        for group in self.entries:
            command = self.get_command(ctx, group)
            if isinstance(command, LazyGroup) and command.get_command(ctx, name) is not None:
                return f"{group} {name}"
        return ""

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        width = max(map(len, self.entries))
        for section in dict.fromkeys(entry.section for entry in self.entries.values()):
            with formatter.section(section):
                formatter.write_dl(
                    [
                        (name.ljust(width), entry.summary)
                        for name, entry in self.entries.items()
                        if entry.section == section
                    ]
                )

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        write_examples(formatter, self.epilog or "")

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[click.shell_completion.CompletionItem]:
        from click.shell_completion import CompletionItem

        found = [
            CompletionItem(name, help=entry.summary)
            for name, entry in self.entries.items()
            if name.startswith(incomplete)
        ]
        return found + click.Command.shell_complete(self, ctx, incomplete)


class Command(click.Command):
    """A command whose epilog holds examples, one a line."""

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        write_examples(formatter, self.epilog or "")


def write_examples(formatter: click.HelpFormatter, examples: str) -> None:
    """The examples of a help page, one command a line."""
    lines = [line.strip() for line in examples.strip().splitlines()]
    if lines:
        with formatter.section("Examples"):
            for line in lines:
                formatter.write(f"{' ' * formatter.current_indent}{line}\n")
