"""`banger kernel catalog` and `banger image catalog`: the same commands for both."""

from __future__ import annotations

from dataclasses import dataclass

import click

from banger.api import models as m
from banger.api.errors import BangerError
from banger.api.operations import Call
from banger.cli.connect import ensure_daemon
from banger.cli.errors import UsageFault
from banger.cli.lazy import Command, Entry, LazyGroup
from banger.cli.many import for_each
from banger.cli.options import FileName, NameType, json_option
from banger.cli.progress import Display
from banger.cli.render import age, plain, print_json, print_lines, table_lines
from banger.paths import expand_home
from banger.system import counted

_KEY_LIMIT = 4096  # characters
_KEY_HINT = "give the .pub file that 'minisign -G' wrote, or the line in it that starts with RW"


@dataclass(frozen=True)
class Calls:
    """The operations on catalogs of one noun."""

    add: Call[m.CatalogAdd, m.CatalogInfo]
    list: Call[m.Empty, m.CatalogList]
    delete: Call[m.NameRequest, m.Empty]
    refresh: Call[m.CatalogRefresh, m.CatalogList]


class Location(FileName):
    """A URL, or an existing file made absolute for the daemon."""

    name = "url|file"

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> str:
        text = str(value)
        if "://" in text:
            return text
        path = expand_home(text).absolute()
        if not path.is_file():
            raise UsageFault(f"there is no file {path}", "give the file of a catalog, or its URL with https://")
        return str(path)


def catalog_group(noun: str) -> LazyGroup:
    """The group `catalog` of a noun, whose commands are in the module <noun>_catalog."""
    module = f"{noun}_catalog"
    return LazyGroup(
        "catalog",
        {
            "add": Entry(module, "add", "Add a catalog from a URL or a file."),
            "list": Entry(module, "list_catalogs", "List the catalogs."),
            "rm": Entry(module, "remove", f"Remove catalogs; {noun}s pulled from them stay."),
            "refresh": Entry(module, "refresh", "Fetch catalogs again."),
        },
        help=f"""The catalogs that {noun}s are pulled from.

    One comes with banger; others are added by URL or file. A name that several have is pulled as CATALOG/NAME.""",
        examples=f"""
    banger {noun} catalog add https://example.org/{noun}s/catalog.json --public-key example.pub
    banger {noun} list --available
    """,
    )


def catalog_commands(noun: str, calls: Calls) -> tuple[click.Command, click.Command, click.Command, click.Command]:
    """The commands add, list, rm and refresh for the catalogs of a noun."""
    catalog = NameType("catalog", f"{noun} catalog")

    @click.command(
        cls=Command,
        epilog=f"""
    banger {noun} catalog add https://example.org/{noun}s/catalog.json --public-key example.pub
    banger {noun} catalog add build/catalog.json --name mine
    """,
    )
    @click.argument("location", type=Location(), metavar="URL|FILE")
    @click.option("--name", type=catalog, default=None, help="Its name instead of the URL's host or the file's name.")
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
            added = ensure_daemon().call(calls.add, request, display.reporter("adding a catalog"))
        if as_json:
            print_json(added)
            return
        unsigned = f"not signed: whoever can change it decides which {noun}s you boot"
        print(
            plain(f"added {added.name}: {counted(added.entries, noun)}, {'signed' if added.public_key else unsigned}")
        )

    @click.command(
        "list",
        cls=Command,
        epilog=f"""
    banger {noun} catalog list
    banger {noun} catalog list --json
    """,
    )
    @json_option
    def list_catalogs(as_json: bool) -> None:
        """List the catalogs."""
        _print(noun, ensure_daemon().call(calls.list, m.Empty()), as_json)

    @click.command(
        "rm",
        cls=Command,
        epilog=f"banger {noun} catalog rm NAME OTHER",
        help=f"Remove catalogs. {noun.capitalize()}s that were pulled from them stay.",
    )
    @click.argument("names", type=catalog, nargs=-1, required=True)
    @json_option
    def remove(names: tuple[str, ...], as_json: bool) -> int:
        client = ensure_daemon()

        def delete(name: str) -> m.NameRequest:
            client.call(calls.delete, m.NameRequest(name))
            return m.NameRequest(name)

        return for_each(names, delete, lambda name, _: f"removed {name}", as_json)

    @click.command(
        cls=Command,
        epilog=f"""
    banger {noun} catalog refresh
    banger {noun} catalog refresh NAME
    """,
    )
    @click.argument("names", type=catalog, nargs=-1)
    @json_option
    def refresh(names: tuple[str, ...], as_json: bool) -> None:
        """Fetch catalogs again, all when no NAME is given. One that is refused stays as it was."""
        with Display() as display:
            request = m.CatalogRefresh(list(names))
            fetched = ensure_daemon().call(calls.refresh, request, display.reporter("refreshing"))
            _print(noun, fetched, as_json)

    return add, list_catalogs, remove, refresh


def _print(noun: str, catalogs: m.CatalogList, as_json: bool) -> None:
    if as_json:
        print_json(catalogs)
        return
    print_lines(
        table_lines(
            ["NAME", f"{noun.upper()}S", "SIGNED", "UPDATED", "FETCHED", "LOCATION", "PROBLEM"],
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
    )


def _key(text: str) -> str:
    """A public key given as such or as the name of its file; what a file holds is never shown, it may be secret."""
    from banger.minisign import PublicKey

    if not text:
        return ""
    path = expand_home(text)
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
