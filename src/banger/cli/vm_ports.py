"""`banger vm ports`."""

from __future__ import annotations

import click

from banger.api import models as m
from banger.api import operations as op
from banger.cli.connect import ensure_daemon
from banger.cli.lazy import Command
from banger.cli.options import VM, json_option
from banger.cli.render import format_address, note, print_json, print_lines, table_lines
from banger.system import counted


@click.command(
    cls=Command,
    epilog="""
    banger vm ports web
    banger vm ports web --no-probe --json
    """,
)
@click.argument("ref", type=VM, metavar="REF")
@click.option("--no-probe", is_flag=True, help="Do not connect to TCP ports to see whether they speak HTTP.")
@json_option
def ports(ref: str, no_probe: bool, as_json: bool) -> None:
    """List what listens in a running VM, and where the host finds it: as a URL where it speaks HTTP."""
    found = ensure_daemon().call(op.VM_PORTS, m.VmPortsRequest(ref, probe=not no_probe))
    if as_json:
        print_json(found)
        return
    rows = [
        [
            f"{port.port}/{port.protocol}",
            ", ".join(port.addresses),
            _process(port),
            port.speaks,
            ", ".join(port.urls or map(format_address, port.published)),
        ]
        for port in found.ports
    ]
    if not rows:
        note(f"nothing listens in {found.name}")
        return
    print_lines(table_lines(["PORT", "ADDRESS", "PROCESS", "SPEAKS", "ON THE HOST"], rows))
    for line in _advice(found):
        note(line)


def _process(port: m.GuestPort) -> str:
    return port.process if port.pid is None else f"{port.process} ({port.pid})"


def _advice(found: m.VmPorts) -> list[str]:
    """What is to be known about ports that are not found on the host."""
    tcp = [port for port in found.ports if port.protocol == "tcp"]
    unpublished = [port.port for port in tcp if port.reachable and not port.published]
    hidden = [port.port for port in tcp if port.addresses and not port.reachable]
    silent = [port.port for port in tcp if not port.addresses]
    lines = []
    if silent:
        lines.append(f"published, but nothing listens there: {_list(silent)}")
    if hidden:
        lines.append(f"published ports do not lead to {_list(hidden)}: let it listen on 0.0.0.0")
    if unpublished and found.net == "none":
        lines.append(f"{found.name} has no network, so that its ports cannot be published")
    elif unpublished:
        lines.append(
            f"not published: {_list(unpublished)}; for example: banger vm set {found.name} -p {unpublished[0]}"
        )
    if found.unprobed:
        lines.append(f"not asked what they speak, since there are so many: {counted(found.unprobed, 'port')}")
    return lines


def _list(ports: list[int]) -> str:
    return ", ".join(str(port) for port in dict.fromkeys(ports))
