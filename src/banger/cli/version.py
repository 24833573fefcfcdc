"""`banger version`."""

from __future__ import annotations

import click

from banger import __version__
from banger.cli.lazy import Command
from banger.cli.options import json_option
from banger.cli.render import print_json


@click.command(cls=Command, epilog="banger version")
@json_option
def version(as_json: bool) -> None:
    """Print banger's version."""
    if as_json:
        print_json({"version": __version__})
    else:
        print(f"banger {__version__}")
