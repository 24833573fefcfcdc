"""kernel import of a .deb, against dpkg -x and the unpacking of its vmlinuz by ordinary tools."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from common import empty_host, in_turn, load, report, seconds

from banger import debian
from banger.api import models as m
from banger.api import operations as op
from banger.job import Job

PACKAGES = ("linux-image-cloud-amd64", "linux-image-amd64")
ROUNDS = 5
_PAYLOADS = {b"\xfd7zXZ\x00": "xz", b"\x28\xb5\x2f\xfd": "zstd", b"\x1f\x8b\x08": "gzip", b"\x02\x21\x4c\x18": "lz4"}


def unpack_vmlinuz(kernel: Path, output: Path) -> None:
    """What extract-vmlinux does: find the payload of a bzImage by its magic number and decompress it."""
    data = kernel.read_bytes()
    start, tool = min((data.find(magic), tool) for magic, tool in _PAYLOADS.items() if magic in data)
    with open(output, "wb") as stream:
        # the size that follows the payload makes the tool complain, after it has written all
        subprocess.run([tool, "-dc"], input=data[start:], stdout=stream, stderr=subprocess.DEVNULL)
    if not output.read_bytes()[:4] == b"\x7fELF":
        raise SystemExit(f"{tool} did not unpack {kernel.name}")


def by_hand(package: Path, target: Path) -> None:
    """Unpack a package and its kernel."""
    shutil.rmtree(target, ignore_errors=True)
    subprocess.run(["dpkg", "-x", package, target], check=True)
    unpack_vmlinuz(next(target.glob("boot/vmlinuz-*")), target / "vmlinux")


def main() -> None:
    with empty_host() as host, tempfile.TemporaryDirectory(prefix="banger-bench-") as scratch:
        for name in sys.argv[1:] or PACKAGES:
            downloads = Path(scratch, name)
            downloads.mkdir()
            cache, mirror = host.layout.cache, debian.find_mirror()
            packages = debian.download([name], "bookworm", "amd64", Job(), into=downloads, cache=cache, mirror=mirror)
            package = next(file for file in packages if file.name.startswith("linux-image-"))
            request = m.KernelImport("imported", [str(package)], force=True)
            target = downloads / "target"

            def ours(request: m.KernelImport = request) -> float:
                return seconds(lambda: host.client.call(op.KERNEL_IMPORT, request))

            def theirs(package: Path = package, target: Path = target) -> float:
                return seconds(lambda: by_hand(package, target))

            measured, floor = in_turn(ROUNDS, ours, theirs)
            size = package.stat().st_size / 1e6
            report(f"import of {name} ({size:.0f} MB)", measured, "dpkg -x, then its vmlinuz unpacked", floor)
    print(load())


if __name__ == "__main__":
    main()
