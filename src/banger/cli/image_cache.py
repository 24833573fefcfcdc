"""`banger image cache`: the layers that were downloaded for images."""

from __future__ import annotations

from datetime import UTC, datetime

import click

from banger.api import models as m
from banger.api import operations as op
from banger.cli.connect import ensure_daemon
from banger.cli.lazy import Command, Entry, LazyGroup
from banger.cli.options import SIZE, json_option
from banger.cli.progress import Display
from banger.cli.render import age, plain, print_json, print_lines, table_lines
from banger.system import counted, human_size

CACHE_GROUP = LazyGroup(
    "cache",
    {
        "list": Entry("image_cache", "list_blobs", "List the layers in the cache."),
        "prune": Entry("image_cache", "prune", "Remove layers from the cache."),
        "verify": Entry("image_cache", "verify", "Read the layers in the cache again and remove damaged ones."),
    },
    help="""Layers of images, kept so that images that share them download them once.

    Images do not need them any more once they are pulled. The least recently used ones go when `cache_size` of
    config.toml is exceeded.""",
    examples="""
    banger image cache list
    banger image cache prune --keep 2G
    """,
)


@click.command(
    "list",
    cls=Command,
    epilog="""
    banger image cache list
    banger image cache list --json
    """,
)
@json_option
def list_blobs(as_json: bool) -> None:
    """List the layers in the cache, the least recently used first."""
    listed = ensure_daemon().call(op.IMAGE_CACHE_LIST, m.Empty())
    if as_json:
        print_json(listed)
        return
    print_lines(
        table_lines(
            ["DIGEST", "SIZE", "USED", "IMAGES", "STATE"],
            [
                [
                    blob.digest.removeprefix("sha256:")[:12],
                    human_size(blob.size_bytes),
                    age(datetime.fromtimestamp(blob.used_at, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")),
                    ", ".join(blob.images[:3]) + (f" and {len(blob.images) - 3} more" if len(blob.images) > 3 else ""),
                    "in use" if blob.in_use else "",
                ]
                for blob in listed.blobs
            ],
            optional=("STATE",),
        )
    )


@click.command(
    cls=Command,
    epilog="""
    banger image cache prune
    banger image cache prune --keep 2G
    """,
)
@click.option("--keep", type=SIZE, default=None, help="How much may stay: what was used last, in binary units: 2G.")
@json_option
def prune(keep: int | None, as_json: bool) -> None:
    """Remove layers from the cache, the least recently used first; all without --keep. Images stay as they are."""
    pruned = ensure_daemon().call(op.IMAGE_CACHE_PRUNE, m.CachePrune(keep or 0))
    if as_json:
        print_json(pruned)
        return
    print(f"removed {counted(pruned.blobs, 'layer')}, {human_size(pruned.freed_bytes)}")


@click.command(cls=Command, epilog="banger image cache verify")
@json_option
def verify(as_json: bool) -> int:
    """Read the layers in the cache again and remove those that are damaged. Exits with 1 when there were any."""
    with Display() as display:
        verified = ensure_daemon().call(op.IMAGE_CACHE_VERIFY, m.Empty(), display.reporter("verifying"))
    if as_json:
        print_json(verified)
    else:
        for digest in verified.removed:
            print(plain(f"{digest} was damaged and is removed"))
        whole = verified.blobs - len(verified.removed)
        print(f"{counted(whole, 'layer')} {'is as it' if whole == 1 else 'are as they'} should be")
    return 1 if verified.removed else 0
