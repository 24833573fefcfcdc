"""`banger vm console`."""

from __future__ import annotations

import sys

import click

from banger.api import models as m
from banger.api import operations as op
from banger.cli import terminal
from banger.cli.connect import ensure_daemon
from banger.cli.errors import UsageFault
from banger.cli.lazy import Command
from banger.cli.options import VM
from banger.cli.render import note


class _KeyType(click.ParamType[bytes]):
    """A control character such as ^] or ^a; b"" for none."""

    name = "^key"

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> bytes:
        text = str(value)
        if text == "none":
            return b""
        if len(text) == 2 and text[0] == "^" and "@" <= text[1].upper() <= "_":
            return bytes((ord(text[1].upper()) & 0x1F,))
        raise UsageFault(f"{text!r} is not a key to leave with", "write ^ and a letter or one of []\\^_, or none")


@click.command(
    cls=Command,
    epilog="""
    banger vm console web
    banger vm console --escape ^a web                                   ctrl-a leaves
    banger vm exec -d web -- sh -c 'exec sh -i <>/dev/ttyS0 >&0 2>&0'   puts a shell there
    """,
)
@click.argument("ref", type=VM, metavar="REF")
@click.option(
    "--escape",
    type=_KeyType(),
    default="^]",
    show_default=True,
    metavar="^KEY",
    help="Key that leaves the console, with ctrl; 'none' for no such key.",
)
def console(ref: str, escape: bytes) -> int:
    """Use the serial console of a running VM, up to its end or until ctrl-] is typed.

    It shows what the kernel prints from now on, and what else writes to the console ('vm logs --console' has all from
    the start). What you type goes to whoever reads it in the guest. There is a login only where the image's own init
    runs a getty on ttyS0 ('--init image'); 'vm shell' needs none. Several can look at the same console.
    """
    on_terminal = terminal.stdin_is_terminal()
    with ensure_daemon().open(op.VM_CONSOLE, m.VmRef(ref)) as stream:
        session = terminal.Session(
            stream, on_terminal, lambda step: None, lambda started: _tell(ref, escape, on_terminal), leaving=escape
        )
        status = session.run()
    if session.left:
        print(file=sys.stderr)
        note(f"left the console of {ref}")
    return status


def _tell(ref: str, escape: bytes, on_terminal: bool) -> None:
    if on_terminal:
        way = f"ctrl-{chr(escape[0] | 0x40).lower()} leaves it" if escape else "only its end leaves it"
        note(f"this is the serial console of {ref}, where its kernel and its init write; {way}")
        note(f"a login prompt comes only where the image runs a getty; 'banger vm shell {ref}' gives a shell")
