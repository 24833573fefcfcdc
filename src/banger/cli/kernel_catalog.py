"""`banger kernel catalog`: the catalogs that kernels are pulled from."""

from __future__ import annotations

from banger.api import operations as op
from banger.cli.catalog import Calls, catalog_commands, catalog_group

CATALOG_GROUP = catalog_group("kernel")

add, list_catalogs, remove, refresh = catalog_commands(
    "kernel",
    Calls(op.KERNEL_CATALOG_ADD, op.KERNEL_CATALOG_LIST, op.KERNEL_CATALOG_DELETE, op.KERNEL_CATALOG_REFRESH),
)
