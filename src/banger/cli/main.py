"""The entry point: the top-level commands, and what becomes of every failure."""

from __future__ import annotations

import os
import signal
import sys

import click

from banger import __version__, stdio
from banger.api.errors import BangerError
from banger.cli import errors
from banger.cli.lazy import HELP, Entry, LazyGroup

COMPLETE_VARIABLE = "_BANGER_COMPLETE"
_SHORT = "Short forms, as in Docker"

ROOT = LazyGroup(
    "banger",
    {
        "vm": Entry("vm", "VM", "Create, run, enter and remove virtual machines.", "Everyday"),
        "image": Entry("image", "IMAGE_GROUP", "Root filesystems that VMs start from.", "Everyday"),
        "kernel": Entry("kernel", "KERNEL_GROUP", "Kernels that VMs boot.", "Everyday"),
        "run": Entry("vm_run", "run_image", "Run a command in a new VM of an image.", _SHORT, "vm run --image"),
        "exec": Entry("vm_exec", "execute", "Run a command in a running VM.", _SHORT, "vm exec"),
        "ps": Entry("vm_list", "ps", "List the running VMs.", _SHORT, "vm list --filter state=running"),
        "ls": Entry("vm_list", "list_vms", "List all VMs.", _SHORT, "vm list"),
        "logs": Entry("vm_list", "logs", "Print the output of a VM.", _SHORT, "vm logs"),
        "cp": Entry("vm_copy", "copy", "Copy files into and out of a running VM.", _SHORT, "vm cp"),
        "inspect": Entry("vm_watch", "inspect", "Print all that is known of VMs as JSON.", _SHORT, "vm inspect"),
        "start": Entry("vm_lifecycle", "start", "Start VMs.", _SHORT, "vm start"),
        "stop": Entry("vm_lifecycle", "stop", "Stop VMs.", _SHORT, "vm stop"),
        "restart": Entry("vm_lifecycle", "restart", "Stop VMs and start them again.", _SHORT, "vm restart"),
        "kill": Entry("vm_lifecycle", "kill", "Stop VMs at once.", _SHORT, "vm kill"),
        "rm": Entry("vm_lifecycle", "remove", "Remove VMs and their disks.", _SHORT, "vm rm"),
        "pull": Entry("image", "pull", "Fetch an image of a catalog or a registry.", _SHORT, "image pull"),
        "images": Entry("image", "list_images", "List the images of this host.", _SHORT, "image list"),
        "doctor": Entry("doctor", "doctor", "Check what banger needs of this host.", "banger itself"),
        "operation": Entry("operation", "OPERATION", "What is under way: watch it, cancel it.", "banger itself"),
        "daemon": Entry("daemon", "DAEMON", "The background process behind all commands.", "banger itself"),
        "system": Entry("system", "SYSTEM", "Add banger to your systemd, shells and manual.", "banger itself"),
        "update": Entry("update", "update", "Update banger, or go back to an older one.", "banger itself"),
        "completion": Entry("completion", "completion", "Print the completion script of a shell.", "banger itself"),
        "version": Entry("version", "version", "Print banger's version.", "banger itself"),
        HELP: Entry("help", "help_command", "Show the help of a command.", "banger itself"),
    },
    help="""A real Linux machine in one command.

    'banger run' boots a fresh virtual machine and gives you a shell in it. Nothing needs to be set up: the
    background daemon starts by itself, and 'banger doctor' says what is missing on this host.""",
    examples="""
    banger run --rm                         a shell in a machine that is gone afterwards
    banger run --rm -- uname -a             one command in it
    banger run --rm alpine cat /etc/motd    one command in a machine of another image
    banger run -d --name web                a machine that stays, in the background
    banger exec web -- apt-get update       a command in a running machine
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
    stdio.complete()
    stdio.guard()
    sys.excepthook = errors.report_bug
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is signal.SIG_DFL:
            signal.signal(number, _leave)
    try:
        status = run(sys.argv[1:])
        if status != errors.FAILED:  # or standard output has failed already
            sys.stdout.flush()
    except BrokenPipeError:  # whoever read our output has seen enough
        status = 128 + signal.SIGPIPE
    except BangerError as error:
        errors.report_failure(error)
        status = errors.FAILED
    except KeyboardInterrupt:
        status = errors.INTERRUPTED
    finally:
        stdio.settle()
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
