"""vm.create: time and disk of the 1st and the 100th VM, and of a VM on a 1 GB image against one on the usual one."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import statistics
from pathlib import Path

from common import IMAGE, Host, in_turn, load, report, scratch_host, seconds

from banger.api import models as m
from banger.api import operations as op

LARGE = "large"
LARGE_BYTES = 1 << 30
VMS = 100
ROUNDS = 10


def make_large_image(host: Host) -> None:
    """The usual image with random bytes behind its filesystem."""
    entry = host.layout.images / LARGE
    entry.mkdir()
    rootfs = entry / "rootfs.squashfs"
    shutil.copyfile(host.layout.images / IMAGE / rootfs.name, rootfs)
    with open(rootfs, "r+b") as stream:
        stream.seek(0, os.SEEK_END)
        while stream.tell() < LARGE_BYTES:
            stream.write(os.urandom(1 << 20))
        stream.seek(0)
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    manifest = json.loads((host.layout.images / IMAGE / "manifest.json").read_bytes())
    manifest |= {"name": LARGE, "rootfs_sha256": digest, "size_bytes": rootfs.stat().st_size}
    (entry / "manifest.json").write_text(json.dumps(manifest))


def disk_used(directory: Path) -> int:
    """Bytes on disk of a tree; a file with several names counts once."""
    inodes = {}
    for path, _, names in os.walk(directory):
        for name in names:
            status = os.lstat(Path(path, name))
            inodes[status.st_ino] = status.st_blocks * 512
    return sum(inodes.values())


def create(host: Host, image: str) -> float:
    """Seconds of one vm.create."""
    return seconds(lambda: host.client.call(op.VM_CREATE, m.VmCreate(image=image, command=["true"])))


def main() -> None:
    with scratch_host() as host:
        make_large_image(host)
        large, usual = in_turn(ROUNDS, lambda: create(host, LARGE), lambda: create(host, IMAGE))
        report("vm.create on an image of 1 GB", large, "on one of 70 MB", usual)
        host.client.call(op.VM_PRUNE, m.Empty())
        before = disk_used(host.layout.state)
        taken = [create(host, IMAGE) for _ in range(VMS)]
        report(f"vm.create, VMs {VMS - 9} to {VMS}", taken[-10:], "VMs 1 to 10", taken[:10])
        grown = disk_used(host.layout.state) - before
        print(f"disk of {VMS} VMs: {grown / 1e6:.1f} MB; median vm.create {statistics.median(taken) * 1e3:.1f} ms")
        print(load())


if __name__ == "__main__":
    main()
