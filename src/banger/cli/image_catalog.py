"""`banger image catalog`: the catalogs that images are pulled from."""

from __future__ import annotations

from banger.api import operations as op
from banger.cli.catalog import Calls, catalog_commands, catalog_group

CATALOG_GROUP = catalog_group("image")

add, list_catalogs, remove, refresh = catalog_commands(
    "image",
    Calls(op.IMAGE_CATALOG_ADD, op.IMAGE_CATALOG_LIST, op.IMAGE_CATALOG_DELETE, op.IMAGE_CATALOG_REFRESH),
)
