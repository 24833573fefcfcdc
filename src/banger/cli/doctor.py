"""`banger doctor`."""

from __future__ import annotations

import contextlib
from dataclasses import replace

import click

from banger.api import models as m
from banger.cli import errors
from banger.cli.lazy import Command
from banger.cli.options import json_option
from banger.cli.render import plain, print_json

_DAEMON_SECONDS = 5.0  # one that takes longer hangs


@click.command(
    cls=Command,
    epilog="""
    banger doctor
    banger doctor --quick
    banger doctor --json
    """,
)
@click.option("--quick", is_flag=True, help="Only look: boot no guest and start no network.")
@json_option
def doctor(quick: bool, as_json: bool) -> int:
    """Check what banger needs of this host, and say how to get it. Exits 1 when something needed is missing.

    It boots a guest for a moment, starts a network, and makes namespaces and a control group. Nothing of that stays,
    and VMs that run do not notice. --quick leaves that out.
    """
    from banger.cli.progress import Display
    from banger.doctor import examine, look
    from banger.job import Progress

    if quick:
        found = look()
    else:
        with Display() as display:
            report = display.reporter("doctor")
            found = examine(lambda what: report(Progress("trying", what)))
    found = replace(found, checks=_as_the_daemon_sees(found.checks))
    if as_json:
        print_json(found)
    else:
        _print(found)
    return errors.FAILED if any(check.status == "fail" for check in found.checks) else 0


def _print(found: m.Doctor) -> None:
    width = max((len(check.name) for check in found.checks), default=0)
    combined = found.install or found.install_more
    for check in found.checks:
        print(plain(f"{check.status:<4}  {check.name:<{width}}  {check.message}"))
        if check.fix and not (check.package and combined):
            print(plain(f"{'':<4}  {'':<{width}}  fix: {check.fix}"))
    for what, command in (("Install what is missing", found.install), ("Not needed, but of use", found.install_more)):
        if command:
            print(f"\n{what}:\n  {plain(command)}")


def _as_the_daemon_sees(checks: list[m.Check]) -> list[m.Check]:
    """The checks with the control groups of the daemon, if one runs: VMMs are started in its groups, not in ours."""
    from banger.api.client import call_over
    from banger.api.errors import BangerError
    from banger.api.operations import DAEMON_DOCTOR
    from banger.paths import user_layout
    from banger.system import connect_unix
    from banger.trials import GROUPS

    with contextlib.suppress(BangerError, OSError), connect_unix(user_layout().socket, _DAEMON_SECONDS) as connection:
        theirs = {check.name: check for check in call_over(connection, DAEMON_DOCTOR, m.Empty()).checks}
        return [theirs.get(GROUPS, check) if check.name == GROUPS else check for check in checks]
    return checks
