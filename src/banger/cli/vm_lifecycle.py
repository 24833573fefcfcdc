"""`banger vm start`, `stop`, `restart`, `kill`, `rm` and `prune`."""

from __future__ import annotations

import sys
from collections.abc import Sequence

import click

from banger.api import models as m
from banger.api import operations as op
from banger.api.client import Client
from banger.api.errors import BangerError, Code
from banger.cli import errors
from banger.cli.connect import ensure_daemon
from banger.cli.errors import UsageFault
from banger.cli.lazy import Command
from banger.cli.many import for_each
from banger.cli.options import DURATION, configured, filter_option, json_option
from banger.cli.progress import Display
from banger.cli.render import note, print_json
from banger.cli.select import DOWN, pick, select, selection
from banger.cli.timings import print_timings
from banger.system import human_size

grace_option = click.option(
    "--grace",
    type=DURATION,
    help="How long the guest may take to go down by itself: 2s, 1m." + configured("10s", "stop_grace"),
)


def _is_up(vm: m.VmInfo) -> bool:
    return vm.state not in DOWN


@click.command(
    cls=Command,
    epilog="""
    banger vm start web db
    banger vm start --timings web
    """,
)
@selection
@click.option("--timings", is_flag=True, help="Tell how long each stage took.")
@json_option
def start(refs: tuple[str, ...], filters: tuple[str, ...], all_vms: bool, timings: bool, as_json: bool) -> int:
    """Start VMs."""
    names = select(refs, filters, all_vms, lambda vm: not _is_up(vm))
    client = ensure_daemon()
    started: list[m.VmStarted] = []

    def start_one(ref: str) -> m.VmStarted:
        result = client.call(op.VM_START, m.VmRef(ref), display.reporter(f"starting {ref}"))
        started.append(result)
        return result

    with Display() as display:
        status = for_each(names, start_one, lambda ref, result: f"started {result.vm.name}", as_json, display)
    if timings:
        for result in started:
            print_timings(result)
    return status


@click.command(
    cls=Command,
    epilog="""
    banger vm stop web db
    banger vm stop --grace 2s web
    banger vm stop --filter label=tier=dev
    banger vm stop --all
    """,
)
@selection
@grace_option
@json_option
def stop(refs: tuple[str, ...], filters: tuple[str, ...], all_vms: bool, grace: float | None, as_json: bool) -> int:
    """Stop VMs, by force after a grace period.

    The main command gets its stop signal first, then all get SIGTERM. An init of the image does it by its own means.
    """
    names = select(refs, filters, all_vms, _is_up)
    client = ensure_daemon()
    with Display() as display:
        return for_each(
            names,
            lambda ref: client.call(op.VM_STOP, m.VmStop(ref, grace), display.reporter(f"stopping {ref}")),
            lambda ref, result: (
                f"stopped {result.vm.name}" + (" by force: it did not go down by itself" if result.forced else "")
            ),
            as_json,
            display,
        )


@click.command(cls=Command, epilog="banger vm restart web")
@selection
@grace_option
@json_option
def restart(refs: tuple[str, ...], filters: tuple[str, ...], all_vms: bool, grace: float | None, as_json: bool) -> int:
    """Stop VMs if they run, and start them again."""
    names = select(refs, filters, all_vms, _is_up)
    client = ensure_daemon()
    with Display() as display:
        return for_each(
            names,
            lambda ref: client.call(op.VM_RESTART, m.VmStop(ref, grace), display.reporter(f"restarting {ref}")),
            lambda ref, result: f"restarted {result.vm.name}",
            as_json,
            display,
        )


@click.command(cls=Command, epilog="banger vm kill web")
@selection
@json_option
def kill(refs: tuple[str, ...], filters: tuple[str, ...], all_vms: bool, as_json: bool) -> int:
    """Stop VMs at once, like pulling the plug."""
    names = select(refs, filters, all_vms, _is_up)
    client = ensure_daemon()
    return for_each(
        names,
        lambda ref: client.call(op.VM_KILL, m.VmRef(ref)),
        lambda ref, vm: f"killed {vm.name}",
        as_json,
    )


@click.command(
    "rm",
    cls=Command,
    epilog="""
    banger vm rm web db
    banger vm rm --force web                 also when it runs
    banger vm rm --filter 'name=test-*'
    """,
)
@selection
@click.option("-f", "--force", is_flag=True, help="Kill those that run.")
@json_option
def remove(refs: tuple[str, ...], filters: tuple[str, ...], all_vms: bool, force: bool, as_json: bool) -> int:
    """Remove VMs and their disks."""
    names = select(refs, filters, all_vms, lambda vm: True)
    client = ensure_daemon()
    return for_each(
        names,
        lambda ref: client.call(op.VM_DELETE, m.VmRemove(ref, force)),
        lambda ref, result: f"removed {', '.join(result.names) or ref}, freed {human_size(result.freed_bytes)}",
        as_json,
    )


@click.command(
    cls=Command,
    epilog="""
    banger vm prune
    banger vm prune --force                       without asking
    banger vm prune --filter label=tier=dev
    """,
)
@click.option("-f", "-y", "--force", is_flag=True, help="Do not ask.")
@filter_option
@json_option
def prune(force: bool, filters: tuple[str, ...], as_json: bool) -> int:
    """Remove every stopped VM and its disks."""
    if not force and not sys.stdin.isatty():
        raise UsageFault("this removes every stopped VM, and there is no terminal to ask on", "add --force")
    client = ensure_daemon()
    if filters or not force:
        stopped = [vm for vm in pick(client.call(op.VM_LIST, m.Empty()).vms, filters) if vm.state in DOWN]
    if not force:
        if not stopped:
            note("there is no stopped VM")
            return 0
        note(f"This removes: {', '.join(vm.name for vm in stopped)}")
        if not click.confirm("Remove them and their disks?", err=True):
            return errors.FAILED
    removed = _remove_stopped(client, stopped) if filters else client.call(op.VM_PRUNE, m.Empty())
    if as_json:
        print_json(removed)
    elif removed.names:
        print(f"removed {', '.join(removed.names)}, freed {human_size(removed.freed_bytes)}")
    else:
        print("there is no stopped VM")
    return 0


def _remove_stopped(client: Client, vms: Sequence[m.VmInfo]) -> m.VmRemoved:
    """Remove these VMs, but for those that have been started or removed meanwhile."""
    names, freed = [], 0
    for vm in vms:
        try:
            removed = client.call(op.VM_DELETE, m.VmRemove(vm.id))
        except BangerError as error:
            if error.code not in (Code.WRONG_STATE, Code.NOT_FOUND):
                raise
        else:
            names += removed.names
            freed += removed.freed_bytes
    return m.VmRemoved(names, freed)
