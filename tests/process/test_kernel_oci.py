"""Kernels out of images in a registry: the layouts in use, damage, hostile images, and the way through a daemon."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import subprocess
import sys
import tempfile
import tarfile
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest

from banger.api import models as m
from banger.api import operations as op
from banger.api.errors import BangerError, Code
from banger.job import Job
from banger.kernelcat import manifest as kernels
from banger.kernelcat.archive import ARCHIVE_LIMIT
from banger.kernelcat.catalog import CatalogEntry
from banger.kernelcat.fetch import Environment, fetch
from banger.kernelcat.manifest import KernelManifest
from tests.daemons import TIMEOUT, DaemonProcess, running_daemon
from tests.http_server import Reply, Server, serving
from tests.registry import (
    PASSWORD,
    USER,
    Image,
    Layer,
    RunningRegistry,
    cutting_proxy,
    digest_of,
    file_layer,
    image,
    layer,
    oci_layout,
    running_registry,
)
from tests.unit.kernelcat import builders

VERSION = builders.VERSION
KERNEL = builders.elf()
LINK = "boot/vmlinux"

Files = Mapping[str, bytes | str | None]


@pytest.fixture(scope="module")
def registry(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningRegistry]:
    with running_registry(tmp_path_factory.mktemp("registry") / "registry") as registry:
        yield registry


@pytest.fixture(scope="module")
def modules(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """lib/modules/<version> of the test kernel."""
    tree = builders.module_tree(tmp_path_factory.mktemp("modules"), builders.VIRTIO, builders.BUILTIN)
    return {f"lib/modules/{VERSION}/{name}": data for name, data in files_of(tree).items()}


@pytest.fixture
def state(tmp_path: Path) -> Iterator[State]:
    state = State(tmp_path / "state")
    yield state
    state.check_clean()


class State:
    """A kernels directory and a cache, without a daemon."""

    def __init__(self, directory: Path) -> None:
        self.kernels, self._cache = directory / "kernels", directory / "cache"

    def pull(self, reference: str, arch: str = "amd64", force: bool = False, job: Job | None = None) -> KernelManifest:
        entry = CatalogEntry("kernel", "", arch, "", "oci", image=reference, origin="")
        environment = Environment(self._cache)
        return fetch(self.kernels, "kernel", entry, job or Job(), environment=environment, replace=force)

    def refused(self, reference: str, arch: str = "amd64", force: bool = False) -> BangerError:
        with pytest.raises(BangerError) as caught:
            self.pull(reference, arch, force)
        assert caught.value.message.isprintable()
        assert len(caught.value.message) < 1000
        return caught.value

    def vmlinux(self) -> bytes:
        return (self.kernels / "kernel/vmlinux").read_bytes()

    def packed(self) -> set[str]:
        """The files of the kernel's modules."""
        argv = ["rdsquashfs", "--describe", self.kernels / "kernel/modules.squashfs"]
        lines = subprocess.run(argv, check=True, capture_output=True, text=True).stdout.splitlines()
        return {line.split()[1].removeprefix("/") for line in lines if line.startswith("file ")}

    def check_clean(self) -> None:
        assert not list(self._cache.glob("*"))
        assert {path.name for path in self.kernels.glob("*")} <= {"kernel"}


def files_of(directory: Path) -> dict[str, bytes]:
    files = sorted(path for path in directory.rglob("*") if path.is_file())
    return {path.relative_to(directory).as_posix(): path.read_bytes() for path in files}


def tar(files: Mapping[str, bytes]) -> bytes:
    return builders.tar(builders.tar_member(name, data) for name, data in files.items())


def push(registry: RunningRegistry, directory: Path, name: str, *images: Image) -> str:
    """Push an image, or an index of several, byte for byte: skopeo would compress layers that are not."""
    layout = oci_layout(Path(tempfile.mkdtemp(dir=directory)) / "layout", images)
    return registry.push(layout, name, "--preserve-digests")


def plain(modules: Files) -> list[Layer]:
    """How a Dockerfile leaves what Debian's package installs."""
    return [layer({"boot": None, f"boot/vmlinux-{VERSION}": KERNEL, "etc/passwd": b"root", **modules})]


def split(modules: Files) -> list[Layer]:
    """Layers in each compression; the first kernel, which is newer, and its modules are removed by the others."""
    old = {"boot/vmlinux-99.1.0": builders.elf("99.1.0"), "lib/modules/99.1.0/modules.dep": b"", "vmlinux": b"old"}
    wiped = {"boot/.wh.vmlinux-99.1.0": b"", "lib/modules/.wh..wh..opq": b"", ".wh.vmlinux": b""}
    return [
        layer(old),
        layer({**wiped, f"boot/vmlinux-{VERSION}": b"older"}, "zstd"),
        layer({f"boot/vmlinux-{VERSION}": KERNEL, **modules}, ""),
    ]


def linuxkit(modules: Files) -> list[Layer]:
    """Two archives in the image: of the modules, and of the headers."""
    data = {name: data for name, data in modules.items() if isinstance(data, bytes)}
    return [layer({"kernel": KERNEL, "kernel.tar": tar(data), "kernel-dev.tar": tar({"usr/src/x.h": b"x"})})]


def ignite(modules: Files) -> list[Layer]:
    """boot/vmlinux is a link to the one with a version."""
    return [layer({LINK: f"vmlinux-{VERSION}", f"{LINK}-{VERSION}": KERNEL, "boot/config-x": b"", **modules})]


def merged(modules: Files) -> list[Layer]:
    """A merged /usr, and a link that starts at the root and leads to a later layer."""
    version = f"usr/lib/modules/{VERSION}"
    below = {f"usr/{name}": data for name, data in modules.items()}
    return [
        layer({"lib": "usr/lib", LINK: f"/lib/modules/{VERSION}/vmlinuz", **below}),
        layer({f"{version}/vmlinuz": KERNEL}),
    ]


def oras(modules: Files) -> list[Layer]:
    """Files pushed one by one, and a directory, which ORAS packs and marks."""
    directory = layer(modules)
    marks = {"org.opencontainers.image.title": "lib", "io.deis.oras.content.unpack": "true"}
    return [
        file_layer("vmlinux", KERNEL),
        file_layer("README.md", b"# A kernel", "text/markdown"),
        dataclasses.replace(directory, annotations=marks),
    ]


def oras_archive(modules: Files) -> list[Layer]:
    data = {name: data for name, data in modules.items() if isinstance(data, bytes)}
    archive = file_layer("kernel.tar", tar(data), "application/x-tar")
    return [file_layer("kernel", KERNEL, "application/octet-stream"), archive]


@pytest.mark.parametrize("made", [plain, split, linuxkit, ignite, merged, oras, oras_archive])
def test_layouts_in_use(
    registry: RunningRegistry,
    state: State,
    modules: Files,
    tmp_path: Path,
    made: Callable[[Files], list[Layer]],
) -> None:
    name = f"layouts/{made.__name__}"
    digest = push(registry, tmp_path, f"{name}:6.1", image(made(modules)))
    for reference in (f"{registry.address}/{name}:6.1", f"{registry.address}/{name}@{digest}"):
        kernel = state.pull(reference, force=True)
        assert (kernel.kernel_version, kernel.arch, kernel.modules, kernel.missing) == (VERSION, "amd64", True, ())
        assert (kernel.source, kernel.revision, kernel.origin) == (f"oci:{reference}", digest, "")
        assert kernel.sha256 == hashlib.sha256(KERNEL).hexdigest()
        assert state.vmlinux() == KERNEL
        assert set(builders.VIRTIO) <= state.packed()
        assert kernels.verify_local(state.kernels, "kernel", Job()) == ""
