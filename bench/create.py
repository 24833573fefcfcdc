"""vm.create: time and disk of the 1st and the 100th VM, and of a VM on an image of 2 GB against one of 5 MB."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import statistics
import tempfile
from pathlib import Path

from common import IMAGE, Host, in_turn, load, report, scratch_host, seconds

from banger.api import models as m
from banger.api import operations as op

SMALL, LARGE = "small", "large"
SMALL_BYTES, LARGE_BYTES = 5 << 20, 2 << 30
VMS = 100
ROUNDS = 10


def make_images(host: Host) -> None:
    """Images of both sizes: one program, and random bytes behind the filesystem; neither will be started."""
    with tempfile.TemporaryDirectory(prefix="banger-bench-") as directory:
        root = Path(directory, "root")
        for name in ("bin", "root"):
            (root / name).mkdir(parents=True)
        shutil.copyfile("/bin/true", root / "bin/true")
        (root / "root/.profile").write_text("umask 022\n")
        for name, size in ((SMALL, SMALL_BYTES), (LARGE, LARGE_BYTES)):
            host.client.call(op.IMAGE_IMPORT, m.ImageImport(name, str(root)))
            enlarge(host.layout.images / name, size)


def enlarge(entry: Path, size: int) -> None:
    """Put random bytes behind the filesystem of an image."""
    rootfs = entry / "rootfs.squashfs"
    with open(rootfs, "r+b") as stream:
        stream.seek(0, os.SEEK_END)
        while stream.tell() < size:
            stream.write(os.urandom(1 << 20))
        stream.seek(0)
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    manifest = json.loads((entry / "manifest.json").read_bytes())
    manifest |= {"rootfs_sha256": digest, "size_bytes": rootfs.stat().st_size}
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
        make_images(host)
        large, small = in_turn(ROUNDS, lambda: create(host, LARGE), lambda: create(host, SMALL))
        report("vm.create on an image of 2 GB", large, "on one of 5 MB", small)
        used = {vm.image: vm.used_bytes for vm in host.client.call(op.VM_LIST, m.Empty()).vms}
        print(f"disk of such a VM: {used[LARGE] / 1e6:.2f} MB and {used[SMALL] / 1e6:.2f} MB")
        host.client.call(op.VM_PRUNE, m.Empty())
        before = disk_used(host.layout.state)
        taken = [create(host, IMAGE) for _ in range(VMS)]
        report(f"vm.create, VMs {VMS - 9} to {VMS}", taken[-10:], "VMs 1 to 10", taken[:10])
        grown = disk_used(host.layout.state) - before
        print(f"disk of {VMS} VMs: {grown / 1e6:.1f} MB; median vm.create {statistics.median(taken) * 1e3:.1f} ms")
        print(load())


if __name__ == "__main__":
    main()
