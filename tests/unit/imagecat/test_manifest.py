"""Image manifests are read strictly and written whole."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from banger.api.errors import BangerError, Code
from banger.imagecat.build import parse_os_release
from banger.imagecat.manifest import (
    ImageConfig,
    ImageManifest,
    delete_local,
    image_paths,
    images_with_kernel,
    kernel_of,
    list_local,
    parse_manifest,
    read_local,
    write_local,
)
from banger.imagecat.registered import Registered
from banger.kernelcat import manifest as kernels
from banger.kernelcat.manifest import KernelManifest

MANIFEST = ImageManifest(
    name="tiny",
    arch="amd64",
    source="rootfs.tar",
    imported_at="2026-01-31T12:00:00Z",
    rootfs="rootfs.squashfs",
    rootfs_sha256="0" * 64,
    size_bytes=4096,
    kernel_ref="generic",
    config=ImageConfig(entrypoint=("/hello",), cmd=("a", "b"), env=("A=b",), user="1:2", workdir="/w", volumes=("/v",)),
)
REGISTERED = {"part": "initrd", "path": "/srv/initrd", "size_bytes": 5, "mtime_ns": 7, "sha256": "1" * 64}


def test_a_manifest_reads_back() -> None:
    assert parse_manifest(MANIFEST.to_json()) == MANIFEST
    unmanaged = dataclasses.replace(
        MANIFEST,
        kernel_ref="",
        own_kernel=True,
        managed=False,
        rootfs="/srv/root.ext4",
        registered=(Registered("initrd", "/srv/initrd", 5, 7, "1" * 64),),
    )
    assert parse_manifest(unmanaged.to_json()) == unmanaged


@given(st.lists(st.text()), st.text())
def test_any_config_reads_back(words: list[str], word: str) -> None:
    config = ImageConfig(entrypoint=tuple(words), cmd=tuple(words), env=tuple(words), user=word, workdir=word)
    fields = json.loads(MANIFEST.to_json()) | {"config": json.loads(json.dumps(config.__dict__))}
    assert parse_manifest(json.dumps(fields)).config == config


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("name", 5),
        ("arch", "riscv64"),
        ("rootfs", "../../etc/shadow"),
        ("rootfs", "/etc/shadow"),
        ("rootfs_sha256", "abc"),
        ("size_bytes", -1),
        ("size_bytes", True),
        ("imported_at", "yesterday"),
        ("init", "systemd"),
        ("managed", "yes"),
        ("filesystem", "btrfs"),
        ("rootfs_mtime_ns", -1),
        ("work_seed", "/srv/seed.ext4"),
        ("kernel_ref", "../generic"),
        ("own_kernel", 1),
        ("registered", {}),
        ("part", REGISTERED | {"part": "rootfs"}),
        ("path", REGISTERED | {"path": "seed.ext4"}),
        ("sha256", REGISTERED | {"sha256": "1"}),
        ("mtime_ns", REGISTERED | {"mtime_ns": -1}),
        ("config", []),
        ("config", {"cmd": "not a list"}),
        ("config", {"env": [1]}),
    ],
)
def test_a_wrong_field_is_named(key: str, value: object) -> None:
    wrong = {"registered": [value]} if isinstance(value, dict) and "part" in value else {key: value}
    fields = json.loads(MANIFEST.to_json()) | wrong
    with pytest.raises(BangerError) as caught:
        parse_manifest(json.dumps(fields))
    assert caught.value.code == Code.CORRUPT
    assert key in caught.value.message


@pytest.mark.parametrize("text", ["", "[]", "null", '{"name": "x"', "[" * 100_000])
def test_what_is_no_manifest(text: str) -> None:
    with pytest.raises(BangerError) as caught:
        parse_manifest(text)
    assert caught.value.code == Code.CORRUPT


def test_an_unmanaged_image_names_its_file(tmp_path: Path) -> None:
    fields = json.loads(MANIFEST.to_json()) | {"managed": False, "rootfs": "/srv/root.ext4", "filesystem": "ext4"}
    manifest = parse_manifest(json.dumps(fields))
    assert image_paths(tmp_path, manifest).rootfs == Path("/srv/root.ext4")
    assert manifest.filesystem == "ext4"
    for wrong in ("root.ext4", "/srv/\0"):
        with pytest.raises(BangerError, match="'rootfs'"):
            parse_manifest(json.dumps(fields | {"rootfs": wrong}))
        with pytest.raises(BangerError, match="'work_seed'"):
            parse_manifest(json.dumps(fields | {"work_seed": wrong}))
    assert image_paths(tmp_path, MANIFEST).rootfs == tmp_path / "tiny/rootfs.squashfs"


@given(st.binary(max_size=500))
def test_os_release_may_hold_anything(text: bytes) -> None:
    assert all(value.isprintable() for value in parse_os_release(text).values())


def test_os_release() -> None:
    text = b"# comment\nID=debian\nPRETTY_NAME=\"Debian 'x'\"\nBROKEN='\nEMPTY=\n"
    assert parse_os_release(text) == {"ID": "debian", "PRETTY_NAME": "Debian 'x'", "EMPTY": ""}


def test_manifests_without_a_filesystem_go_by_the_name_of_the_file() -> None:
    fields = json.loads(MANIFEST.to_json())
    del fields["filesystem"]
    assert parse_manifest(json.dumps(fields)).filesystem == "squashfs"
    assert parse_manifest(json.dumps(fields | {"rootfs": "rootfs.ext4"})).filesystem == "ext4"


def register(images: Path, rootfs: Path, work_seed: str = "") -> ImageManifest:
    """An unmanaged image of that file."""
    status = rootfs.stat()
    manifest = dataclasses.replace(
        MANIFEST,
        name="mine",
        managed=False,
        rootfs=str(rootfs),
        size_bytes=status.st_size,
        rootfs_mtime_ns=status.st_mtime_ns,
        work_seed=work_seed,
    )
    (images / "mine").mkdir(parents=True)
    write_local(images / "mine", manifest)
    return manifest


def test_an_unmanaged_file_that_changed_or_vanished_is_noticed(tmp_path: Path) -> None:
    images, rootfs, seed = tmp_path / "images", tmp_path / "root.ext4", tmp_path / "seed.ext4"
    rootfs.write_bytes(b"content")
    seed.touch()
    manifest = register(images, rootfs, work_seed=str(seed))
    assert read_local(images, "mine") == manifest
    assert image_paths(images, manifest).work_seed == seed
    times = rootfs.stat()

    def problem() -> str:
        (broken,) = list_local(images)[1]
        with pytest.raises(BangerError) as caught:
            read_local(images, "mine")
        assert caught.value.message == f"the image 'mine' is broken: {broken.reason}"
        assert caught.value.hint == "register it again with --force, or remove it with 'banger image rm mine'"
        return broken.reason

    os.utime(rootfs, ns=(times.st_atime_ns, times.st_mtime_ns + 1))
    assert problem() == f"{rootfs} has changed since it was registered"
    rootfs.write_bytes(b"contents")
    os.utime(rootfs, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert problem() == f"{rootfs} has changed since it was registered"
    rootfs.unlink()
    assert problem() == f"{rootfs} is gone"
    rootfs.symlink_to("root.ext4")
    assert problem() == f"{rootfs} cannot be read: Too many levels of symbolic links"
    rootfs.unlink()
    rootfs.write_bytes(b"content")
    os.utime(rootfs, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert list_local(images) == ([manifest], [])
    seed.unlink()
    assert problem() == f"{seed} is gone"
    delete_local(images, "mine")
    assert rootfs.read_bytes() == b"content"


def install_kernel(kernels_dir: Path, name: str, arch: str = "amd64", content: bytes = b"kernel") -> KernelManifest:
    entry = kernels_dir / name
    entry.mkdir(parents=True)
    for file in ("vmlinux", "vmlinuz", "modules.squashfs", "boot-modules.cpio", "config", "extra"):
        (entry / file).write_bytes(content + file.encode())
    (entry / "boot-0123456789ab.cpio").touch()
    manifest = KernelManifest(
        name=name,
        distro="debian",
        arch=arch,
        kernel_version="6.1",
        sha256="0" * 64,
        source="import:/x",
        imported_at="2026-01-31T12:00:00Z",
        modules=True,
        boot_modules=("kernel/a.ko",),
        files={"extra": "0" * 64},
    )
    kernels.write_local(entry, manifest)
    return manifest


def test_an_image_keeps_the_files_of_its_kernel(tmp_path: Path) -> None:
    images, local, rootfs = tmp_path / "images", tmp_path / "kernels", tmp_path / "root"
    rootfs.touch()
    image = register(images, rootfs)
    assert kernel_of(images, local, image) is None
    kernel = install_kernel(local, "generic")
    assert kernel_of(images, local, image) == (kernel, local / "generic")

    held = images / "mine/kernel"
    (local / "outside").write_bytes(b"kernelconfig")
    (local / "generic/config").unlink()
    (local / "generic/config").symlink_to("../outside")
    assert kernels.hold(local, "generic", held) == kernel
    assert {file.name for file in held.iterdir()} == {
        "manifest.json", "vmlinux", "vmlinuz", "modules.squashfs", "boot-modules.cpio", "config", "extra",
    }  # fmt: skip
    assert (held / "vmlinux").samefile(local / "generic/vmlinux")
    assert not (held / "config").is_symlink()

    # the installed one comes first as long as it can be used
    assert kernel_of(images, local, image) == (kernel, local / "generic")
    (local / "generic/vmlinux").unlink()
    assert kernel_of(images, local, image) == (kernel, held)
    kernels.delete_local(local, "generic")
    (local / "outside").unlink()
    assert kernel_of(images, local, image) == (kernel, held)
    assert (held / "vmlinux").read_bytes() == b"kernelvmlinux"
    assert (held / "config").read_bytes() == b"kernelconfig"
    other = install_kernel(local, "generic", content=b"new")
    assert kernel_of(images, local, image) == (other, local / "generic")
    kernels.delete_local(local, "generic")
    install_kernel(local, "generic", arch="arm64")
    assert kernel_of(images, local, image) == (kernel, held)
    (held / "vmlinux").unlink()
    assert kernel_of(images, local, image) is None


def test_nothing_is_kept_of_a_kernel_that_cannot_be_used(tmp_path: Path) -> None:
    install_kernel(tmp_path / "kernels", "generic")
    (tmp_path / "kernels/generic/vmlinux").unlink()
    for name, code in (("generic", Code.CORRUPT), ("other", Code.NOT_FOUND), ("../kernels/generic", Code.INVALID)):
        with pytest.raises(BangerError) as caught:
            kernels.hold(tmp_path / "kernels", name, tmp_path / "held")
        assert caught.value.code is code
    assert not (tmp_path / "held").exists()


def test_who_refers_to_a_kernel(tmp_path: Path) -> None:
    for name, kernel_ref in (("a", "generic"), ("b", "other"), ("c", "generic"), ("d", "")):
        (tmp_path / name).mkdir()
        write_local(tmp_path / name, dataclasses.replace(MANIFEST, name=name, kernel_ref=kernel_ref))
    (tmp_path / "broken").mkdir()
    # none of them has its root filesystem
    assert images_with_kernel(tmp_path, "generic") == ["a", "c"]
    assert images_with_kernel(tmp_path, "new") == []
    assert images_with_kernel(tmp_path / "missing", "generic") == []
