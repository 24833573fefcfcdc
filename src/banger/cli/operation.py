"""`banger operation`: what the daemon is doing for any client."""

from __future__ import annotations

import json
from collections.abc import Callable

import click

from banger.api import models as m
from banger.api import operations as op
from banger.api.codec import encode
from banger.api.errors import BangerError, Code
from banger.cli import errors
from banger.cli.connect import ensure_daemon
from banger.cli.lazy import Command, Entry, LazyGroup
from banger.cli.many import for_each
from banger.cli.options import RUNNING, json_option
from banger.cli.render import amount, duration, plain, print_json, print_lines, table_lines
from banger.job import Progress

OPERATION = LazyGroup(
    "operation",
    {
        "list": Entry("operation", "list_operations", "List what is under way."),
        "watch": Entry("operation", "watch", "Follow one to its end."),
        "cancel": Entry("operation", "cancel", "Cancel some, and undo what they have done."),
    },
    help="""What is under way for any client: VMs that are created or started, images that are pulled.

    An operation is named by its id or a unique beginning of it. 'op' is short for 'operation'.""",
    examples="""
    banger operation list
    banger operation watch 3f9a1c
    banger operation cancel 3f9a1c
    """,
)


@click.command("list", cls=Command, epilog="banger operation list")
@json_option
def list_operations(as_json: bool) -> None:
    """List what is under way, the oldest first."""
    found = ensure_daemon().call(op.OPERATION_LIST, m.Empty())
    if as_json:
        print_json(found)
        return
    rows = [
        [
            each.id,
            each.name,
            each.subject,
            each.state,
            duration(each.seconds),
            each.stage or (f"after {each.timings[-1].stage}" if each.timings else ""),
            amount(Progress(each.stage, each.message, each.done, each.total, each.unit)),
        ]
        for each in found.operations
    ]
    print_lines(table_lines(["ID", "OPERATION", "SUBJECT", "STATE", "TIME", "STAGE", "PROGRESS"], rows, ("PROGRESS",)))


@click.command(
    cls=Command,
    epilog="""
    banger operation watch 3f9a1c
    banger operation watch --json 3f9a1c    one line of JSON a step
    """,
)
@click.argument("ref", type=RUNNING, metavar="ID")
@click.option("--json", "as_json", is_flag=True, help="Print a line of JSON for each step, and one for the end.")
def watch(ref: str, as_json: bool) -> int:
    """Follow an operation to its end: each stage as it comes, then how long each took.

    Exits with 1 when it fails or is cancelled. Leaving this disturbs nothing.
    """
    ended = ensure_daemon().call(op.OPERATION_WATCH, m.OperationRef(ref), _print_json_step if as_json else _steps())
    if as_json:
        print(json.dumps(encode(ended)))
    else:
        for timing in ended.timings:
            print(f"  {plain(timing.stage):<16} {timing.seconds:8.2f} s")
        why = f": {plain(ended.error)}" if ended.error else ""
        print(f"{plain(_title(ended))}: {ended.state} after {ended.seconds:.2f} s{why}")
    return 0 if ended.state == "done" else errors.FAILED


@click.command(cls=Command, epilog="banger operation cancel 3f9a1c")
@click.argument("refs", type=RUNNING, nargs=-1, required=True, metavar="ID...")
@json_option
def cancel(refs: tuple[str, ...], as_json: bool) -> int:
    """Cancel operations as leaving their clients with ctrl-c does, and wait until what they did is undone."""
    client = ensure_daemon()

    def cancel_one(ref: str) -> m.OperationInfo:
        ended = client.call(op.OPERATION_CANCEL, m.OperationRef(ref))
        if ended.state == "done":
            raise BangerError(Code.WRONG_STATE, f"{_title(ended)} was done before it could be cancelled")
        return ended

    return for_each(refs, cancel_one, lambda ref, ended: f"cancelled {_title(ended)}", as_json)


def _title(operation: m.OperationInfo) -> str:
    return f"{operation.name} {operation.subject}".rstrip()


def _print_json_step(step: Progress) -> None:
    print(json.dumps(encode(step)), flush=True)


def _steps() -> Callable[[Progress], None]:
    """A reporter that prints each stage once, when it is first heard of."""
    seen: set[str] = set()

    def show(step: Progress) -> None:
        if step.stage not in seen:
            seen.add(step.stage)
            print(plain(f"{step.stage} {step.message}".rstrip()), flush=True)

    return show
