"""`banger help`, which every group of commands has."""

from __future__ import annotations

import click

from banger.cli.lazy import Command


@click.command("help", cls=Command, epilog="banger help vm run")
@click.argument("words", nargs=-1, metavar="[COMMAND...]")
@click.pass_context
def help_command(ctx: click.Context, words: tuple[str, ...]) -> None:
    """Show the help of a command, as its option --help does."""
    assert ctx.parent is not None
    shown = ctx.parent
    for word in words:
        if not isinstance(shown.command, click.Group):
            break  # what follows a command is its own: `banger help run alpine`
        name, command, _ = shown.command.resolve_command(shown, [word])
        assert command is not None
        shown = command.context_class(command, parent=shown, info_name=name, **command.context_settings)
    print(shown.get_help())
