"""Pulls with other functions in the place of those that reach beyond this host: shared, reused, overtaken, ended."""

from __future__ import annotations

import asyncio
import functools
import json
import os
import subprocess
import threading
from collections.abc import Callable, Coroutine, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from banger.api import models as m
from banger.api.errors import BangerError, Code
from banger.config import Config
from banger.daemon.image_pulls import BundleFetch
from banger.daemon.image_service import ImageService
from banger.daemon.jobs import Report, Workers
from banger.disk.squashfs import Contents
from banger.hostpackages import Use
from banger.imagecat import fetch, oci
from banger.imagecat.build import Facts, Publishing, finalize_rootfs
from banger.imagecat.catalog import CatalogEntry, revision
from banger.imagecat.importer import import_image
from banger.imagecat.manifest import ImageManifest, read_local, write_local
from banger.job import Job, Progress
from banger.kernelcat.manifest import KernelManifest
from banger.kernelcat.manifest import read_local as read_kernel
from banger.oci import pull
from banger.oci.blobs import BlobCache
from banger.oci.manifest import Descriptor
from banger.oci.platform import Platform
from banger.oci.source import Environment
from banger.paths import Layout
from banger.vmm.detect import host_arch
from tests.process.test_image_pull import BASE, ELF, PADDING
from tests.process.test_image_register import install_kernel, root_directory
from tests.registry import image, layer, oci_layout, running_registry

SHA256 = "3" * 64
AMD64 = Platform("linux", "amd64")


@pytest.fixture
def layout(tmp_path: Path) -> Layout:
    """Directories with a catalog `corp` that has the image `tiny`, which is nowhere to be had."""
    layout = Layout(*(tmp_path / name for name in ("config", "state", "cache", "run")))
    layout.images.mkdir(parents=True)
    catalog = layout.image_catalogs / "corp"
    catalog.mkdir(parents=True)
    entry = {"name": "tiny", "distro": "x", "arch": host_arch(), "kind": "bundle", "size_bytes": 1}
    entry |= {"tarball_url": "http://127.0.0.1:1/tiny", "tarball_sha256": SHA256}
    (catalog / "catalog.json").write_text(json.dumps({"version": 1, "entries": [entry]}))
    source = {"location": "http://127.0.0.1:1/catalog.json", "public_key": "", "refreshed_at": "2026-01-01T00:00:00Z"}
    (catalog / "source.json").write_text(json.dumps(source))
    root_directory(tmp_path / "root")
    return layout


class Kernels:
    """Kernels as they are there; remembers what was asked for."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self.asked: list[tuple[str, str]] = []

    async def ensure(self, name: str, report: Report, arch: str = "") -> KernelManifest:
        self.asked.append((name, arch))
        return read_kernel(self._directory, name)

    def uses(self, name: str, arch: str = "") -> set[Use]:
        return set()


class Nobody:
    def vms_with_image(self, name: str) -> list[str]:
        return []


class Bundles:
    """Makes images of a directory instead of bundles; `meanwhile` is called once while the first is made."""

    def __init__(self, root: Path, meanwhile: Callable[[], object] = lambda: None) -> None:
        self._root = root
        self._meanwhile = meanwhile
        self.made: list[tuple[str, str]] = []

    def __call__(
        self,
        images_dir: Path,
        name: str,
        entry: CatalogEntry,
        job: Job,
        *,
        environment: fetch.Environment,
        kernel: Path | None,
        replace: bool,
        publishing: Publishing,
    ) -> ImageManifest:
        self.made.append((name, entry.origin))
        if len(self.made) == 1:
            self._meanwhile()
        manifest = import_image(images_dir, name, self._root, job, replace=replace, publishing=publishing)
        return released(images_dir, manifest, f"{entry.origin}/{entry.name}", revision(entry))


def released(images_dir: Path, manifest: ImageManifest, origin: str, release: str) -> ImageManifest:
    """An image as if it came from a catalog."""
    manifest = replace(manifest, origin=origin, revision=release)
    write_local(images_dir / manifest.name, manifest)
    return manifest


def serve(
    layout: Layout,
    test: Callable[[ImageService, Kernels], Coroutine[None, None, None]],
    *,
    bundle_fetch: BundleFetch = fetch.fetch_image,
    flatten: oci.Flatten = oci.pull_and_flatten,
    finalize: oci.Finalize = finalize_rootfs,
) -> None:
    async def main() -> None:
        workers, kernels = Workers(), Kernels(layout.kernels)
        service = ImageService(
            layout,
            Config(),
            workers,
            threading.Lock(),
            Nobody(),
            kernels,
            pull_and_flatten=flatten,
            finalize_pulled_rootfs=finalize,
            bundle_fetch=bundle_fetch,
        )
        try:
            async with asyncio.timeout(60):
                await test(service, kernels)
        finally:
            workers.close()

    asyncio.run(main())


def ignore(progress: Progress) -> None:
    pass


def code_of(action: Callable[[], object]) -> Code:
    with pytest.raises(BangerError) as caught:
        action()
    return caught.value.code


def test_equal_pulls_of_a_bundle_are_one(tmp_path: Path, layout: Layout) -> None:
    bundles = Bundles(tmp_path / "root")

    async def test(service: ImageService, kernels: Kernels) -> None:
        infos = await asyncio.gather(*[service.image_pull(m.ImagePull("corp/tiny"), ignore) for _ in range(5)])
        assert {(info.name, info.origin) for info in infos} == {("tiny", "corp/tiny")}
        assert (await service.ensure_image("corp/tiny", ignore)).origin == "corp/tiny"

    serve(layout, test, bundle_fetch=bundles)
    assert bundles.made == [("tiny", "corp")]


def test_an_image_from_elsewhere_is_not_that_of_a_catalog(tmp_path: Path, layout: Layout) -> None:
    """VMs must not start from what merely has the name of what they ask for."""
    import_image(layout.images, "tiny", tmp_path / "root", Job())

    async def test(service: ImageService, kernels: Kernels) -> None:
        with pytest.raises(BangerError) as caught:
            await service.ensure_image("corp/tiny", ignore)
        assert caught.value.code is Code.EXISTS
        assert caught.value.message == f"the name 'tiny' belongs to an image from {tmp_path / 'root'}"
        assert (await service.ensure_image("tiny", ignore)).origin == ""

    serve(layout, test)


def test_a_release_that_is_there_is_not_fetched_again(tmp_path: Path, layout: Layout) -> None:
    """Nothing answers where the bundle is said to be."""
    there = import_image(layout.images, "tiny", tmp_path / "root", Job())
    there = released(layout.images, there, "corp/tiny", SHA256)
    install_kernel(layout.kernels)

    async def refused(service: ImageService, request: m.ImagePull) -> BangerError:
        with pytest.raises(BangerError) as caught:
            await service.image_pull(request, ignore)
        return caught.value

    async def test(service: ImageService, kernels: Kernels) -> None:
        assert (await service.image_pull(m.ImagePull("corp/tiny"), ignore)).digest == SHA256
        error = await refused(service, m.ImagePull("corp/tiny", kernel_ref="mine"))
        assert (error.code, error.message) == (
            Code.EXISTS, "there already is an image 'tiny', and its kernel is the default one"
        )  # fmt: skip
        assert kernels.asked == [("mine", host_arch())]
        released(layout.images, there, "corp/tiny", "4" * 64)
        error = await refused(service, m.ImagePull("corp/tiny"))
        assert "and its catalog has another release of it" in error.message
        assert (await refused(service, m.ImagePull("corp/tiny", force=True))).code is Code.DOWNLOAD
        (layout.images / "tiny/manifest.json").write_text("{}")
        error = await refused(service, m.ImagePull("corp/tiny"))
        assert "and it is broken" in error.message

    serve(layout, test)


def test_functions_in_the_place_of_those_for_container_images(tmp_path: Path, layout: Layout) -> None:
    """What they leave and return is what is published."""
    saved = oci_layout(tmp_path / "layout", [image([BASE])])

    def flatten(
        opened: pull.Opened,
        layers: Sequence[Descriptor],
        diff_ids: Sequence[str],
        rootfs: Path,
        cache: BlobCache,
        job: Job,
    ) -> Contents:
        assert list(diff_ids) == [BASE.diff_id]
        rootfs.write_bytes(b"packed")
        return Contents(members=7)

    def finalize(staged: Path, name: str, contents: Contents, facts: Facts, job: Job) -> ImageManifest:
        assert contents.members == 7
        size = (staged / "rootfs.squashfs").stat().st_size
        return ImageManifest(
            name, "amd64", facts.source, "2026-01-01T00:00:00Z", "rootfs.squashfs", SHA256, size, layers=facts.layers
        )

    async def test(service: ImageService, kernels: Kernels) -> None:
        info = await service.image_pull(m.ImagePull(f"oci:{saved}", "mine", "linux/amd64"), ignore)
        assert (info.size_bytes, info.sha256, info.layers) == (6, SHA256, 1)

    serve(layout, test, flatten=flatten, finalize=finalize)
    assert (layout.images / "mine/rootfs.squashfs").read_bytes() == b"packed"


@pytest.mark.parametrize("same", [True, False])
def test_a_pull_that_another_one_overtakes(tmp_path: Path, layout: Layout, same: bool) -> None:
    one = f"oci:{oci_layout(tmp_path / 'one', [image([BASE])])}"
    other = one if same else f"oci:{oci_layout(tmp_path / 'other', [image([BASE])])}"
    pulled = functools.partial(
        oci.pull_oci,
        layout.images,
        "it",
        job=Job(),
        platform=AMD64,
        environment=Environment(layout.cache),
        cache=BlobCache(layout.blobs, 0),
        finalize=finalize_rootfs,
    )
    overtaken: list[ImageManifest] = []

    def flatten(*arguments: object) -> Contents:
        if not overtaken:
            overtaken.append(pulled(text=other, replace=True, flatten=oci.pull_and_flatten))
        return oci.pull_and_flatten(*arguments)  # type: ignore[arg-type]

    if same:
        assert pulled(text=one, flatten=flatten) == overtaken[0]
    else:
        assert code_of(lambda: pulled(text=one, flatten=flatten)) is Code.EXISTS
    assert read_local(layout.images, "it") == overtaken[0]
    assert [path.name for path in layout.images.iterdir()] == ["it"]


@pytest.fixture
def pulled(tmp_path: Path, layout: Layout, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Job, Path], object]]:
    """Pulls an image of two layers from a registry into a directory."""
    monkeypatch.setenv("REGISTRY_AUTH_FILE", str(tmp_path / "no-logins"))
    padding = layer({"bin/": None, "bin/sh": ELF, "padding": PADDING})
    with running_registry(tmp_path / "registry") as registry:
        registry.push(oci_layout(tmp_path / "layout", [image([BASE, padding])]), "two")
        yield lambda job, images_dir: oci.pull_oci(
            images_dir,
            "it",
            f"{registry.address}/two",
            job,
            platform=AMD64,
            environment=Environment(layout.cache),
            cache=BlobCache(images_dir.parent / "blobs", 1 << 30),
            flatten=oci.pull_and_flatten,
            finalize=finalize_rootfs,
        )


def left(directory: Path) -> list[str]:
    """The staging that is there."""
    return [str(path) for path in directory.rglob(".staging-*")]


@pytest.mark.parametrize(("stage", "done"), [("resolve", 0), ("download", 0), ("download", 1 << 20), ("digest", 0)])
def test_a_pull_is_cancelled(
    tmp_path: Path, layout: Layout, pulled: Callable[[Job, Path], object], stage: str, done: int
) -> None:
    """Wherever it is: no thread and no file of it stays, and the next one succeeds."""
    threads = set(threading.enumerate())

    def cancel(progress: Progress) -> None:
        if progress.stage == stage and (progress.done or 0) >= done:
            job.cancel()

    job = Job(cancel)
    assert code_of(lambda: pulled(job, layout.images)) is Code.CANCELLED
    assert set(threading.enumerate()) == threads
    assert left(layout.state) == []
    assert list(layout.images.iterdir()) == []
    pulled(Job(), layout.images)


def test_a_pull_on_a_full_disk(tmp_path: Path, pulled: Callable[[Job, Path], object]) -> None:
    if os.geteuid() != 0:
        pytest.skip("mounting a small filesystem needs root")
    mount = tmp_path / "small"
    mount.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", mount], check=True)
    try:
        threads = set(threading.enumerate())
        assert code_of(lambda: pulled(Job(), mount / "images")) is Code.EXHAUSTED
        assert set(threading.enumerate()) == threads
        assert left(mount) == []
        assert [*(mount / "images").iterdir(), *(mount / "blobs").iterdir()] == []
    finally:
        subprocess.run(["umount", mount], check=True)
