"""`banger kernel`: the local kernel catalog and what can be pulled into it."""

from __future__ import annotations

import click

from banger.api import models as m
from banger.api import operations as op
from banger.cli.connect import ensure_daemon
from banger.cli.lazy import Command, Entry, LazyGroup
from banger.cli.many import for_each
from banger.cli.options import KERNEL, LOCAL_PATH, json_option
from banger.cli.progress import Display
from banger.cli.render import age, plain, print_fields, print_json, print_table
from banger.system import human_size

KERNEL_GROUP = LazyGroup(
    "kernel",
    {
        "list": Entry("kernel", "list_kernels", "List local kernels, or those that can be pulled."),
        "show": Entry("kernel", "show", "Show one local kernel."),
        "pull": Entry("kernel", "pull", "Fetch a kernel of the catalog."),
        "import": Entry("kernel", "import_kernel", "Make a kernel from packages or files."),
        "rm": Entry("kernel", "remove", "Remove local kernels."),
    },
    help="""Kernels that VMs boot.

    A kernel is pulled from the catalog or imported from files. VMs keep the kernel they were created with.""",
    examples="""
    banger kernel list --available    what can be pulled
    banger kernel pull NAME           fetch one
    """,
)


@click.command(
    "list",
    cls=Command,
    epilog="""
    banger kernel list
    banger kernel list --available --json
    """,
)
@click.option("--available", is_flag=True, help="List what can be pulled instead.")
@json_option
def list_kernels(available: bool, as_json: bool) -> None:
    """List local kernels, or those that can be pulled."""
    client = ensure_daemon()
    if available:
        catalog = client.call(op.KERNEL_CATALOG, m.Empty())
        if as_json:
            print_json(catalog)
            return
        print_table(
            ["NAME", "STATE", "ARCH", "DISTRO", "VERSION", "SIZE", "DESCRIPTION"],
            [
                [
                    entry.name,
                    entry.state,
                    entry.arch,
                    entry.distro,
                    entry.kernel_version,
                    human_size(entry.size_bytes) if entry.size_bytes else "",
                    entry.description,
                ]
                for entry in catalog.entries
            ],
        )
        return
    local = client.call(op.KERNEL_LIST, m.Empty())
    if as_json:
        print_json(local)
        return
    print_table(
        ["NAME", "VERSION", "ARCH", "DISTRO", "SIZE", "IMPORTED", "PROBLEM"],
        [
            [
                kernel.name,
                kernel.kernel_version,
                kernel.arch,
                kernel.distro,
                human_size(kernel.size_bytes),
                age(kernel.imported_at),
                kernel.problem,
            ]
            for kernel in local.kernels
        ],
        optional=("PROBLEM",),
    )


@click.command(cls=Command, epilog="banger kernel show NAME")
@click.argument("name", type=KERNEL)
@json_option
def show(name: str, as_json: bool) -> None:
    """Show one local kernel."""
    print_kernel(ensure_daemon().call(op.KERNEL_SHOW, m.NameRequest(name)), as_json)


@click.command(
    cls=Command,
    epilog="""
    banger kernel list --available
    banger kernel pull NAME
    """,
)
@click.argument("name", type=KERNEL)
@click.option("--arch", default="", help="Architecture of the kernel instead of this host's.")
@click.option("--force", is_flag=True, help="Replace a local kernel of that name.")
@json_option
def pull(name: str, arch: str, force: bool, as_json: bool) -> None:
    """Fetch a kernel of the catalog."""
    with Display() as display:
        request = m.KernelPull(name=name, arch=arch, force=force)
        kernel = ensure_daemon().call(op.KERNEL_PULL, request, display.reporter(f"pulling {name}"))
    print_arrived(kernel, as_json, "pulled")


@click.command(
    "import",
    cls=Command,
    epilog="""
    banger kernel import custom --from build/kernel
    banger kernel import deb --from linux-image.deb --from linux-modules.deb
    banger kernel import plain --from vmlinux --kernel-version 6.12.1
    """,
)
@click.argument("name", type=KERNEL)
@click.option(
    "--from",
    "sources",
    type=LOCAL_PATH,
    multiple=True,
    required=True,
    help="A package, a directory or a kernel file; can be given several times.",
)
@click.option("--distro", default="", help="Distribution that it comes from.")
@click.option("--arch", default="", help="Its architecture, where the files do not tell.")
@click.option("--kernel-version", default="", help="Its version, where the files do not tell.")
@click.option("--force", is_flag=True, help="Replace a local kernel of that name.")
@json_option
def import_kernel(
    name: str, sources: tuple[str, ...], distro: str, arch: str, kernel_version: str, force: bool, as_json: bool
) -> None:
    """Make a kernel from packages or files of this host."""
    request = m.KernelImport(
        name=name, sources=list(sources), distro=distro, arch=arch, kernel_version=kernel_version, force=force
    )
    with Display() as display:
        kernel = ensure_daemon().call(op.KERNEL_IMPORT, request, display.reporter(f"importing {name}"))
    print_arrived(kernel, as_json, "imported")


@click.command("rm", cls=Command, epilog="banger kernel rm NAME OTHER")
@click.argument("names", type=KERNEL, nargs=-1, required=True)
def remove(names: tuple[str, ...]) -> int:
    """Remove local kernels. VMs keep their own copy."""
    client = ensure_daemon()
    return for_each(
        names,
        lambda name: client.call(op.KERNEL_DELETE, m.NameRequest(name)),
        lambda name, _: f"removed {name}",
    )


def print_arrived(kernel: m.KernelInfo, as_json: bool, verb: str) -> None:
    """Tell that a kernel is there now."""
    if as_json:
        print_json(kernel)
    else:
        size = human_size(kernel.size_bytes)
        print(plain(f"{verb} {kernel.name}: {kernel.kernel_version} {kernel.arch}, {size}"))


def print_kernel(kernel: m.KernelInfo, as_json: bool) -> None:
    """Print all there is to know about a kernel."""
    if as_json:
        print_json(kernel)
        return
    print_fields(
        [
            ("name", kernel.name),
            ("version", kernel.kernel_version),
            ("arch", kernel.arch),
            ("distro", kernel.distro),
            ("size", human_size(kernel.size_bytes)),
            ("source", kernel.source),
            ("sha256", kernel.sha256),
            ("imported", kernel.imported_at),
            ("problem", kernel.problem),
        ]
    )
