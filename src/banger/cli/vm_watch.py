"""`banger vm wait`, `events` and `inspect`."""

from __future__ import annotations

import json

import click

from banger.api import models as m
from banger.api import operations as op
from banger.api.codec import Json, decode, decode_error
from banger.cli import errors
from banger.cli.connect import ensure_daemon
from banger.cli.errors import UsageFault
from banger.cli.lazy import Command
from banger.cli.many import for_each
from banger.cli.options import DURATION, EVENT_FILTER, VM, ConditionType, json_option
from banger.cli.render import note, plain, print_json
from banger.cli.terminal import went_away

_STATES = ("stopped", "running", "exited", "removed")


@click.command(
    cls=Command,
    epilog="""
    banger vm wait web db                         until both are stopped
    banger vm wait web --for running --timeout 30s
    banger vm wait job --for exited               until its main command has ended; prints its status
    banger vm wait web --for 80                   until something in it listens on this port
    banger vm wait web --for http://:80/health    until a GET of this in it succeeds
    banger vm wait db --for 'log:ready to accept' until its main command has printed this
    banger vm wait db --for exec:pg_isready       until this succeeds in its shell
    banger vm wait web --for health               until the HEALTHCHECK of its image succeeds
    """,
)
@click.argument("refs", type=VM, nargs=-1, required=True, metavar="REF...")
@click.option(
    "--for",
    "state",
    type=ConditionType(_STATES),
    metavar="|".join((*_STATES, "CONDITION")),
    default="stopped",
    show_default=True,
    help="What to wait for. It is exited when its main command has ended and no restart policy runs it again; one that "
    "is removed is stopped and exited, too. A CONDITION, as in the examples, is met when its guest is ready; waiting "
    "for one fails when the VM or its main command ends first.",
)
@click.option("--timeout", type=DURATION, help="Wait no longer than this; 0 only looks.")
@json_option
def wait(refs: tuple[str, ...], state: str, timeout: float | None, as_json: bool) -> int:
    """Wait until VMs are stopped, in another state, or ready, and say why they are.

    Exits with 0 when all are, 124 when one is not within --timeout, and 1 when one cannot be waited for.
    """
    client = ensure_daemon()
    unmet: set[str] = set()

    def wait_for(ref: str) -> m.VmWaited:
        end = client.call(op.VM_WAIT, m.VmWait(ref, state, timeout))
        if not end.reached:
            unmet.add(ref)
        return end

    # all at once: the time given is that of each
    status = for_each(refs, wait_for, lambda ref, end: _end(end, state), as_json, parallel=len(refs))
    if not unmet:
        return status
    names = ", ".join(ref for ref in dict.fromkeys(refs) if ref in unmet)
    errors.report(
        f"not {state if state in _STATES else 'ready'} within the time given: {names}", "give it more with --timeout"
    )
    return errors.TIMED_OUT


def _end(end: m.VmWaited, wanted: str) -> str:
    if wanted not in _STATES:
        return f"{end.name} is {'ready' if end.reached else 'not ready'}"
    if not end.reached:
        return f"{end.name} is still {end.state}"
    words = [f"{end.name} is {end.state}"]
    if end.reason and end.reason != end.state:
        words.append(f": {end.reason}")
    if end.status is not None and end.state == "running":
        words.append("; its main command has ended")
    if end.status is not None:
        words.append(f" (exit status {end.status})")
    return "".join(words)


@click.command(
    cls=Command,
    epilog="""
    banger vm events
    banger vm events web --since 1h --no-follow
    banger vm events --filter kind=stopped --filter label=tier=web --json
    """,
)
@click.argument("refs", type=VM, nargs=-1, metavar="[REF...]")
@click.option("--since", type=DURATION, default=0.0, help="First those of the last so long, as far as they are kept.")
@click.option("--no-follow", is_flag=True, help="Do not wait for those to come.")
@click.option(
    "--filter",
    "filters",
    type=EVENT_FILTER,
    multiple=True,
    help="Only events that meet it, such as kind=stopped or label=tier=web. Can be given several times.",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document a line.")
def events(refs: tuple[str, ...], since: float, no_follow: bool, filters: tuple[str, ...], as_json: bool) -> int:
    """Follow what happens to VMs: created, started, stopped, exited, restarting, renamed, changed, removed and more.

    The newest 1,024 are kept, over restarts of the daemon and of the host, too.
    """
    if no_follow and not since:
        raise UsageFault("--no-follow needs --since: there is nothing else to print", "for example --since 1h")
    request = m.VmEvents(list(refs), list(filters), since, not no_follow)
    with ensure_daemon().open(op.VM_EVENTS, request) as stream:
        for message in stream.messages():
            if isinstance(message, bytes):
                continue
            match message.get("event"):
                case "vm":
                    _print_event(message, as_json)
                case "exit":
                    return 0
                case "error":
                    raise decode_error(message.get("error"))
    raise went_away()


def _print_event(message: dict[str, Json], as_json: bool) -> None:
    if missed := message.get("missed"):
        note(f"{missed} events were lost: they came faster than they were read")
    if message.get("result") is None:
        return
    if as_json:
        print(json.dumps(message["result"]), flush=True)
        return
    event = decode(m.VmEvent, message["result"])
    details = [f"{name}={_quoted(value)}" for name, value in event.details.items()]
    print(plain("  ".join([event.time, f"{event.kind:<13}", event.name, *details])), flush=True)


def _quoted(text: str) -> str:
    return text if text and " " not in text else json.dumps(text)


@click.command(cls=Command, epilog="banger vm inspect web")
@click.argument("refs", type=VM, nargs=-1, required=True, metavar="REF...")
@click.option("--json", is_flag=True, expose_value=False, help="As it is without: JSON is all that it prints.")
def inspect(refs: tuple[str, ...]) -> None:
    """Print all that is known of VMs as JSON: what 'vm show' tells, the record with its machine, and the files."""
    client = ensure_daemon()
    print_json([client.call(op.VM_INSPECT, m.VmRef(ref)) for ref in refs])
