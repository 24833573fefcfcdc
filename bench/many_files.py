"""100,000 files in one directory against the same in 1,000: image import, pull and export, kernel pull and export."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import random
import subprocess
import tempfile
from collections.abc import Iterable
from pathlib import Path

from common import KERNEL, Host, empty_host, in_turn, load, pull_kernel, report, seconds
from image_pull import oci_layout, registry
from kernel_pull import resident, served

from banger.api import models as m
from banger.api import operations as op
from banger.disk import tar
from banger.disk.tar import Member
from banger.kernelcat import manifest as kernels

ROUNDS = 3
FILES = 100_000
SPREAD = "the same in 1,000 directories"


def write_tar(target: Path, files: Iterable[tuple[bytes, bytes]]) -> None:
    """A tar of regular files: names and data."""
    with open(target, "wb") as stream:
        for name, data in files:
            stream.write(tar.encode_header(Member(name, tar.REGULAR, 0o755, 0, 0, 0, size=len(data))))
            stream.write(data + bytes(-len(data) % tar.BLOCK))
        stream.write(tar.encode_end())


def many(prefix: str, directories: int) -> Iterable[tuple[bytes, bytes]]:
    """Files of a few bytes in no order, as caches and data sets have them."""
    numbers = list(range(FILES))
    random.Random(1).shuffle(numbers)
    each = FILES // directories
    for number in numbers:
        yield b"%b/%04d/%06d" % (prefix.encode(), number // each, number), b"%d\n" % number


def rootfs(target: Path, directories: int) -> None:
    """A root filesystem: those files and a program, without which it is none."""
    write_tar(target, [(b"bin/true", Path("/bin/true").read_bytes()), *many("data", directories)])


def kernel_bundle(host: Host, scratch: Path, target: Path, directories: int) -> None:
    """The usual kernel with all those files below its modules."""
    entry = host.layout.kernels / KERNEL
    modules = scratch / "modules"
    if not modules.exists():
        subprocess.run(["rdsquashfs", "-q", "-u", "/", "-p", modules, entry / kernels.MODULES], check=True)
    files = [(b"vmlinux", (entry / kernels.VMLINUX).read_bytes())]
    for path in sorted(path for path in modules.rglob("*") if path.is_file()):
        files.append((b"modules/" + path.relative_to(modules).as_posix().encode(), path.read_bytes()))
    write_tar(scratch / "bundle.tar", [*files, *many("modules/kernel/data", directories)])
    subprocess.run(["zstd", "-q", "-1", "--rm", scratch / "bundle.tar", "-o", target], check=True)


def main() -> None:
    with (
        empty_host(("kernels", KERNEL)) as host,
        tempfile.TemporaryDirectory(prefix="banger-bench-") as directory,
        contextlib.ExitStack() as servers,
    ):
        scratch = Path(directory)
        pull_kernel(host.client)
        shapes = {"one": 1, "spread": 1000}
        bundles = scratch / "bundles"
        bundles.mkdir()
        for name, directories in shapes.items():
            rootfs(scratch / f"{name}.tar", directories)
            oci_layout(scratch / name, [scratch / f"{name}.tar"])
            kernel_bundle(host, scratch, bundles / f"{name}.tar.zst", directories)
        address = servers.enter_context(registry(scratch))
        url = servers.enter_context(served(bundles))
        for name in shapes:
            copy = ["skopeo", "copy", "--quiet", "--insecure-policy", "--dest-tls-verify=false"]
            subprocess.run([*copy, f"oci:{scratch / name}", f"docker://{address}/{name}"], check=True)
        measure(host, scratch, address, url)
    print(load())


def measure(host: Host, scratch: Path, address: str, url: str) -> None:
    client = host.client
    pid = client.call(op.DAEMON_STATUS, m.Empty()).pid

    def imported(name: str) -> float:
        request = m.ImageImport(name, source=str(scratch / f"{name}.tar"), force=True)
        return seconds(lambda: client.call(op.IMAGE_IMPORT, request))

    def pulled(name: str) -> float:
        client.call(op.IMAGE_CACHE_PRUNE, m.CachePrune())
        return seconds(lambda: client.call(op.IMAGE_PULL, m.ImagePull(f"{address}/{name}", force=True)))

    def exported(name: str) -> float:
        output = scratch / "exported.tar"
        return seconds(lambda: host.banger("image", "export", name, "--oci", "--output", str(output), "--force"))

    def bundled(name: str) -> float:
        output = scratch / "bundled.tar.zst"
        return seconds(lambda: host.banger("image", "export", name, "--bundle", "--output", str(output), "--force"))

    def kernel(name: str) -> float:
        digest = hashlib.sha256((scratch / f"bundles/{name}.tar.zst").read_bytes()).hexdigest()
        request = m.KernelPull(f"{url}/{name}.tar.zst", sha256=digest, force=True)
        return seconds(lambda: client.call(op.KERNEL_PULL, request))

    def kernel_bundled(name: str) -> float:
        output = scratch / "kernel.tar.zst"
        return seconds(lambda: host.banger("kernel", "export", name, "--output", str(output), "--force"))

    before = resident(pid, "VmRSS")
    for what, work in (
        ("image import", imported),
        ("image pull", pulled),
        ("image export --oci", exported),
        ("image export --bundle", bundled),
        ("kernel pull", kernel),
        ("kernel export", kernel_bundled),
    ):
        one, spread = in_turn(ROUNDS, functools.partial(work, "one"), functools.partial(work, "spread"))
        report(f"{what}, 100,000 files in one directory", one, SPREAD, spread)
    print(f"{'daemon: above its size before':<44} {(resident(pid, 'VmRSS') - before) / 1e6:9.1f} MB")
    print(f"{'  peak':<44} {(resident(pid, 'VmHWM') - before) / 1e6:9.1f} MB")


if __name__ == "__main__":
    main()
