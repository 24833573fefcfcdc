"""Which VMs a command is for: those that are named, those that pass filters, or all."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import click

from banger.api import models as m
from banger.api import operations as op
from banger.api.vm_filters import VM_KEYS, matches, parse_filters
from banger.cli.connect import ensure_daemon
from banger.cli.errors import UsageFault
from banger.cli.options import VM, Decorated, filter_option
from banger.cli.render import note

DOWN = ("created", "stopped")


def selection(function: Decorated) -> Decorated:
    """VMs by name, by --filter or with --all; the function gets `refs`, `filters` and `all_vms`."""
    for option in (
        click.option("-a", "--all", "all_vms", is_flag=True, help="All VMs that this makes sense for."),
        filter_option,
        click.argument("refs", type=VM, nargs=-1, metavar="REF..."),
    ):
        function = option(function)
    return function


def select(refs: Sequence[str], filters: Sequence[str], all_vms: bool, fits: Callable[[m.VmInfo], bool]) -> list[str]:
    """The names that were given, or of those that `fits` the ids of the VMs that pass all filters."""
    if refs and (filters or all_vms):
        raise UsageFault("VMs are either named or picked with --filter or --all")
    if not (refs or filters or all_vms):
        raise UsageFault("missing argument 'REF...'", "name VMs, or pick them with --filter or --all")
    if refs:
        return list(refs)
    found = [vm.id for vm in pick(ensure_daemon().call(op.VM_LIST, m.Empty()).vms, filters) if fits(vm)]
    if not found:
        note("there is no such VM")
    return found


def pick(vms: Sequence[m.VmInfo], filters: Sequence[str]) -> list[m.VmInfo]:
    """Those of the VMs that pass all filters."""
    conditions = parse_filters(filters, VM_KEYS)
    return [vm for vm in vms if matches(vm, conditions)]
