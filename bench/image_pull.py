"""image pull: a two-layer Debian image from a registry on loopback, against skopeo, umoci and mke2fs, and podman pull.

Every side gets the layers from the registry, but `warm` finds them in banger's cache. Two more: an image of 60,000
small files against tar2sqfs alone, and the daemon's peak memory.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import random
import shutil
import subprocess
import tarfile
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path

from common import IMAGE, Host, in_turn, load, report, scratch_host, seconds
from kernel_pull import resident

from banger import debian
from banger.api import models as m
from banger.api import operations as op
from banger.config import Config
from banger.imagecat import manifest as images
from banger.job import Job
from banger.vmm.detect import host_arch

ROUNDS = 5
# what makes the upper layer: a compiler and an editor, as a developer adds them
PACKAGES = ["gcc-12", "cpp-12", "g++-12", "libstdc++-12-dev", "libbinutils", "binutils-x86-64-linux-gnu", "perl-base"]
PACKAGES += ["perl-modules-5.36", "libperl5.36", "vim-runtime", "git", "python3.11-minimal", "libpython3.11-stdlib"]
PACKAGES += ["linux-libc-dev", "libc6-dev", "libgcc-12-dev", "libicu72", "libllvm14", "locales-all"]


def base_layer(host: Host, target: Path) -> None:
    """The tree of the usual image as a tar."""
    manifest = images.read_local(host.layout.images, IMAGE)
    rootfs = images.image_paths(host.layout.images, manifest).rootfs
    with open(target, "wb") as tar:
        subprocess.run(["sqfs2tar", "--no-skip", rootfs], stdout=tar, check=True)


def package_layer(host: Host, scratch: Path, target: Path) -> None:
    """Packages unpacked into one tree, as a tar."""
    tree, debs = scratch / "tree", scratch / "debs"
    for directory in (tree, debs):
        directory.mkdir()
    mirror = debian.find_mirror(Config().debian_mirror)
    for package in debian.download(
        PACKAGES, "bookworm", host_arch(), Job(), into=debs, cache=host.layout.cache, mirror=mirror
    ):
        subprocess.run(["dpkg-deb", "--extract", package, tree], check=True)
    subprocess.run(["tar", "-C", tree, "--owner=0", "--group=0", "--sort=name", "-cf", target, "."], check=True)
    shutil.rmtree(tree)


def small_files(target: Path) -> None:
    """60,000 files of up to 4 KB in 600 directories, and a program, without which it is no root filesystem."""
    chance = random.Random(1)
    with tarfile.open(target, "w") as archive:
        for number in range(60_600):
            member = tarfile.TarInfo(f"usr/share/d{number // 101:03}/{number % 101}")
            if number % 101 == 0:
                member = tarfile.TarInfo(f"usr/share/d{number // 101:03}")
                member.type, member.mode = tarfile.DIRTYPE, 0o755
            data = b"" if member.isdir() else chance.randbytes(chance.randrange(4000))
            member.size = len(data)
            archive.addfile(member, BytesIO(data))
        archive.add("/bin/true", "bin/true")


def oci_layout(directory: Path, tars: list[Path]) -> int:
    """An image of these layers, packed by gzip as build tools do; the size of the layers in bytes."""
    blobs = directory / "blobs/sha256"
    blobs.mkdir(parents=True)

    def put(data: bytes, kind: str) -> dict[str, object]:
        digest = hashlib.sha256(data).hexdigest()
        (blobs / digest).write_bytes(data)
        return {"mediaType": f"application/vnd.oci.image.{kind}", "digest": f"sha256:{digest}", "size": len(data)}

    layers, diff_ids, size = [], [], 0
    for tar in tars:
        packed = subprocess.run(["gzip", "-6nc", tar], stdout=subprocess.PIPE, check=True).stdout
        layers.append(put(packed, "layer.v1.tar+gzip"))
        with open(tar, "rb") as stream:
            diff_ids.append(f"sha256:{hashlib.file_digest(stream, 'sha256').hexdigest()}")
        size += len(packed)
    rootfs = {"type": "layers", "diff_ids": diff_ids}
    config = {"architecture": host_arch(), "os": "linux", "config": {"Cmd": ["bash"]}, "rootfs": rootfs}
    manifest = {"schemaVersion": 2, "config": put(json.dumps(config).encode(), "config.v1+json"), "layers": layers}
    entry = put(json.dumps(manifest).encode(), "manifest.v1+json")
    (directory / "index.json").write_text(json.dumps({"schemaVersion": 2, "manifests": [entry]}))
    (directory / "oci-layout").write_text('{"imageLayoutVersion": "1.0.0"}')
    return size


@contextlib.contextmanager
def registry(directory: Path) -> Iterator[str]:
    """Debian's docker-registry on loopback; its address."""
    with tempfile.TemporaryDirectory(prefix="banger-bench-registry-") as storage:
        port = 5000 + os.getpid() % 20_000
        config = directory / "registry.json"
        config.write_text(
            json.dumps(
                {
                    "version": "0.1",
                    "log": {"level": "error", "accesslog": {"disabled": True}},
                    "storage": {"filesystem": {"rootdirectory": storage}},
                    "http": {"addr": f"127.0.0.1:{port}"},
                }
            )
        )
        quiet = subprocess.DEVNULL
        server = subprocess.Popen(["docker-registry", "serve", config], stdout=quiet, stderr=quiet)
        try:
            for _ in range(100):
                with contextlib.suppress(OSError), urllib.request.urlopen(f"http://127.0.0.1:{port}/v2/"):
                    break
                time.sleep(0.1)
            yield f"127.0.0.1:{port}"
        finally:
            server.terminate()
            server.wait()


def with_umoci(reference: str, scratch: Path) -> float:
    """The same by the usual tools: download, unpack, make a filesystem."""
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir()
    layout, bundle, disk = scratch / "layout", scratch / "bundle", scratch / "disk"
    quiet = subprocess.DEVNULL

    def work() -> None:
        copy = ["skopeo", "copy", "--quiet", "--insecure-policy", "--src-tls-verify=false", f"docker://{reference}"]
        subprocess.run([*copy, f"oci:{layout}:latest"], check=True)
        subprocess.run(["umoci", "unpack", "--image", f"{layout}:latest", bundle], check=True, stderr=quiet)
        make: list[str | Path] = ["mke2fs", "-q", "-F", "-t", "ext4", "-d", bundle / "rootfs", disk, "4G"]
        subprocess.run(make, check=True, stdout=quiet)

    return seconds(work)


def with_podman(reference: str, scratch: Path) -> float:
    """podman pull into a storage that has nothing of it."""
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir()
    argv: list[str | Path] = ["podman", "--root", scratch / "root", "--runroot", scratch / "run", "pull", "--quiet"]
    argv.append("--tls-verify=false")
    measured = seconds(lambda: subprocess.run([*argv, reference], check=True, stdout=subprocess.DEVNULL))
    subprocess.run(["umount", scratch / "root/overlay"], check=False, stderr=subprocess.DEVNULL)
    return measured


def main() -> None:
    with scratch_host() as host, tempfile.TemporaryDirectory(prefix="banger-bench-") as directory:
        scratch = Path(directory)
        base, packages, files = (scratch / name for name in ("base.tar", "packages.tar", "files.tar"))
        base_layer(host, base)
        package_layer(host, scratch, packages)
        small_files(files)
        size = oci_layout(scratch / "image", [base, packages])
        oci_layout(scratch / "files", [files])
        with registry(scratch) as address:
            for name in ("image", "files"):
                copy = ["skopeo", "copy", "--quiet", "--insecure-policy", "--dest-tls-verify=false"]
                subprocess.run([*copy, f"oci:{scratch / name}", f"docker://{address}/{name}"], check=True)
            measure(host, scratch, address, size, files)
    print(load())


def measure(host: Host, scratch: Path, address: str, size: int, files: Path) -> None:
    pid = host.client.call(op.DAEMON_STATUS, m.Empty()).pid

    def pull(name: str, warm: bool) -> float:
        if not warm:
            host.client.call(op.IMAGE_CACHE_PRUNE, m.CachePrune())
        return seconds(lambda: host.client.call(op.IMAGE_PULL, m.ImagePull(f"{address}/{name}", force=True)))

    def packed() -> float:
        with open(files, "rb") as tar:
            argv: list[str | Path] = ["tar2sqfs", "-q", "-f", "-c", "zstd", "-X", "level=1", scratch / "files.squashfs"]
            return seconds(lambda: subprocess.run(argv, stdin=tar, check=True))

    before = resident(pid, "VmRSS")
    reference = f"{address}/image"
    sides = [
        lambda: pull("image", False),
        lambda: pull("image", True),
        lambda: with_umoci(reference, scratch / "umoci"),
    ]
    podman = shutil.which("podman") is not None
    if podman:
        sides.append(lambda: with_podman(reference, scratch / "podman"))
    cold, warm, umoci, *others = in_turn(ROUNDS, *sides)
    what = f"{size / 1e6:.0f} MB in two layers"
    report(f"pull of {what}", cold, "skopeo copy, umoci unpack, mke2fs -d", umoci)
    report("the same, layers in the cache", warm, "skopeo copy, umoci unpack, mke2fs -d", umoci)
    if podman:
        report(f"pull of {what}", cold, "podman pull", others[0])
    else:
        print("podman pull: not measured, podman is not installed")
    many, alone = in_turn(ROUNDS, lambda: pull("files", False), packed)
    report("pull of 60,000 files", many, "tar2sqfs alone", alone)
    extra = resident(pid, "VmHWM") - before
    print(f"{'daemon: peak above its size before':<44} {extra / 1e6:9.1f} MB")


if __name__ == "__main__":
    main()
