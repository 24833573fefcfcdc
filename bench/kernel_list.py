"""kernel list with 500 kernels, from the command line, against the same with one."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from common import KERNEL, Host, empty_host, in_turn, load, report, seconds

from banger import system
from banger.api import models as m
from banger.api import operations as op
from banger.api.errors import BangerError, Code

KERNELS = 500
ROUNDS = 15


def fill(host: Host, count: int) -> None:
    """Have `count` kernels: the usual one under as many names, its files hard-linked."""
    try:
        host.client.call(op.KERNEL_SHOW, m.NameRequest(KERNEL))
    except BangerError as error:
        if error.code is not Code.NOT_FOUND:
            raise
        host.client.call(op.KERNEL_PULL, m.KernelPull(KERNEL))
    original = host.layout.kernels / KERNEL
    manifest = json.loads((original / "manifest.json").read_bytes())
    for index in range(1, count):
        entry = host.layout.kernels / f"kernel-{index}"
        entry.mkdir()
        for file in original.iterdir():
            if file.name != "manifest.json":
                system.link_or_copy(file, entry / file.name)
        (entry / "manifest.json").write_text(json.dumps(manifest | {"name": entry.name}, indent=2))


def clear(directory: Path) -> None:
    """Remove what `fill` made."""
    for entry in directory.glob("kernel-*"):
        shutil.rmtree(entry)


def main() -> None:
    with empty_host(("kernels", KERNEL)) as host:
        fill(host, 1)
        one = in_turn(ROUNDS, lambda: seconds(lambda: host.banger("kernel", "list")))[0]
        fill(host, KERNELS)
        many = in_turn(ROUNDS, lambda: seconds(lambda: host.banger("kernel", "list")))[0]
        clear(host.layout.kernels)
        report(f"banger kernel list, {KERNELS} kernels", many, "1 kernel", one)
    print(load())


if __name__ == "__main__":
    main()
