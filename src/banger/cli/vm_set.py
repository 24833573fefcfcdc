"""`banger vm set`."""

from __future__ import annotations

import click

from banger.api import models as m
from banger.api import operations as op
from banger.cli.connect import ensure_daemon
from banger.cli.errors import UsageFault
from banger.cli.lazy import Command
from banger.cli.options import (
    PUBLISH,
    SIZE,
    VM,
    Whole,
    auto_stop_option,
    balloon_option,
    json_option,
    label_option,
    resolve_env,
    restart_option,
)
from banger.cli.progress import Display
from banger.cli.render import note, plain, print_json

# What is decided when a VM is created: people try to change it all the same, and get told so.
_FIXED = ("image", "kernel", "net", "init", "entrypoint", "user", "workdir", "stop-signal", "vmm")


def _refuse(context: click.Context, option: click.Parameter, value: object) -> None:
    if value is not None:
        name = option.opts[0].removeprefix("--")
        what = name.replace("-", " ")
        raise UsageFault(f"the {what} of a VM cannot be changed", f"create another one: banger vm create --{name} ...")


@click.command(
    "set",
    cls=Command,
    epilog="""
    banger vm set web --memory 2G --vcpu 2          at its next start, if it runs
    banger vm set web --disk-size 64G               disks grow, also while it runs
    banger vm set web --name www -l tier=web
    banger vm set web -p 8443:443 --unpublish 80
    banger vm set web --auto-stop 2h --restart no --balloon
    """,
)
@click.argument("ref", type=VM, metavar="REF")
@click.option("--name", type=VM, metavar="NAME", help="Another name.")
@click.option("--vcpu", type=Whole(1), metavar="N", help="Number of processors.")
@click.option("--memory", type=SIZE, help="Memory.")
@click.option("--disk-size", "--disk", type=SIZE, help="Disk for everything but the home directory; it can only grow.")
@click.option("--home-size", "--home", type=SIZE, help="Disk for the home directory; it can only grow.")
@label_option
@click.option("--unset-label", "unset_labels", multiple=True, metavar="NAME", help="Take a label away.")
@click.option("-e", "--env", multiple=True, metavar="NAME[=VALUE]", help="Environment variable of its commands.")
@click.option("--unset-env", multiple=True, metavar="NAME", help="Take a variable away.")
@click.option("-p", "--publish", type=PUBLISH, multiple=True, help="Publish one more port.")
@click.option("--unpublish", type=PUBLISH, multiple=True, help="Publish a port no more; GUEST: all that lead there.")
@auto_stop_option
@restart_option()
@balloon_option
@json_option
def set_vm(
    ref: str,
    name: str | None,
    vcpu: int | None,
    memory: int | None,
    disk_size: int | None,
    home_size: int | None,
    labels: tuple[tuple[str, str], ...],
    unset_labels: tuple[str, ...],
    env: tuple[str, ...],
    unset_env: tuple[str, ...],
    publish: tuple[str, ...],
    unpublish: tuple[str, ...],
    auto_stop: float | None,
    restart: str | None,
    balloon: bool | None,
    as_json: bool,
) -> None:
    """Change what a VM is, and say what of it applies at once and what at its next start."""
    request = m.VmSet(
        vm=ref,
        name=name or "",
        vcpu=vcpu or 0,
        memory_bytes=memory or 0,
        disk_bytes=disk_size or 0,
        home_bytes=home_size or 0,
        labels=dict(labels),
        unset_labels=list(unset_labels),
        env=resolve_env(env),
        unset_env=list(unset_env),
        publish=list(publish),
        unpublish=list(unpublish),
        auto_stop=auto_stop,
        restart=restart or "",
        balloon=balloon,
    )
    if request == m.VmSet(ref):
        raise UsageFault("there is nothing to change", "say what, such as --memory 2G")
    with Display() as display:
        changed = ensure_daemon().call(op.VM_SET, request, display.reporter(f"changing {ref}"))
    if as_json:
        print_json(changed)
        return
    for names, when in ((changed.at_once, "changed"), (changed.at_next_start, "at its next start")):
        if names:
            print(plain(f"{changed.vm.name}: {', '.join(names)}: {when}"))
    if "ports" in changed.at_next_start:
        note(f"{changed.why_ports_wait}; now: banger vm restart {changed.vm.name}")
    if not changed.at_once and not changed.at_next_start:
        print(plain(f"{changed.vm.name} is so already"))


for _name in _FIXED:
    _option = click.Option([f"--{_name}"], hidden=True, expose_value=False, callback=_refuse)
    set_vm.params.append(_option)
