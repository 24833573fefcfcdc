"""`banger daemon`: the background process behind all commands."""

from __future__ import annotations

import click

from banger import __version__, stdio
from banger.api import models as m
from banger.api import operations as op
from banger.api.client import Client
from banger.cli import errors
from banger.cli.connect import ensure_daemon, find_daemon, start_daemon, stop_daemon, stop_daemon_for_another
from banger.cli.lazy import Command, Entry, LazyGroup
from banger.cli.options import Whole, json_option
from banger.cli.render import duration, note, print_fields, print_json
from banger.cli.terminal import copy_output
from banger.installation import PACKAGE
from banger.paths import user_layout
from banger.system import human_size

DAEMON = LazyGroup(
    "daemon",
    {
        "status": Entry("daemon", "status", "Show whether it runs, and how."),
        "start": Entry("daemon", "start", "Start it now rather than with the first command."),
        "stop": Entry("daemon", "stop", "Stop it; VMs go on."),
        "restart": Entry("daemon", "restart", "Stop it and start it again; VMs go on."),
        "logs": Entry("daemon", "logs", "Print its log."),
    },
    help="""The background process behind all commands.

    It starts with the first command that needs it. VMs do not depend on it: it can be stopped at any time.""",
)


@click.command(cls=Command, epilog="banger daemon status")
@json_option
def status(as_json: bool) -> int:
    """Show whether the daemon runs, and how. Exits 1 when it does not."""
    client = Client(user_layout().socket)
    if find_daemon(client) is None:
        if as_json:
            print_json({"running": False})
        else:
            note("the daemon is not running")
        return errors.FAILED
    found = client.call(op.DAEMON_STATUS, m.Empty())
    if as_json:
        print_json({"running": True} | vars(found))
        return 0
    print_fields(
        [
            ("pid", str(found.pid)),
            ("version", found.version + ("" if found.version == __version__ else f" (this is {__version__})")),
            (
                "installation",
                found.installation + ("" if found.installation == str(PACKAGE) else f" (this is {PACKAGE})"),
            ),
            ("started by", "systemd" if found.activated else ""),
            ("uptime", duration(found.uptime)),
            ("memory", human_size(found.resident_bytes)),
            ("running VMs", str(found.vms_running)),
            ("operations", str(found.busy)),
            ("driver", f"{found.driver} ({found.driver_reason})" if found.driver_reason else found.driver),
            ("socket", found.socket),
            ("state", found.state_directory),
            ("log", found.log_file),
            *(("warning", warning) for warning in found.warnings),
        ]
    )
    return 0


@click.command(cls=Command, epilog="banger daemon start")
def start() -> None:
    """Start the daemon now rather than with the first command."""
    layout = user_layout()
    if find_daemon(Client(layout.socket)) is not None:
        print("the daemon is already running")
        return
    start_daemon(layout)
    print("started the daemon")


@click.command(cls=Command, epilog="banger daemon stop")
def stop() -> None:
    """Stop the daemon; VMs go on."""
    client = Client(user_layout().socket)
    if find_daemon(client) is None:
        print("the daemon is not running")
        return
    stop_daemon(client)
    print("stopped the daemon; VMs go on")


@click.command(cls=Command, epilog="banger daemon restart")
def restart() -> None:
    """Stop the daemon and start it again, with what config.toml says now; VMs go on.

    Where config.toml cannot be read, the daemon is not stopped.
    """
    layout = user_layout()
    client = Client(layout.socket)
    if find_daemon(client) is not None:
        stop_daemon_for_another(layout, client)
    start_daemon(layout)
    print("restarted the daemon")


@click.command(
    cls=Command,
    epilog="""
    banger daemon logs -n 20
    banger daemon logs -f
    """,
)
@click.option("-f", "--follow", is_flag=True, help="Go on with what comes.")
@click.option("-n", "--tail", type=Whole(0), metavar="LINES", help="Only that many lines from the end.")
def logs(follow: bool, tail: int | None) -> int:
    """Print the daemon's log: its starts and stops, the VMs that it took over, and what went wrong. Times are in UTC.

    Unless the log is followed, the daemon need not run.
    """
    layout = user_layout()
    if not follow:
        return _print_log_file(tail)
    with ensure_daemon(layout).open(op.DAEMON_LOGS, m.DaemonLogs(follow=follow, tail=tail)) as stream:
        return copy_output(stream)


def _print_log_file(tail: int | None) -> int:
    import sys
    from collections import deque

    layout = user_layout()
    path = layout.log_file
    lines: deque[bytes] = deque(maxlen=tail)
    found = False
    for name in (path.with_name(f"{path.name}.1"), path):
        try:
            with open(name, "rb") as log:
                lines.extend(log)
            found = True
        except FileNotFoundError:
            continue
    if not found and find_daemon(Client(layout.socket)) is not None:
        note(f"there is no {path}: the daemon logs to where whoever started it wanted, such as the journal of systemd")
        return errors.FAILED
    if not found:
        note("there is no log: the daemon has not run yet")
        return errors.FAILED
    if not lines and tail != 0:
        note("the log is empty: nothing was worth a line at this BANGER_LOG_LEVEL")
    with stdio.writing(stdio.STDOUT):
        sys.stdout.buffer.writelines(lines)
    return 0
