"""`banger vm list`, `show` and `logs`, and `banger ps`."""

from __future__ import annotations

import shlex
from collections.abc import Sequence

import click

from banger.api import models as m
from banger.api import operations as op
from banger.cli.connect import ensure_daemon
from banger.cli.lazy import Command
from banger.cli.options import VM, Whole, filter_option, json_option
from banger.cli.render import age, format_address, known_size, print_fields, print_json, print_lines, table_lines
from banger.cli.select import pick
from banger.durations import format_duration
from banger.system import human_size

_label_option = click.option(
    "-l",
    "--label",
    "labels",
    multiple=True,
    metavar="NAME[=VALUE]",
    help="Only VMs with this label.",
)
_quiet_option = click.option("-q", "--quiet", is_flag=True, help="Print names only, one a line.")


@click.command(
    "list",
    cls=Command,
    epilog="""
    banger vm list
    banger vm list --filter state=stopped --filter 'name=test-*'
    banger vm list --label tier=web --json
    """,
)
@click.option("-a", "--all", is_flag=True, hidden=True, expose_value=False)  # habit: it lists all in any case
@_quiet_option
@filter_option
@_label_option
@json_option
def list_vms(quiet: bool, filters: tuple[str, ...], labels: tuple[str, ...], as_json: bool) -> None:
    """List all VMs."""
    _print_vms(True, quiet, filters, labels, as_json)


@click.command(
    cls=Command,
    epilog="""
    banger ps
    banger ps -a
    banger ps -q | xargs banger stop
    """,
)
@click.option("-a", "--all", "all_states", is_flag=True, help="Also those that do not run.")
@_quiet_option
@filter_option
@_label_option
@json_option
def ps(all_states: bool, quiet: bool, filters: tuple[str, ...], labels: tuple[str, ...], as_json: bool) -> None:
    """List the running VMs."""
    _print_vms(all_states, quiet, filters, labels, as_json)


@click.command(cls=Command, epilog="banger vm show web")
@click.argument("ref", type=VM, metavar="REF")
@json_option
def show(ref: str, as_json: bool) -> None:
    """Show one VM."""
    vm = ensure_daemon().call(op.VM_SHOW, m.VmRef(ref))
    if as_json:
        print_json(vm)
        return
    print_fields(
        [
            ("name", vm.name),
            ("id", vm.id),
            ("state", f"{vm.state} ({vm.reason})" if vm.reason else vm.state),
            *(("warning", warning) for warning in vm.warnings),
            ("image", vm.image),
            ("kernel", vm.kernel),
            ("machine", " ".join(filter(None, (vm.driver, vm.accelerator, vm.machine, vm.arch)))),
            ("because", vm.driver_reason),
            ("vcpu", str(vm.vcpu)),
            ("memory", human_size(vm.memory_bytes)),
            ("disk", f"{human_size(vm.disk_bytes)}, {human_size(vm.used_bytes)} used with home"),
            ("home", known_size(vm.home_bytes)),
            ("init", f"{vm.init}: {vm.pid1}" if vm.pid1 not in ("", vm.init) else vm.init),
            ("net", vm.net),
            *(("port", format_port(port)) for port in vm.ports),
            ("exposed", ", ".join(vm.exposed_ports)),
            *(("volume", path) for path in vm.volumes),
            ("command", shlex.join(vm.command)),
            ("user", vm.user),
            ("workdir", vm.workdir),
            *(("env", entry) for entry in vm.env),
            ("stop signal", vm.stop_signal if (vm.pid1 or vm.init) != "image" else ""),
            ("auto-remove", "yes" if vm.auto_remove else ""),
            *(("label", f"{name}={value}" if value else name) for name, value in vm.labels.items()),
            ("auto-stop", format_duration(vm.auto_stop) if vm.auto_stop else ""),
            ("restart", _restart(vm) if vm.restart != "no" else ""),
            ("balloon", "on" if vm.balloon else ""),
            ("pending", f"{', '.join(_pending(vm))}: at its next start" if vm.pending else ""),
            ("exit status", "" if vm.status is None else str(vm.status)),
            ("created", vm.created_at),
            ("started", vm.started_at),
            ("pid", str(vm.pid) if vm.pid else ""),
            ("directory", vm.directory),
        ]
    )


@click.command(
    cls=Command,
    epilog="""
    banger vm logs web -n 20
    banger vm logs web --console -f
    """,
)
@click.argument("ref", type=VM, metavar="REF")
@click.option("--console", is_flag=True, help="What the kernel printed instead: errors and panics; it boots quietly.")
@click.option("-f", "--follow", is_flag=True, help="Go on with what comes, also over restarts.")
@click.option("-n", "--tail", type=Whole(0), metavar="LINES", help="Only that many lines from the end.")
def logs(ref: str, console: bool, follow: bool, tail: int | None) -> int:
    """Print the output of a VM's main command, that of its earlier starts first, or its console since the last start.

    Up to 16 MiB of output are kept; beyond 8 MiB the oldest are lost.
    """
    from banger.cli.terminal import copy_output

    request = m.VmLogs(vm=ref, console=console, follow=follow, tail=tail)
    with ensure_daemon().open(op.VM_LOGS, request) as stream:
        return copy_output(stream)


def _print_vms(all_states: bool, quiet: bool, filters: Sequence[str], labels: Sequence[str], as_json: bool) -> None:
    """Print the VMs that pass the filters and have the labels, the running ones or all of them."""
    conditions = [*filters, *(f"label={label}" for label in labels)]
    vms = pick(ensure_daemon().call(op.VM_LIST, m.Empty()).vms, conditions)
    shown = [vm for vm in vms if all_states or vm.state == "running"]
    if as_json:
        print_json(m.VmList(shown))
        return
    if quiet:
        print_lines([vm.name for vm in shown])
        return
    headers = ["NAME", "STATE", "IMAGE", "VCPU", "MEMORY", "USED", "PORTS", "CREATED", "UP", "REASON"]
    rows = [
        [
            vm.name,
            vm.state,
            vm.image,
            str(vm.vcpu),
            human_size(vm.memory_bytes),
            human_size(vm.used_bytes),
            ", ".join(map(format_port, vm.ports)),
            age(vm.created_at),
            age(vm.started_at) if vm.state == "running" else "",
            "; ".join(filter(None, (vm.reason, *vm.warnings))),
        ]
        for vm in shown
    ]
    print_lines(table_lines(headers, rows, optional=("PORTS", "UP", "REASON"), cut=True, narrow=("PORTS", "IMAGE")))


def _pending(vm: m.VmInfo) -> list[str]:
    """What its next start brings, with the values."""
    later = [f"vcpu {vm.next_vcpu}"] if vm.next_vcpu else []
    later += [f"memory {human_size(vm.next_memory_bytes)}"] if vm.next_memory_bytes else []
    if vm.next_ports is not None:
        later += [f"port {format_port(port)}" for port in vm.next_ports if port not in vm.ports]
        later += [f"no port {format_port(port)}" for port in vm.ports if port not in vm.next_ports]
    return later or vm.pending


def _restart(vm: m.VmInfo) -> str:
    return f"{vm.restart}, {vm.restarts} in a row so far" if vm.restarts else vm.restart


def format_port(port: m.PublishedPort) -> str:
    """A published port the way --publish takes it."""
    return f"{format_address(port)}:{port.guest_port}"
