"""The entry point: the top-level commands, and what becomes of every failure."""

from __future__ import annotations

import os
import signal
import sys

import click

from banger import __version__
from banger.api.errors import BangerError
from banger.cli import errors
from banger.cli.lazy import Entry, LazyGroup

COMPLETE_VARIABLE = "_BANGER_COMPLETE"

ROOT = LazyGroup(
    "banger",
    {
        "vm": Entry("vm", "VM", "Create, run, enter and remove virtual machines.", "Everyday"),
        "ps": Entry("vm_list", "ps", "List the running VMs.", "Everyday"),
        "image": Entry("image", "IMAGE_GROUP", "Root filesystems that VMs start from.", "What VMs are made of"),
        "kernel": Entry("kernel", "KERNEL_GROUP", "Kernels that VMs boot.", "What VMs are made of"),
        "doctor": Entry("doctor", "doctor", "Check what banger needs of this host.", "banger itself"),
        "operation": Entry("operation", "OPERATION", "What is under way: watch it, cancel it.", "banger itself"),
        "daemon": Entry("daemon", "DAEMON", "The background process behind all commands.", "banger itself"),
        "completion": Entry("completion", "completion", "Print the completion script of a shell.", "banger itself"),
        "version": Entry("version", "version", "Print banger's version.", "banger itself"),
    },
    help="""A real Linux machine in one command.

    'banger vm run' boots a fresh virtual machine and gives you a shell in it. Nothing needs to be set up: the
    background daemon starts by itself, and 'banger doctor' says what is missing on this host.""",
    examples="""
    banger vm run --rm                      a shell in a machine that is gone afterwards
    banger vm run --rm -- uname -a          one command in it
    banger vm run -d --name web             a machine that stays, in the background
    banger vm exec web -- apt-get update    a command in a running machine
    """,
)
ROOT.params += [
    click.Option(["-v", "--verbose"], is_flag=True, help="Tell about progress also when not on a terminal."),
    click.Option(
        ["--version"],
        is_flag=True,
        is_eager=True,
        expose_value=False,
        callback=lambda context, option, given: _print_version(context) if given else None,
        help="Print banger's version.",
    ),
]


def _print_version(context: click.Context) -> None:
    print(f"banger {__version__}")
    context.exit()


def main() -> None:
    """Run the command line of this process and exit with its status."""
    sys.excepthook = errors.report_bug
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is signal.SIG_DFL:
            signal.signal(number, _leave)
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
    try:
        status = run(sys.argv[1:])
        sys.stdout.flush()
    except BrokenPipeError:
        # whoever read our output has seen enough; the interpreter's own flush at exit must not complain
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = 128 + signal.SIGPIPE
    except KeyboardInterrupt:
        status = errors.INTERRUPTED
    sys.exit(status)


def run(arguments: list[str]) -> int:
    """Run one command line; its exit status."""
    if COMPLETE_VARIABLE in os.environ:
        from banger.cli.completion import answer

        return answer(ROOT, COMPLETE_VARIABLE, os.environ[COMPLETE_VARIABLE])
    try:
        with ROOT.make_context("banger", arguments or ["--help"]) as context:
            status = ROOT.invoke(context)
            return status if isinstance(status, int) else 0
    except click.exceptions.Exit as exit_request:
        return exit_request.exit_code
    except click.exceptions.NoArgsIsHelpError as error:
        error.show()
        return errors.USAGE
    except click.UsageError as error:
        errors.report_usage(error)
        return errors.USAGE
    except click.Abort:
        return errors.INTERRUPTED
    except BangerError as error:
        errors.report_failure(error)
        return errors.FAILED


def _leave(number: int, frame: object) -> None:
    raise SystemExit(128 + number)
