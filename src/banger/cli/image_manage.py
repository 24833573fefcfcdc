"""`banger image promote`, `tag`, `history`, `verify`, `export` and `prune`."""

from __future__ import annotations

import sys

import click

from banger.api import models as m
from banger.api import operations as op
from banger.cli import errors
from banger.cli.connect import ensure_daemon
from banger.cli.errors import UsageFault
from banger.cli.image import print_arrived
from banger.cli.lazy import Command
from banger.cli.many import for_each
from banger.cli.options import IMAGE, NEW_PATH, json_option
from banger.cli.progress import Display
from banger.cli.render import age, note, plain, print_json, print_lines, shorten, table_lines
from banger.system import human_size

_STEP_WIDTH, _COMMENT_WIDTH = 56, 20  # so that a history fits into 100 columns


@click.command(cls=Command, epilog="banger image promote NAME OTHER")
@click.argument("names", type=IMAGE, nargs=-1, required=True)
@json_option
def promote(names: tuple[str, ...], as_json: bool) -> int:
    """Copy the files of registered images, which banger then manages: the originals may change or go."""
    client = ensure_daemon()
    with Display() as display:
        return for_each(
            names,
            lambda name: client.call(op.IMAGE_PROMOTE, m.NameRequest(name), display.reporter(f"promoting {name}")),
            lambda name, image: f"promoted {name}, {human_size(image.size_bytes)}",
            as_json,
            display,
        )


@click.command(
    cls=Command,
    epilog="""
    banger image tag NAME OTHER
    banger image tag --force NAME stable
    """,
)
@click.argument("source", type=IMAGE)
@click.argument("target", type=IMAGE)
@click.option("--force", is_flag=True, help="Replace a local image that is called TARGET.")
@json_option
def tag(source: str, target: str, force: bool, as_json: bool) -> None:
    """Give the image SOURCE the further name TARGET. Both share their files; removing one leaves the other."""
    with Display() as display:
        request = m.ImageTag(source=source, target=target, force=force)
        image = ensure_daemon().call(op.IMAGE_TAG, request, display.reporter(f"tagging {source}"))
    print_arrived(image, as_json, "tagged")


@click.command(
    cls=Command,
    epilog="""
    banger image history NAME
    banger image history NAME --no-trunc
    """,
)
@click.argument("name", type=IMAGE)
@click.option("--no-trunc", is_flag=True, help="Show commands whole.")
@json_option
def history(name: str, no_trunc: bool, as_json: bool) -> None:
    """Show the steps that an image was made by, the last first. Sizes are those of its layers when it was pulled."""
    made = ensure_daemon().call(op.IMAGE_HISTORY, m.NameRequest(name))
    if as_json:
        print_json(made)
        return
    print_lines(
        table_lines(
            ["CREATED", "SIZE", "CREATED BY", "COMMENT"],
            [
                [
                    age(step.created),
                    human_size(step.size_bytes),
                    step.created_by if no_trunc else shorten(step.created_by, _STEP_WIDTH),
                    step.comment if no_trunc else shorten(step.comment, _COMMENT_WIDTH),
                ]
                for step in made.steps
            ],
            optional=("COMMENT",),
        )
    )


@click.command(
    cls=Command,
    epilog="""
    banger image verify
    banger image verify NAME --json
    """,
)
@click.argument("names", type=IMAGE, nargs=-1)
@json_option
def verify(names: tuple[str, ...], as_json: bool) -> int:
    """Read images again, all of them without NAMES, and compare their files with what was imported or registered."""
    with Display() as display:
        checks = ensure_daemon().call(op.IMAGE_VERIFY, m.ImageVerify([*names]), display.reporter("verifying"))
    if as_json:
        print_json(checks)
    else:
        for check in checks.images:
            print(plain(f"{check.name}: {check.problem or 'ok'}"))
    return errors.FAILED if any(check.problem for check in checks.images) else 0


@click.command(
    cls=Command,
    epilog="""
    banger image export NAME --bundle -o NAME.tar.zst
    banger image export NAME --oci -o NAME.tar
    banger image export NAME --oci -o layout/    for skopeo copy oci:layout, umoci unpack --image layout
    """,
)
@click.argument("name", type=IMAGE)
@click.option("--oci", is_flag=True, help="An OCI layout with one layer, or an archive of it.")
@click.option("--bundle", is_flag=True, help="A bundle that others can pull; prints its entry for a catalog as JSON.")
@click.option(
    "-o",
    "--output",
    required=True,
    type=NEW_PATH,
    help="The file to write; without .tar at its end --oci makes a directory.",
)
@click.option(
    "--url",
    metavar="URL",
    default="",
    help="Where a bundle will be, instead of its file name, for its entry.",
)
@click.option("--force", is_flag=True, help="Replace the archive, or the directory of an earlier export.")
@json_option
def export(name: str, oci: bool, bundle: bool, output: str, url: str, force: bool, as_json: bool) -> None:
    """Write an image so that other tools, or other users of banger, can use it: the same bytes every time."""
    if oci == bundle:
        raise UsageFault("an image is exported either with --bundle or with --oci")
    if url and oci:
        raise UsageFault("--url is for bundles", "leave it out, or use --bundle")
    request = m.ImageExport(name=name, output=output, format="bundle" if bundle else "oci", url=url, force=force)
    with Display() as display:
        exported = ensure_daemon().call(op.IMAGE_EXPORT, request, display.reporter(f"exporting {name}"))
    if exported.entry is not None:
        print_json(exported.entry)
    elif as_json:
        print_json(exported)
    else:
        print(plain(f"exported {name} to {output}: {exported.digest}, {human_size(exported.size_bytes)}"))


@click.command(
    cls=Command,
    epilog="""
    banger image prune
    banger image prune --all --force    every image that no VM uses, without asking
    """,
)
@click.option("-a", "--all", "everything", is_flag=True, help="Also images that are whole, when no VM uses them.")
@click.option("-f", "-y", "--force", is_flag=True, help="Do not ask.")
@json_option
def prune(everything: bool, force: bool, as_json: bool) -> int:
    """Remove broken images, or with --all every image that no VM uses.

    Images that VMs use always stay, and so do the files of registered images.
    """
    what = "image that no VM uses" if everything else "broken image"
    if not force and not sys.stdin.isatty():
        raise UsageFault(f"this removes every {what}, and there is no terminal to ask on", "add --force")
    client = ensure_daemon()
    if not force:
        found = client.call(op.IMAGE_PRUNE, m.ImagePrune(all=everything, dry_run=True)).names
        if not found:
            note(f"there is no {what}")
            return 0
        note(f"This removes: {', '.join(found)}")
        if not click.confirm("Remove them?", err=True):
            return errors.FAILED
    removed = client.call(op.IMAGE_PRUNE, m.ImagePrune(all=everything))
    if as_json:
        print_json(removed)
    elif removed.names:
        print(plain(f"removed {', '.join(removed.names)}, freed {human_size(removed.freed_bytes)}"))
    else:
        print(f"there is no {what}")
    return 0
