"""Click commands whose modules are imported only when they run: start-up time is part of the interface."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import NamedTuple

import click

from banger.cli.errors import UsageFault

ALIASES = {"ls": "list", "delete": "rm", "op": "operation"}
HELP = "help"  # a command of every group


class Entry(NamedTuple):
    """Where a command is defined (a module of banger.cli), its one line of help, its section in the help.

    `short_for` is the longer way to call it, '' for a command in its own place.
    """

    module: str
    attribute: str
    summary: str
    section: str = "Commands"
    short_for: str = ""


_HELP_ENTRY = Entry("help", "help_command", "Show the help of a command.")


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
        entry = _HELP_ENTRY if name == HELP else self.entries.get(name)
        if entry is None:
            return None
        command = getattr(importlib.import_module(f"banger.cli.{entry.module}"), entry.attribute)
        if not isinstance(command, click.Command):
            raise TypeError(f"banger.cli.{entry.module}.{entry.attribute} is not a command")
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if self.get_command(ctx, args[0]) is None and not args[0].startswith("-"):
            raise UsageFault(
                f"there is no command '{ctx.command_path} {args[0]}'",
                self._instead(ctx, args[0]) or f"see '{ctx.command_path} --help'",
            )
        return super().resolve_command(ctx, args)

    def _instead(self, ctx: click.Context, word: str) -> str:
        """What the user of a command that there is not may have meant, '' when nobody can tell."""
        from banger.cli.vocabulary import command_hint
        from banger.system import nearest

        if hint := command_hint(ctx.command_path, self.entries, word):
            return hint
        root = ctx.find_root()
        if isinstance(root.command, LazyGroup) and (found := root.command._find(root, word)):
            return f"did you mean '{root.command_path} {found}'?"
        close = nearest(word, [*self.entries])
        return f"did you mean '{ctx.command_path} {close}'?" if close else ""

    def _find(self, ctx: click.Context, name: str) -> str:
        """How the command of that name is called, here or in one of the groups below; '' when there is none."""
        if self.get_command(ctx, name) is not None:
            return name
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

    def format_help_text(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        super().format_help_text(ctx, formatter)
        group = ctx.parent.command if ctx.parent else None
        entry = group.entries.get(ctx.info_name or "") if isinstance(group, LazyGroup) else None
        if entry is not None and entry.short_for:
            formatter.write_paragraph()
            with formatter.indentation():
                formatter.write_text(f"Short for 'banger {entry.short_for}'.")

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        write_examples(formatter, self.epilog or "")


def write_examples(formatter: click.HelpFormatter, examples: str) -> None:
    """The examples of a help page, one command a line."""
    lines = [line.strip() for line in examples.strip().splitlines()]
    if lines:
        with formatter.section("Examples"):
            for line in lines:
                formatter.write(f"{' ' * formatter.current_indent}{line}\n")
