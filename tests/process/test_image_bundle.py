"""Image bundles: written the same everywhere, fetched in one pass, and refused when they are not what they say."""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
import tarfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import zstandard

from banger import system
from banger.api import models as m
from banger.api import operations as op
from banger.api.errors import BangerError, Code
from banger.disk import space
from banger.imagecat import bundle
from banger.imagecat.bundle import fetch_bundle, write_image_bundle
from banger.imagecat.catalog import CatalogEntry
from banger.imagecat.importer import import_image
from banger.imagecat.manifest import ImageConfig, ImageManifest, Layer, read_local, write_local
from banger.imagecat.register import register_image
from banger.imagecat.rootfs import filesystem_type
from banger.job import Job
from banger.vmm.detect import host_arch
from tests.daemons import running_daemon
from tests.process.bundle_server import BundleServer, bundle_server
from tests.process.test_image_register import banger, ext4, install_kernel, root_directory

MIB = 1 << 20
Members = list[tuple[str, bytes]]


@pytest.fixture
def images(tmp_path: Path) -> Path:
    return tmp_path / "images"


@pytest.fixture
def server() -> Iterator[BundleServer]:
    with bundle_server() as server:
        yield server


@pytest.fixture
def image(tmp_path: Path) -> Path:
    """The entry of an image with all that a bundle can carry, in a directory of its own."""
    root_directory(tmp_path / "root")
    published = tmp_path / "publisher"
    import_image(published, "tiny", tmp_path / "root", Job())
    manifest = replace(
        read_local(published, "tiny"),
        config=ImageConfig(cmd=("tool",), user="7", stop_signal="SIGINT"),
        home="/srv/home",
        layers=(Layer(f"sha256:{'3' * 64}", f"sha256:{'4' * 64}", 5),),
        source="/home/someone/secret",
        origin="corp/tiny",
    )
    write_local(published / "tiny", manifest)
    (published / "tiny/config.json").write_text('{"os": "linux"}')
    return published / "tiny"


def exported(entry: Path) -> bytes:
    output = io.BytesIO()
    write_image_bundle(entry, read_local(entry.parent, entry.name), output, Job())
    return output.getvalue()


def members_of(content: bytes) -> Members:
    unpacked = zstandard.ZstdDecompressor().stream_reader(io.BytesIO(content)).read()
    with tarfile.open(fileobj=io.BytesIO(unpacked)) as archive:
        return [(member.name, archive.extractfile(member).read()) for member in archive]  # type: ignore[union-attr]


def packed(members: Members, change: Callable[[tarfile.TarInfo], object] = lambda member: None) -> bytes:
    output = io.BytesIO()
    with tarfile.open(fileobj=output, mode="w") as archive:
        for name, data in members:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            change(member)
            archive.addfile(member, io.BytesIO(data))
    return zstandard.compress(output.getvalue(), 1)


def catalog_entry(content: bytes, url: str, **fields: object) -> CatalogEntry:
    entry = CatalogEntry(
        "tiny",
        "x",
        host_arch(),
        "bundle",
        size_bytes=len(content),
        tarball_url=url,
        tarball_sha256=hashlib.sha256(content).hexdigest(),
        origin="corp",
    )
    return replace(entry, **fields)  # type: ignore[arg-type]


def fetch_file(images: Path, content: bytes, replace: bool = False) -> ImageManifest:
    file = images.parent / "bundle.tar.zst"
    file.write_bytes(content)
    return fetch_bundle(images, "mine", catalog_entry(content, str(file)), Job(), replace=replace)


def refused(code: Code, action: Callable[[], object]) -> str:
    with pytest.raises(BangerError) as caught:
        action()
    assert caught.value.code is code, caught.value
    assert caught.value.message.isprintable()
    return caught.value.message


def left(images: Path) -> list[str]:
    return [path.name for path in images.iterdir()] if images.exists() else []


def ext4_members(tmp_path: Path, size: int = 64 * MIB) -> Members:
    """A bundle of an ext4 filesystem that is mostly zeros."""
    disk = ext4(tmp_path / "rootfs.ext4", root_directory(tmp_path / "tree"), size)
    content = disk.read_bytes()
    document = {
        "arch": host_arch(),
        "rootfs": "rootfs.ext4",
        "rootfs_sha256": hashlib.sha256(content).hexdigest(),
        "size_bytes": len(content),
    }
    return [("manifest.json", json.dumps(document).encode()), ("rootfs.ext4", content)]


# Writing ---------------------------------------------------------------------------------------------------------


def test_the_same_image_is_the_same_bundle_on_any_machine(image: Path, images: Path) -> None:
    first = exported(image)
    assert [name for name, _ in members_of(first)] == ["manifest.json", "rootfs.squashfs", "config.json"]
    fetch_file(images, first)
    (images / "mine/work-seed.ext4").write_bytes(b"with the user's key")
    assert exported(images / "mine") == first
    assert b"secret" not in members_of(first)[0][1]
    assert b"imported_at" not in members_of(first)[0][1]


def test_only_what_the_manifest_says_is_exported(image: Path) -> None:
    with open(image / "rootfs.squashfs", "r+b") as stream:
        stream.seek(200)
        stream.write(b"changed")
    assert "image 'tiny'" in refused(Code.CORRUPT, lambda: exported(image))


def test_a_kernel_of_the_image_s_own_is_not_published_without_a_word(image: Path) -> None:
    manifest = replace(read_local(image.parent, "tiny"), own_kernel=True)
    message = refused(Code.UNSUPPORTED, lambda: write_image_bundle(image, manifest, io.BytesIO(), Job()))
    assert "kernel of its own" in message


def test_a_registered_image_is_exported_by_its_file(tmp_path: Path, images: Path) -> None:
    kernel = install_kernel(tmp_path / "kernels")
    disk = ext4(tmp_path / "disk", root_directory(tmp_path / "tree"), 32 * MIB)
    manifest = register_image(images, "disk", disk, kernel, Job())
    output = io.BytesIO()
    write_image_bundle(images / "disk", manifest, output, Job())
    names = [name for name, _ in members_of(output.getvalue())]
    assert names == ["manifest.json", "rootfs.ext4"]
    assert fetch_file(images, output.getvalue()).kernel_ref == "mine"


# Fetching --------------------------------------------------------------------------------------------------------


def test_a_bundle_over_http(image: Path, images: Path, server: BundleServer) -> None:
    content = server.content["tiny.tar.zst"] = exported(image)
    entry = catalog_entry(content, f"{server.address}/gone", mirrors=(f"{server.address}/tiny.tar.zst?token=secret",))
    server.content["tiny.tar.zst?token=secret"] = content
    manifest = fetch_bundle(images, "mine", entry, Job())
    assert manifest == read_local(images, "mine")
    before = read_local(image.parent, "tiny")
    assert (manifest.name, manifest.origin, manifest.revision) == ("mine", "corp/tiny", entry.tarball_sha256)
    assert manifest.source == f"pull:{server.address}/gone"
    assert (manifest.config, manifest.home, manifest.layers) == (before.config, before.home, before.layers)
    assert (images / "mine/rootfs.squashfs").read_bytes() == (image / "rootfs.squashfs").read_bytes()
    assert (images / "mine/config.json").read_text() == '{"os": "linux"}'
    assert filesystem_type(images / "mine/work-seed.ext4") == "ext4"  # made here
    assert left(images) == ["mine"]


def test_zeros_are_holes_and_no_bomb(tmp_path: Path, images: Path) -> None:
    members = ext4_members(tmp_path, 512 << 20)
    seed = ext4(tmp_path / "seed", root_directory(tmp_path / "home"), 32 * MIB).read_bytes()
    content = packed([*members, ("work-seed.ext4", seed)])
    assert len(content) < 2 * MIB
    manifest = fetch_file(images, content)
    rootfs = images / "mine/rootfs.ext4"
    assert (manifest.filesystem, rootfs.stat().st_size) == ("ext4", 512 << 20)
    assert system.allocated_bytes(rootfs) < 16 * MIB
    assert (images / "mine/work-seed.ext4").read_bytes() == seed
    with open(rootfs, "rb") as stream:
        assert hashlib.file_digest(stream, "sha256").hexdigest() == manifest.rootfs_sha256


def test_an_image_is_replaced_only_when_the_new_one_is_complete(image: Path, images: Path) -> None:
    content = exported(image)
    first = fetch_file(images, content)
    refused(Code.EXISTS, lambda: fetch_file(images, content))
    refused(Code.CORRUPT, lambda: fetch_file(images, content[:-100], replace=True))
    assert read_local(images, "mine") == first
    assert fetch_file(images, content, replace=True).rootfs_sha256 == first.rootfs_sha256
    assert left(images) == ["mine"]


def test_fields_of_newer_versions_are_read_past_and_private_ones_ignored(image: Path, images: Path) -> None:
    (_, text), *rest = members_of(exported(image))
    document = {**json.loads(text), "hologram": 7, "managed": False, "work_seed": "/etc/shadow", "origin": "banger/x"}
    manifest = fetch_file(images, packed([("manifest.json", json.dumps(document).encode()), *rest]))
    assert (manifest.managed, manifest.work_seed, manifest.origin) == (True, "", "corp/tiny")


def _with_manifest(**changes: object) -> Callable[[Members], Members]:
    def change(members: Members) -> Members:
        document = {**json.loads(members[0][1]), **changes}
        return [("manifest.json", json.dumps(document).encode()), *members[1:]]

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda members: [], "is empty"),
        (lambda members: members[1:], "begins with rootfs.squashfs"),
        (lambda members: members[1::-1], "begins with rootfs.squashfs"),
        (lambda members: members[:1], "no root filesystem"),
        (lambda members: [*members, members[1]], "rootfs.squashfs twice"),
        (lambda members: [members[0], *members], "manifest.json twice"),
        (lambda members: [*members, ("rootfs.ext4", b"x")], "which is not what its manifest.json says"),
        (lambda members: [*members, ("../../x", b"")], "which bundles of images do not have|'..'"),
        (lambda members: [*members, ("/etc/passwd", b"")], "which bundles of images do not have"),
        (lambda members: [*members, ("etc/passwd", b"")], "which bundles of images do not have"),
        (lambda members: [*members, ("kernel/vmlinux", b"")], "which bundles of images do not have"),
        (lambda members: [members[0], ("rootfs.squashfs", members[1][1][:-1])], "which is not what"),
        (lambda members: [members[0], ("rootfs.squashfs", b"\0" * len(members[1][1]))], "has another rootfs.squashfs"),
        (lambda members: [*members[:2], ("config.json", b"[]")], "not a JSON object"),
        (lambda members: [*members[:2], ("config.json", b" " * (5 * MIB))], "has a config.json of"),
        (lambda members: [*members, ("work-seed.ext4", b"no filesystem")], "neither an ext4 nor a squashfs"),
        (lambda members: [("manifest.json", b"{"), *members[1:]], "valid JSON"),
        (lambda members: [("manifest.json", b" " * (5 * MIB)), *members[1:]], "has a manifest.json of"),
        (_with_manifest(rootfs="/etc/shadow"), "rootfs"),
        (_with_manifest(rootfs="rootfs.ext4"), "which is not what"),
        (_with_manifest(size_bytes=1), "which is not what"),
        (_with_manifest(rootfs_sha256="x"), "64 hexadecimal"),
        (_with_manifest(arch="mips"), "arch"),
        (_with_manifest(kernel_ref="../x"), "kernel_ref"),
        (_with_manifest(init="systemd"), "init"),
        (_with_manifest(home="root"), "home"),
        (_with_manifest(home="/\ud800"), "home"),
        (_with_manifest(home="/a\nInode type: directory"), "home"),
        (_with_manifest(home="/usr/../usr"), "home"),
        (_with_manifest(home="/etc/app"), "home"),
    ],
)
def test_hostile_bundles(image: Path, images: Path, change: Callable[[Members], Members], message: str) -> None:
    content = packed(change(members_of(exported(image))))
    with pytest.raises(BangerError, match=message) as caught:
        fetch_file(images, content)
    assert caught.value.code is Code.CORRUPT
    assert caught.value.message.isprintable()
    assert left(images) == []


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.DIRTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE])
def test_only_plain_files(image: Path, images: Path, kind: bytes) -> None:
    def change(member: tarfile.TarInfo) -> None:
        if member.name == "config.json":
            member.type, member.linkname, member.size = kind, "rootfs.squashfs", 0

    content = packed([*members_of(exported(image))[:2], ("config.json", b"")], change)
    assert "no plain file" in refused(Code.CORRUPT, lambda: fetch_file(images, content))
    assert left(images) == []


def test_the_superblock_must_be_what_the_name_says(image: Path, images: Path) -> None:
    (_, text), (_, rootfs), *_ = members_of(exported(image))
    document = json.dumps({**json.loads(text), "rootfs": "rootfs.ext4"}).encode()
    content = packed([("manifest.json", document), ("rootfs.ext4", rootfs)])
    assert "is a squashfs filesystem" in refused(Code.CORRUPT, lambda: fetch_file(images, content))


def test_another_architecture_than_the_entry_s(image: Path, images: Path, tmp_path: Path) -> None:
    content = exported(image)
    (tmp_path / "bundle").write_bytes(content)
    other = "arm64" if host_arch() == "amd64" else "amd64"
    entry = catalog_entry(content, str(tmp_path / "bundle"), arch=other)
    message = refused(Code.INVALID, lambda: fetch_bundle(images, "mine", entry, Job()))
    assert host_arch() in message
    assert other in message
    assert left(images) == []


def test_cut_off_anywhere_it_is_refused(image: Path, images: Path) -> None:
    content = exported(image)
    for length in {*range(0, len(content), max(1, len(content) // 40)), len(content) - 1}:
        refused(Code.CORRUPT, lambda size=length: fetch_file(images, content[:size]))  # type: ignore[misc]
        assert left(images) == []


def test_wrong_digests_and_sizes_are_told_by_the_entry(image: Path, images: Path, server: BundleServer) -> None:
    content = server.content["x"] = exported(image)
    url = f"{server.address}/x"
    for fields in ({"tarball_sha256": "ab" * 32}, {"size_bytes": len(content) + 1}, {"size_bytes": 1}):
        entry = catalog_entry(content, url, **fields)
        refused(Code.CORRUPT, lambda given=entry: fetch_bundle(images, "mine", given, Job()))  # type: ignore[misc]
        assert left(images) == []


def test_bombs_are_refused(image: Path, images: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One byte in every block keeps it from being a hole."""
    noise = (b"\1" + bytes((64 << 10) - 1)) * (16 * 256)
    (_, text), *_ = members_of(exported(image))
    document = {**json.loads(text), "size_bytes": len(noise), "rootfs_sha256": hashlib.sha256(noise).hexdigest()}
    content = packed([("manifest.json", json.dumps(document).encode()), ("rootfs.squashfs", noise)])
    monkeypatch.setattr(bundle, "_BOUNDS", replace(bundle._BOUNDS, ratio_from=64 * MIB))
    assert "1000 times its size" in refused(Code.CORRUPT, lambda: fetch_file(images, content))
    monkeypatch.setattr(bundle, "_BOUNDS", replace(bundle._BOUNDS, ratio_from=1 << 40, limit=128 * MIB))
    assert "unpacks to more than" in refused(Code.EXHAUSTED, lambda: fetch_file(images, content))
    assert left(images) == []


def test_a_full_disk(image: Path, images: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content = exported(image)
    monkeypatch.setattr(space, "RESERVE", shutil.disk_usage("/").total * 2)
    assert "not enough disk space" in refused(Code.EXHAUSTED, lambda: fetch_file(images, content))
    assert left(images) == []


def test_cancelled_in_the_middle_nothing_stays(image: Path, images: Path, server: BundleServer) -> None:
    content = server.content["x"] = exported(image)
    job = Job(lambda progress: job.cancel())
    refused(Code.CANCELLED, lambda: fetch_bundle(images, "mine", catalog_entry(content, f"{server.address}/x"), job))
    assert left(images) == []


@contextmanager
def peak_below(limit: int) -> Iterator[None]:
    """Fails when the block makes this process larger by more."""
    Path("/proc/self/clear_refs").write_text("5")
    before = _status("VmRSS")
    yield
    assert _status("VmHWM") - before < limit


def _status(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(f"{key}:"))


def test_memory_does_not_grow_with_the_bundle(image: Path, images: Path) -> None:
    noise = os.urandom(MIB) * 256
    (_, text), *_ = members_of(exported(image))
    document = {**json.loads(text), "size_bytes": len(noise), "rootfs_sha256": hashlib.sha256(noise).hexdigest()}
    content = packed([("manifest.json", json.dumps(document).encode()), ("rootfs.squashfs", noise)])
    del noise
    with peak_below(80 * MIB):
        refused(Code.CORRUPT, lambda: fetch_file(images, content))  # no filesystem


# Through the daemon ------------------------------------------------------------------------------------------------


def test_exported_published_pulled_and_outdated(tmp_path: Path) -> None:
    root_directory(tmp_path / "root")
    www = tmp_path / "www"
    www.mkdir()
    with running_daemon(tmp_path / "home") as daemon:
        banger(daemon, "image", "import", "tiny", "--from", str(tmp_path / "root"))
        for options in ([], ["--bundle", "--oci"]):
            assert "--bundle or with --oci" in banger(
                daemon, "image", "export", "tiny", "-o", str(www / "x"), *options, status=2
            )
        entry = json.loads(banger(daemon, "image", "export", "tiny", "--bundle", "-o", str(www / "tiny.tar.zst")))
        assert entry["tarball_sha256"] == hashlib.sha256((www / "tiny.tar.zst").read_bytes()).hexdigest()
        again = ["image", "export", "tiny", "--bundle", "-o", str(www / "tiny.tar.zst")]
        assert "exists already" in banger(daemon, *again, status=1)
        assert json.loads(banger(daemon, *again, "--force", "--url", "https://example.org/x"))["tarball_url"] == (
            "https://example.org/x"
        )

        catalog = www / "catalog.json"
        catalog.write_text(json.dumps({"version": 1, "entries": [{**entry, "name": "shared"}]}))
        assert "1 image, not signed" in banger(daemon, "image", "catalog", "add", str(catalog), "--name", "corp")
        assert state(daemon.client.call(op.IMAGE_CATALOG, m.Empty()), "shared") == "available"
        assert "pulled shared" in banger(daemon, "image", "pull", "corp/shared")
        assert state(daemon.client.call(op.IMAGE_CATALOG, m.Empty()), "shared") == "pulled"
        manifest = read_local(daemon.layout.images, "shared")
        assert (manifest.origin, manifest.revision) == ("corp/shared", entry["tarball_sha256"])

        newer = {**entry, "name": "shared", "tarball_sha256": "ab" * 32}
        catalog.write_text(json.dumps({"version": 1, "entries": [newer]}))
        banger(daemon, "image", "catalog", "refresh")
        assert state(daemon.client.call(op.IMAGE_CATALOG, m.Empty()), "shared") == "outdated"
        assert "outdated" in banger(daemon, "image", "list", "--available")
        assert "other" in banger(daemon, "image", "pull", "other/shared", status=1)
        assert "removed corp" in banger(daemon, "image", "catalog", "rm", "corp")
        assert not (daemon.layout.image_catalogs / "corp").exists()


def state(listed: m.ImageCatalog, name: str) -> str:
    return next(entry.state for entry in listed.entries if entry.name == name)


def test_an_image_of_a_bundle_without_a_work_seed_gets_one(image: Path, tmp_path: Path) -> None:
    content = exported(image)
    (tmp_path / "fetched").mkdir()
    fetch_file(tmp_path / "fetched/images", content)
    assert filesystem_type(tmp_path / "fetched/images/mine/work-seed.ext4") == "ext4"
