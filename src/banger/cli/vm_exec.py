"""`banger vm exec` and `banger vm shell`."""

from __future__ import annotations

import click

from banger.api import models as m
from banger.api import operations as op
from banger.cli import terminal
from banger.cli.connect import ensure_daemon
from banger.cli.errors import UsageFault, around_guest_command
from banger.cli.lazy import Command
from banger.cli.options import VM, interactive_option, resolve_env


class _RefThenCommand(Command):
    """Takes options before and directly after REF; what follows is the guest's command and left alone."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        ctx.allow_interspersed_args = False
        options, rest = self._split(ctx, args)
        if len(rest) > 1 and rest[1].startswith("-"):
            more, command = self._split(ctx, rest[1:])
            separator = more[-1:] == ["--"]
            args = [*options, *more[: len(more) - separator], "--", rest[0], *command]
        return super().parse_args(ctx, args)

    def _split(self, ctx: click.Context, args: list[str]) -> tuple[list[str], list[str]]:
        """The leading options, with a final `--` if there is one, and the words from the first that is none."""
        found, _, _ = self.make_parser(ctx).parse_args(list(args))
        words = (found.get("ref"), *(command if isinstance(command := found.get("command"), tuple) else ()))
        rest = [word for word in words if isinstance(word, str)]  # click has a mark of its own for what is missing
        return args[: len(args) - len(rest)], rest


@click.command(
    "exec",
    cls=_RefThenCommand,
    epilog="""
    banger vm exec web -- systemctl status
    banger vm exec web -w /srv -e DEBUG=1 -- make test
    banger vm exec web -- cat /etc/passwd | sort
    """,
)
@click.argument("ref", type=VM, metavar="REF")
@click.argument("command", nargs=-1, type=click.UNPROCESSED, required=True, metavar="-- CMD...")
@click.option(
    "-e",
    "--env",
    multiple=True,
    metavar="NAME[=VALUE]",
    help="Environment variable; a NAME alone takes your value. Can be given several times.",
)
@click.option("-w", "--workdir", default="", metavar="PATH", help="Directory that it starts in.")
@click.option("-u", "--user", default="", metavar="NAME[:GROUP]", help="User that it runs as.")
@click.option("-t", "--tty", is_flag=True, help="A terminal for the command even when this is none.")
@interactive_option
@click.option("-d", "--detach", is_flag=True, help="Leave it running in the background.")
def execute(
    ref: str, command: tuple[str, ...], env: tuple[str, ...], workdir: str, user: str, tty: bool, detach: bool
) -> int:
    """Run a command in a running VM.

    It gets a terminal when input and output are one. Exits with its status; 125 when banger failed, 126 when CMD cannot
    be executed, 127 when there is none.
    """
    if detach and tty:
        raise UsageFault("--tty and --detach exclude each other", "leave out -t: what it prints is kept by nobody")
    return _attach(ref, list(command), resolve_env(env), workdir, user, tty, detach)


@click.command(cls=Command, epilog="banger vm shell web")
@click.argument("ref", type=VM, metavar="REF")
@click.option("-u", "--user", default="", metavar="NAME", help="User whose shell it is.")
def shell(ref: str, user: str) -> int:
    """Open a login shell in a running VM; exits with its status."""
    return _attach(ref, [], [], "", user, tty=False, detach=False)


def _attach(ref: str, argv: list[str], env: list[str], workdir: str, user: str, tty: bool, detach: bool) -> int:
    wants_terminal = not detach and (tty or terminal.on_terminal())
    request = m.VmExec(
        vm=ref,
        argv=argv,
        env=[*(terminal.terminal_env() if wants_terminal else []), *env],
        workdir=workdir,
        user=user,
        terminal=terminal.terminal_size() if wants_terminal else None,
        detach=detach,
    )
    with around_guest_command(), ensure_daemon().open(op.VM_EXEC, request) as stream:
        if detach:
            terminal.wait_started(stream, lambda step: None)
            return 0
        return terminal.Session(stream, wants_terminal, lambda step: None).run()
