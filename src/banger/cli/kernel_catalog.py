"""`banger kernel catalog`: the catalogs that kernels are pulled from."""

from __future__ import annotations

from pathlib import Path

import click

from banger.api import models as m
from banger.api import operations as op
from banger.api.errors import BangerError
from banger.cli.connect import ensure_daemon
from banger.cli.errors import UsageFault
from banger.cli.lazy import Command, Entry, LazyGroup
from banger.cli.many import for_each
from banger.cli.options import FileName, NameType, json_option
from banger.cli.progress import Display
from banger.cli.render import age, plain, print_json, print_table

_KEY_LIMIT = 4096  # characters
_KEY_HINT = "give the .pub file that 'minisign -G' wrote, or the line in it that starts with RW"

CATALOG = NameType("catalog")

CATALOG_GROUP = LazyGroup(
    "catalog",
    {
        "add": Entry("kernel_catalog", "add", "Add a catalog from a URL or a file."),
        "list": Entry("kernel_catalog", "list_catalogs", "List the catalogs."),
        "rm": Entry("kernel_catalog", "remove", "Remove catalogs; kernels pulled from them stay."),
        "refresh": Entry("kernel_catalog", "refresh", "Fetch catalogs again."),
    },
    help="""The catalogs that kernels are pulled from.

    One comes with banger; others are added by URL or file. A name that several have is pulled as CATALOG/NAME.""",
    examples="""
    banger kernel catalog add https://example.org/kernels/catalog.json --public-key example.pub
    banger kernel list --available
    """,
)


class Location(FileName):
    """A URL, or an existing file made absolute for the daemon."""

    name = "url|file"

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> str:
        text = str(value)
        if "://" in text:
            return text
        path = Path(text).expanduser().absolute()
        if not path.is_file():
            raise UsageFault(f"there is no file {path}", "give the file of a catalog, or its URL with https://")
        return str(path)


@click.command(
    cls=Command,
    epilog="""
    banger kernel catalog add https://example.org/kernels/catalog.json --public-key example.pub
    banger kernel catalog add build/catalog.json --name mine
    """,
)
@click.argument("location", type=Location(), metavar="URL|FILE")
@click.option("--name", type=CATALOG, default=None, help="Its name instead of the URL's host or the file's name.")
@click.option(
    "--public-key",
    metavar="KEY|FILE",
    type=FileName(),
    default="",
    help="minisign's key, or its .pub file: refuse what it did not sign.",
)
@json_option
def add(location: str, name: str | None, public_key: str, as_json: bool) -> None:
    """Add a catalog from a URL or a file."""
    request = m.CatalogAdd(location=location, name=name or "", public_key=_key(public_key))
    with Display() as display:
        catalog = ensure_daemon().call(op.KERNEL_CATALOG_ADD, request, display.reporter("adding a catalog"))
    if as_json:
        print_json(catalog)
        return
    signed = "signed" if catalog.public_key else "not signed: whoever can change it decides which kernels you boot"
    print(plain(f"added {catalog.name}: {_kernels(catalog)}, {signed}"))


@click.command(
    "list",
    cls=Command,
    epilog="""
    banger kernel catalog list
    banger kernel catalog list --json
    """,
)
@json_option
def list_catalogs(as_json: bool) -> None:
    """List the catalogs."""
    _print(ensure_daemon().call(op.KERNEL_CATALOG_LIST, m.Empty()), as_json)


@click.command("rm", cls=Command, epilog="banger kernel catalog rm NAME OTHER")
@click.argument("names", type=CATALOG, nargs=-1, required=True)
@json_option
def remove(names: tuple[str, ...], as_json: bool) -> int:
    """Remove catalogs. Kernels that were pulled from them stay."""
    client = ensure_daemon()

    def delete(name: str) -> m.NameRequest:
        client.call(op.KERNEL_CATALOG_DELETE, m.NameRequest(name))
        return m.NameRequest(name)

    return for_each(names, delete, lambda name, _: f"removed {name}", as_json)


@click.command(
    cls=Command,
    epilog="""
    banger kernel catalog refresh
    banger kernel catalog refresh NAME
    """,
)
@click.argument("names", type=CATALOG, nargs=-1)
@json_option
def refresh(names: tuple[str, ...], as_json: bool) -> None:
    """Fetch catalogs again, all when no NAME is given. One that is refused stays as it was."""
    with Display() as display:
        request = m.CatalogRefresh(list(names))
        _print(ensure_daemon().call(op.KERNEL_CATALOG_REFRESH, request, display.reporter("refreshing")), as_json)


def _print(catalogs: m.CatalogList, as_json: bool) -> None:
    if as_json:
        print_json(catalogs)
        return
    print_table(
        ["NAME", "KERNELS", "SIGNED", "UPDATED", "FETCHED", "LOCATION", "PROBLEM"],
        [
            [
                catalog.name,
                str(catalog.entries),
                "yes" if catalog.public_key else "",
                age(catalog.updated),
                age(catalog.refreshed_at),
                catalog.location or "comes with banger",
                catalog.problem,
            ]
            for catalog in catalogs.catalogs
        ],
        optional=("PROBLEM",),
    )


def _kernels(catalog: m.CatalogInfo) -> str:
    return "1 kernel" if catalog.entries == 1 else f"{catalog.entries} kernels"


def _key(text: str) -> str:
    """A public key given as such or as the name of its file; what a file holds is never shown, it may be secret."""
    from banger.minisign import PublicKey

    if not text:
        return ""
    path = Path(text).expanduser()
    key, problem = text, f"{text!r} is neither a file nor a minisign public key"
    try:
        if path.is_file():
            with open(path, errors="replace") as stream:
                key, problem = stream.read(_KEY_LIMIT), f"{path} is not a minisign public key"
    except OSError as error:
        raise UsageFault(f"--public-key: {path} cannot be read: {error.strerror}") from error
    try:
        return str(PublicKey.parse(key))
    except BangerError as error:
        raise UsageFault(f"--public-key: {problem}", _KEY_HINT) from error
