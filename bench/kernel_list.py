"""kernel list with 500 kernels, from the command line, against the same with one."""

from __future__ import annotations

import json

from common import KERNEL, Host, empty_host, in_turn, load, pull_kernel, report, seconds

from banger import system

KERNELS = 500
ROUNDS = 15


def fill(host: Host, count: int) -> None:
    """Have `count` kernels: the usual one under as many names, its files hard-linked."""
    pull_kernel(host.client)
    original = host.layout.kernels / KERNEL
    manifest = json.loads((original / "manifest.json").read_bytes())
    for index in range(1, count):
        entry = host.layout.kernels / f"kernel-{index}"
        entry.mkdir()
        for file in original.iterdir():
            if file.name != "manifest.json":
                system.link_or_copy(file, entry / file.name)
        (entry / "manifest.json").write_text(json.dumps(manifest | {"name": entry.name}, indent=2))


def main() -> None:
    with empty_host(("kernels", KERNEL)) as host:
        fill(host, 1)
        one = in_turn(ROUNDS, lambda: seconds(lambda: host.banger("kernel", "list")))[0]
        fill(host, KERNELS)
        many = in_turn(ROUNDS, lambda: seconds(lambda: host.banger("kernel", "list")))[0]
        report(f"banger kernel list, {KERNELS} kernels", many, "1 kernel", one)
    print(load())


if __name__ == "__main__":
    main()
