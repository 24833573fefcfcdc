"""`banger kernel`: the local kernel catalog and what can be pulled into it."""

from __future__ import annotations

import click

from banger.api import models as m
from banger.api import operations as op
from banger.cli.connect import ensure_daemon
from banger.cli.lazy import Command, Entry, LazyGroup
from banger.cli.many import for_each
from banger.cli.options import ARCHITECTURES, KERNEL, KERNEL_SOURCE, NEW_FILE, PULLABLE_KERNEL, json_option
from banger.cli.progress import Display
from banger.cli.render import age, known_size, note, plain, print_fields, print_json, print_lines, table_lines
from banger.system import human_size

KERNEL_GROUP = LazyGroup(
    "kernel",
    {
        "list": Entry("kernel", "list_kernels", "List local kernels, or those that can be pulled."),
        "show": Entry("kernel", "show", "Show one local kernel."),
        "pull": Entry("kernel", "pull", "Fetch a kernel of a catalog, a registry or a URL."),
        "import": Entry("kernel", "import_kernel", "Make a kernel from packages, files or this host's own."),
        "verify": Entry("kernel", "verify", "Read local kernels again and check them."),
        "rm": Entry("kernel", "remove", "Remove local kernels."),
        "export": Entry("kernel", "export", "Write a kernel as a bundle that others can pull."),
        "catalog": Entry("kernel_catalog", "CATALOG_GROUP", "Manage the catalogs that kernels are pulled from."),
    },
    help="""Kernels that VMs boot.

    A kernel is pulled from a catalog or imported from files. VMs keep the kernel they were created with.""",
    examples="""
    banger kernel list --available    what can be pulled
    banger kernel pull NAME           fetch one
    banger kernel import NAME --from linux-image.deb
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
        print_lines(
            table_lines(
                ["NAME", "CATALOG", "STATE", "ARCH", "DISTRO", "VERSION", "SIZE", "DESCRIPTION"],
                [
                    [
                        entry.name,
                        entry.origin,
                        entry.state,
                        entry.arch,
                        entry.distro,
                        entry.kernel_version,
                        known_size(entry.size_bytes),
                        entry.description,
                    ]
                    for entry in catalog.entries
                ],
                cut=True,
            )
        )
        return
    local = client.call(op.KERNEL_LIST, m.Empty())
    if as_json:
        print_json(local)
        return
    print_lines(
        table_lines(
            ["NAME", "VERSION", "ARCH", "DISTRO", "SIZE", "IMPORTED", "PROBLEM"],
            [
                [
                    kernel.name,
                    kernel.kernel_version,
                    kernel.arch,
                    kernel.distro,
                    human_size(kernel.size_bytes),
                    age(kernel.imported_at),
                    kernel.problem and f"broken: {kernel.problem}",
                ]
                for kernel in local.kernels
            ],
            optional=("PROBLEM",),
        )
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
    banger kernel pull debian-cloud
    banger kernel pull corp/edge --as edge
    banger kernel pull ghcr.io/org/kernel:6.12
    banger kernel pull https://example.org/edge.tar.zst --sha256 DIGEST
    """,
)
@click.argument("name", metavar="NAME|REF|URL", type=PULLABLE_KERNEL)
@click.option("--sha256", metavar="DIGEST", default="", help="SHA-256 that the bundle must have; required for a URL.")
@click.option("--as", "save_as", metavar="NAME", type=KERNEL, help="Local name, instead of the one it has there.")
@click.option("--arch", type=click.Choice(ARCHITECTURES), help="Architecture, instead of this host's.")
@click.option("--force", is_flag=True, help="Replace a local kernel of that name, once the new one is complete.")
@json_option
def pull(name: str, sha256: str, save_as: str | None, arch: str | None, force: bool, as_json: bool) -> None:
    """Fetch a kernel: a catalog's NAME (or CATALOG/NAME), an image REF of an OCI registry, or the URL of a bundle."""
    request = m.KernelPull(name=name, save_as=save_as or "", sha256=sha256, arch=arch or "", force=force)
    with Display() as display:
        kernel = ensure_daemon().call(op.KERNEL_PULL, request, display.reporter(f"pulling {save_as or _shown(name)}"))
    print_arrived(kernel, as_json, "pulled")


def _shown(name: str) -> str:
    """What is pulled, without passwords and tokens in URLs: terminals are recorded."""
    if "://" not in name:
        return name
    from banger.download import public_url  # a large module that few commands need

    return public_url(name)


@click.command(
    "import",
    cls=Command,
    epilog="""
    banger kernel import custom --from build/manual/custom-kernel
    banger kernel import ubuntu --from linux-image.deb --from linux-modules.deb
    banger kernel import mine --from host
    """,
)
@click.argument("name", type=KERNEL)
@click.option(
    "--from",
    "sources",
    metavar="PATH|host",
    type=KERNEL_SOURCE,
    multiple=True,
    required=True,
    help="A package, archive, directory or kernel file; can be given several times. `host` is the running kernel.",
)
@click.option(
    "--distro", metavar="NAME", default="", help="Distribution that it comes from, where the files do not tell."
)
@click.option("--arch", type=click.Choice(ARCHITECTURES), help="Architecture that it must have.")
@click.option(
    "--kernel-version", metavar="VERSION", default="", help="Version that it must have; chooses among several."
)
@click.option("--force", is_flag=True, help="Replace a local kernel of that name.")
@json_option
def import_kernel(
    name: str, sources: tuple[str, ...], distro: str, arch: str | None, kernel_version: str, force: bool, as_json: bool
) -> None:
    """Make a kernel from packages, directories or files, or from this host's own."""
    request = m.KernelImport(
        name=name, sources=list(sources), distro=distro, arch=arch or "", kernel_version=kernel_version, force=force
    )
    with Display() as display:
        kernel = ensure_daemon().call(op.KERNEL_IMPORT, request, display.reporter(f"importing {name}"))
    print_arrived(kernel, as_json, "imported")


@click.command("rm", cls=Command, epilog="banger kernel rm NAME OTHER")
@click.argument("names", type=KERNEL, nargs=-1, required=True)
@click.option("--force", is_flag=True, help="Also when images or VMs refer to it; they keep their own copies.")
@json_option
def remove(names: tuple[str, ...], force: bool, as_json: bool) -> int:
    """Remove local kernels. VMs and images keep their own copies."""
    client = ensure_daemon()

    def delete(name: str) -> m.NameRequest:
        client.call(op.KERNEL_DELETE, m.KernelDelete(name, force))
        return m.NameRequest(name)

    return for_each(names, delete, lambda name, _: f"removed {name}", as_json)


@click.command(
    cls=Command,
    epilog="""
    banger kernel verify
    banger kernel verify NAME --json
    """,
)
@click.argument("names", type=KERNEL, nargs=-1)
@json_option
def verify(names: tuple[str, ...], as_json: bool) -> int:
    """Read kernels again, all of them without NAMES, and compare every file with what was installed."""
    with Display() as display:
        checks = ensure_daemon().call(op.KERNEL_VERIFY, m.KernelVerify([*names]), display.reporter("verifying"))
    if as_json:
        print_json(checks)
    else:
        for check in checks.kernels:
            print(plain(f"{check.name}: {check.problem or 'ok'}"))
    return 1 if any(check.problem for check in checks.kernels) else 0


@click.command(
    cls=Command,
    epilog="""
    banger kernel export NAME -o NAME.tar.zst
    banger kernel export NAME -o NAME.tar.zst --url https://example.org/NAME.tar.zst
    """,
)
@click.argument("name", type=KERNEL)
@click.option("-o", "--output", required=True, type=NEW_FILE, help="The bundle to write.")
@click.option(
    "--url", metavar="URL", default="", help="Where it will be published, instead of its file name, for the entry."
)
@click.option("--force", is_flag=True, help="Replace the file.")
@click.option("--json", "as_json", is_flag=True, hidden=True)  # the output is JSON in any case
def export(name: str, output: str, url: str, force: bool, as_json: bool) -> None:
    """Write a kernel as a bundle (the same bytes every time) and print the entry for a catalog as JSON."""
    request = m.KernelExport(name=name, output=output, url=url, force=force)
    with Display() as display:
        entry = ensure_daemon().call(op.KERNEL_EXPORT, request, display.reporter(f"exporting {name}"))
    print_json(entry)


def print_arrived(kernel: m.KernelInfo, as_json: bool, verb: str) -> None:
    """Tell that a kernel is there now."""
    if as_json:
        print_json(kernel)
    else:
        size = human_size(kernel.size_bytes)
        print(plain(f"{verb} {kernel.name}: {kernel.kernel_version} {kernel.arch}, {size}"))
        if kernel.skipped:
            note(f"skipped what kernels have no use for: {', '.join(kernel.skipped)}")
        if kernel.missing:
            note(f"it lacks what some VMs need: {', '.join(kernel.missing)}")
        if kernel.unknown and not kernel.modules:
            note(
                "it came without modules, and nothing tells what it has built in:"
                f" VMs boot only if that includes what 'banger kernel show {kernel.name}' lists as unknown"
            )


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
            ("catalog", kernel.origin),
            ("modules", "yes" if kernel.modules else "no"),
            ("missing", ", ".join(kernel.missing)),
            ("unknown", ", ".join(kernel.unknown)),
            ("skipped", ", ".join(kernel.skipped)),
            ("sha256", kernel.sha256),
            ("imported", kernel.imported_at),
            ("problem", kernel.problem),
        ]
    )
