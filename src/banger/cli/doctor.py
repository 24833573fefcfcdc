"""`banger doctor`."""

from __future__ import annotations

import click

from banger.api import models as m
from banger.cli import errors
from banger.cli.lazy import Command
from banger.cli.options import json_option
from banger.cli.render import plain, print_json


@click.command(
    cls=Command,
    epilog="""
    banger doctor
    banger doctor --json
    """,
)
@json_option
def doctor(as_json: bool) -> int:
    """Check what banger needs of this host, and say how to get it. Exits 1 when something needed is missing."""
    from banger.doctor import run_checks

    checks = run_checks()
    if as_json:
        print_json(m.Doctor(checks))
    else:
        width = max((len(check.name) for check in checks), default=0)
        for check in checks:
            print(plain(f"{check.status:<4}  {check.name:<{width}}  {check.message}"))
            if check.fix:
                print(plain(f"{'':<4}  {'':<{width}}  fix: {check.fix}"))
    return errors.FAILED if any(check.status == "fail" for check in checks) else 0
