"""Images with kernels of their own, promoted, tagged, verified, pruned and removed; what registered files become."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from banger import system
from banger.api import models as m
from banger.api import operations as op
from banger.api.errors import BangerError, Code
from banger.imagecat import manifest as images
from banger.imagecat.copies import promote_image, tag_image
from banger.imagecat.importer import import_image
from banger.imagecat.manifest import KERNEL, OWN_KERNEL, read_local
from banger.imagecat.register import KernelFiles, register_image
from banger.job import Job, Progress
from tests.daemons import DaemonProcess, running_daemon
from tests.process.test_image_register import MIB, banger, boots, create, ext4, install_kernel, root_directory, squashfs
from tests.unit.kernelcat import builders


@pytest.fixture
def stage(tmp_path: Path) -> Path:
    """A rootfs, a seed, and a kernel with initrd and modules, as files of the user's own."""
    stage = tmp_path / "stage"
    builders.kernel_directory(stage)
    (stage / "initrd").write_bytes(b"initrd")
    squashfs(stage / "rootfs.squashfs", root_directory(tmp_path / "root"))
    (tmp_path / "home").mkdir()
    (tmp_path / "home/notes").write_text("mine\n")
    ext4(stage / "seed.ext4", tmp_path / "home")
    return stage


def kernel_files(stage: Path) -> KernelFiles:
    return KernelFiles(
        stage / f"boot/vmlinux-{builders.VERSION}", stage / "initrd", stage / "lib/modules" / builders.VERSION
    )


def request(stage: Path, name: str = "tiny", force: bool = False) -> m.ImageRegister:
    files = kernel_files(stage)
    return m.ImageRegister(
        name,
        str(stage / "rootfs.squashfs"),
        work_seed=str(stage / "seed.ext4"),
        kernel=str(files.kernel),
        initrd=str(files.initrd),
        modules=str(files.modules),
        force=force,
    )


def registered(images_dir: Path, stage: Path) -> images.ImageManifest:
    return register_image(
        images_dir,
        "tiny",
        stage / "rootfs.squashfs",
        kernel_files(stage),
        Job(),
        work_seed=stage / "seed.ext4",
    )


def content(directory: Path) -> dict[str, str]:
    """Path to digest of every file below a directory."""
    return {
        path.relative_to(directory).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in directory.rglob("*")
        if path.is_file()
    }


# Promotion and tags, as functions ------------------------------------------------------------------------------------


def test_registered_with_a_kernel_of_its_own(tmp_path: Path, stage: Path) -> None:
    before = content(stage)
    manifest = registered(tmp_path / "images", stage)
    assert manifest == read_local(tmp_path / "images", "tiny")
    assert (manifest.kernel_ref, manifest.own_kernel, manifest.managed) == ("", True, False)
    assert [part.part for part in manifest.registered] == ["work-seed", "kernel", "initrd", "modules"]
    found = images.kernel_of(tmp_path / "images", tmp_path / "kernels", manifest)
    assert found is not None
    kernel, directory = found
    assert directory == tmp_path / "images/tiny" / KERNEL
    assert (kernel.name, kernel.kernel_version, kernel.modules) == (OWN_KERNEL, builders.VERSION, True)
    assert kernel.boot_modules
    assert (directory / "vmlinux").read_bytes() == builders.elf()
    assert (directory / "initrd.img").read_bytes() == b"initrd"
    assert images.verify_local(tmp_path / "images", "tiny", Job()) == ""
    assert content(stage) == before
    assert [path.name for path in (tmp_path / "images").iterdir()] == ["tiny"]


def test_promoted(tmp_path: Path, stage: Path) -> None:
    images_dir = tmp_path / "images"
    first = registered(images_dir, stage)
    seen: list[Progress] = []
    manifest = promote_image(images_dir, "tiny", Job(seen.append))
    assert manifest == read_local(images_dir, "tiny")
    assert (manifest.managed, manifest.rootfs, manifest.registered) == (True, "rootfs.squashfs", ())
    assert (manifest.rootfs_sha256, manifest.source) == (first.rootfs_sha256, first.source)
    copied = content(images_dir / "tiny")
    assert copied["rootfs.squashfs"] == first.rootfs_sha256
    assert copied["work-seed.ext4"] == hashlib.sha256((stage / "seed.ext4").read_bytes()).hexdigest()
    seed = images.image_paths(images_dir, manifest).work_seed
    assert seed == images_dir / "tiny/work-seed.ext4"
    assert system.allocated_bytes(seed) <= system.allocated_bytes(stage / "seed.ext4") + MIB
    last = [progress for progress in seen if progress.stage == "copy"][-1]
    assert (last.unit, last.done) == ("bytes", last.total)
    # nothing of the originals is needed any more
    system.remove_tree(stage)
    assert images.verify_local(images_dir, "tiny", Job()) == ""
    assert images.kernel_of(images_dir, tmp_path / "kernels", manifest) is not None
    with pytest.raises(BangerError, match="'tiny' is managed already") as caught:
        promote_image(images_dir, "tiny", Job())
    assert caught.value.code is Code.WRONG_STATE
    assert [path.name for path in images_dir.iterdir()] == ["tiny"]


@pytest.mark.parametrize("file", ["rootfs.squashfs", "seed.ext4"])
def test_promotion_refuses_what_has_changed(tmp_path: Path, stage: Path, file: str) -> None:
    """The same size and time with other content, which only the digest shows."""
    images_dir = tmp_path / "images"
    first = registered(images_dir, stage)
    status = (stage / file).stat()
    with open(stage / file, "r+b") as stream:
        stream.seek(-1, os.SEEK_END)
        stream.write(b"\1")
    os.utime(stage / file, ns=(status.st_atime_ns, status.st_mtime_ns))
    with pytest.raises(BangerError, match=f"{file} has changed: its SHA-256 is") as caught:
        promote_image(images_dir, "tiny", Job())
    assert "register it again with --force" in caught.value.hint
    assert read_local(images_dir, "tiny") == first
    assert f"{file} has changed: its SHA-256" in images.verify_local(images_dir, "tiny", Job())
    assert [path.name for path in images_dir.iterdir()] == ["tiny"]


@pytest.mark.parametrize("change", ["removed", "registered again", "promoted"])
def test_promotion_of_an_image_that_is_replaced_meanwhile(tmp_path: Path, stage: Path, change: str) -> None:
    images_dir = tmp_path / "images"
    registered(images_dir, stage)
    changed = False

    def interfere(progress: Progress) -> None:
        nonlocal changed
        if progress.stage != "publish" or changed:
            return
        changed = True
        if change == "removed":
            images.delete_local(images_dir, "tiny")
        elif change == "promoted":
            promote_image(images_dir, "tiny", Job())
        else:
            os.utime(stage / "rootfs.squashfs")
            kernel = install_kernel(tmp_path / "kernels")
            register_image(images_dir, "tiny", stage / "rootfs.squashfs", kernel, Job(), replace=True)

    with pytest.raises(BangerError, match="was replaced or removed meanwhile"):
        promote_image(images_dir, "tiny", Job(interfere))
    assert [path.name for path in images_dir.iterdir()] == ([] if change == "removed" else ["tiny"])


def test_a_tag_shares_files_and_outlives_its_source(tmp_path: Path, stage: Path) -> None:
    images_dir = tmp_path / "images"
    registered(images_dir, stage)
    promote_image(images_dir, "tiny", Job())
    (images_dir / "tiny/config.json").write_text("{}")
    before = content(images_dir / "tiny")
    tagged = tag_image(images_dir, "tiny", "other", Job())
    assert tagged == dataclasses.replace(read_local(images_dir, "tiny"), name="other")
    for file in before:
        if file != "manifest.json":
            assert (images_dir / "tiny" / file).samefile(images_dir / "other" / file), file
    assert images.own_bytes(images_dir / "tiny") < 64 << 10
    images.delete_local(images_dir, "tiny")
    assert images.verify_local(images_dir, "other", Job()) == ""
    assert {file: digest for file, digest in content(images_dir / "other").items() if file != "manifest.json"} == {
        file: digest for file, digest in before.items() if file != "manifest.json"
    }
    assert images.own_bytes(images_dir / "other") > 64 << 10


def test_tags_of_registered_images_and_names_that_are_taken(tmp_path: Path, stage: Path) -> None:
    images_dir = tmp_path / "images"
    first = registered(images_dir, stage)
    assert tag_image(images_dir, "tiny", "other", Job()).rootfs == first.rootfs
    with pytest.raises(BangerError, match="there already is an image 'other'") as caught:
        tag_image(images_dir, "tiny", "other", Job())
    assert caught.value.code is Code.EXISTS
    tag_image(images_dir, "tiny", "other", Job(), replace=True)
    for source, target, message in (
        ("tiny", "tiny", "has this name already"),
        ("tinu", "new", "there is no image 'tinu'"),
        ("tiny", "../new", "is not a valid image name"),
    ):
        with pytest.raises(BangerError, match=message):
            tag_image(images_dir, source, target, Job())
    assert sorted(path.name for path in images_dir.iterdir()) == ["other", "tiny"]


def test_a_file_that_changes_is_noticed(tmp_path: Path, stage: Path) -> None:
    images_dir = tmp_path / "images"
    first = registered(images_dir, stage)
    modules = stage / "lib/modules" / builders.VERSION
    paths = [Path(part.path) for part in first.registered if part.part != "modules"]
    for path in [*paths, modules / "kernel/new.ko"]:
        before = path.read_bytes() if path.exists() else None
        status = path.stat() if path.exists() else None
        path.write_bytes(b"changed")
        ((broken,)) = images.list_local(images_dir)[1]
        assert broken.reason.endswith("has changed since it was registered")
        with pytest.raises(BangerError) as caught:
            read_local(images_dir, "tiny")
        assert "register it again with --force" in caught.value.hint
        if before is None or status is None:
            parent = path.parent.stat().st_mtime_ns
            path.unlink()
            os.utime(path.parent, ns=(parent, parent))
            continue
        path.unlink()
        assert images.list_local(images_dir)[1][0].reason == f"{path} is gone"
        path.write_bytes(before)
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
        assert images.list_local(images_dir)[1] == []


@pytest.mark.parametrize(
    ("part", "message"),
    [
        ("kernel", "kernel"),
        ("modules", "is not a directory"),
        ("initrd", "is not a regular file"),
        ("missing", "does not exist"),
    ],
)
def test_bad_kernels(tmp_path: Path, stage: Path, part: str, message: str) -> None:
    files = kernel_files(stage)
    bad = {
        "kernel": KernelFiles(stage / "initrd"),
        "modules": dataclasses.replace(files, modules=stage / "initrd"),
        "initrd": dataclasses.replace(files, initrd=stage),
        "missing": dataclasses.replace(files, initrd=stage / "absent"),
    }[part]
    with pytest.raises(BangerError, match=message):
        register_image(tmp_path / "images", "tiny", stage / "rootfs.squashfs", bad, Job())
    assert not (tmp_path / "images").exists() or list((tmp_path / "images").iterdir()) == []


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A filesystem of 16 MB."""
    if os.geteuid() != 0:
        pytest.skip("mounting a small filesystem needs root")
    mount = tmp_path / "small"
    mount.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", mount], check=True)
    yield mount
    subprocess.run(["umount", mount], check=True)


def test_promotion_on_a_full_disk(tmp_path: Path, stage: Path, small_disk: Path) -> None:
    (tmp_path / "root/noise").write_bytes(os.urandom(20 << 20))
    squashfs(stage / "rootfs.squashfs", tmp_path / "root")
    kernel = install_kernel(tmp_path / "kernels")
    first = register_image(small_disk, "tiny", stage / "rootfs.squashfs", kernel, Job())
    with pytest.raises(BangerError, match="the image 'tiny' cannot be written: No space left on device") as caught:
        promote_image(small_disk, "tiny", Job())
    assert (caught.value.code, caught.value.hint) == (
        Code.EXHAUSTED, "remove images or VMs that you no longer need"
    )  # fmt: skip
    assert read_local(small_disk, "tiny") == first
    assert [path.name for path in small_disk.iterdir()] == ["tiny"]


def test_promotion_copies_all_where_the_system_writes_less_at_once(
    tmp_path: Path, stage: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = registered(tmp_path / "images", stage)
    pwrite = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda file, data, offset: pwrite(file, data[:5000], offset))
    promote_image(tmp_path / "images", "tiny", Job())
    assert content(tmp_path / "images/tiny")["rootfs.squashfs"] == first.rootfs_sha256
    assert images.verify_local(tmp_path / "images", "tiny", Job()) == ""


# With a daemon -------------------------------------------------------------------------------------------------------


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[DaemonProcess]:
    with running_daemon(tmp_path / "daemon") as daemon:
        yield daemon


def test_by_command(daemon: DaemonProcess, stage: Path, tmp_path: Path) -> None:
    files = kernel_files(stage)
    assert banger(
        daemon,
        *("image", "register", "tiny", "--rootfs", "rootfs.squashfs", "--work-seed", "seed.ext4"),
        *("--kernel", str(files.kernel), "--initrd", "initrd", "--modules", str(files.modules)),
        cwd=stage,
    ).startswith("registered tiny: Tiny 1 ")
    listed = banger(daemon, "image", "list").splitlines()
    assert listed[0].split() == ["NAME", "ARCH", "DISTRO", "SIZE", "IMPORTED", "KERNEL", "MANAGED"]
    assert listed[1].endswith("its own   no")
    assert all(len(line) <= 100 for line in listed)
    vm = daemon.client.call(op.VM_CREATE, m.VmCreate(image="tiny", name="one", home_bytes=1 << 30))
    assert vm.kernel == OWN_KERNEL
    assert (Path(vm.directory) / "kernel").read_bytes() == builders.elf()
    shown = banger(daemon, "image", "show", "tiny")
    assert "used by:   one" in shown
    assert "managed:   no" in shown

    assert banger(daemon, "image", "promote", "tiny").startswith("promoted tiny, ")
    assert "'tiny' is managed already" in banger(daemon, "image", "promote", "tiny", status=1)
    assert banger(daemon, "image", "tag", "tiny", "other").startswith("tagged other: Tiny 1")
    system.remove_tree(stage)
    vm = daemon.client.call(op.VM_CREATE, m.VmCreate(image="other", name="two", home_bytes=1 << 30))
    assert (Path(vm.directory) / "kernel").read_bytes() == builders.elf()
    notes = subprocess.run(["debugfs", "-R", "cat /notes", Path(vm.directory) / "work.ext4"], capture_output=True)
    assert notes.stdout == b"mine\n"

    assert banger(daemon, "image", "verify") == "other: ok\ntiny: ok\n"
    history = json.loads(banger(daemon, "image", "history", "tiny", "--json"))["steps"]
    assert [step["created_by"] for step in history] == [str(stage / "rootfs.squashfs")]
    assert str(stage / "rootfs.squashfs") in banger(daemon, "image", "history", "--no-trunc", "tiny")

    refusal = banger(daemon, "image", "rm", "tiny", status=1)
    assert "is used by one" in refusal
    assert "banger image rm --force tiny" in refusal
    assert json.loads(banger(daemon, "image", "rm", "--force", "--json", "tiny")) == [{"name": "tiny"}]
    banger(daemon, "vm", "rm", "one", "two")
    (daemon.layout.images / "other/rootfs.squashfs").write_bytes(b"")
    assert "image rm other" in banger(daemon, "image", "show", "other", status=1)
    assert "broken" in banger(daemon, "image", "list")
    assert found_wrong(daemon) == ["other: rootfs.squashfs does not have the size that manifest.json says"]
    banger(daemon, "image", "rm", "other")
    assert list(daemon.layout.images.iterdir()) == []


def found_wrong(daemon: DaemonProcess) -> list[str]:
    """What `image verify` prints when it finds something wrong."""
    command = [sys.executable, "-m", "banger.cli", "image", "verify"]
    ended = subprocess.run(command, env=daemon.environment, capture_output=True, text=True)
    assert (ended.returncode, ended.stderr) == (1, "")
    return ended.stdout.splitlines()


def test_a_damaged_image_is_found(daemon: DaemonProcess, tmp_path: Path) -> None:
    install_kernel(daemon.layout.kernels)
    root_directory(tmp_path / "root")
    for name in ("first", "second"):
        daemon.client.call(op.IMAGE_IMPORT, m.ImageImport(name, str(tmp_path / "root"), kernel_ref="mine"))
    with open(daemon.layout.images / "first/rootfs.squashfs", "r+b") as stream:
        stream.seek(-1, os.SEEK_END)
        stream.write(b"\1")
    problems = found_wrong(daemon)
    assert problems[0].startswith("first: rootfs.squashfs has changed: its SHA-256 is ")
    assert problems[1:] == ["second: ok"]
    daemon.client.call(op.IMAGE_DELETE, m.ImageDelete("first"))
    kernel = daemon.layout.images / "second/kernel/vmlinux"
    kernel.unlink()
    kernel.write_bytes(b"damaged")
    (problem,) = found_wrong(daemon)
    assert problem.startswith("second: kernel/vmlinux has changed: its SHA-256 is ")
    with pytest.raises(BangerError, match="there is no image 'third'"):
        daemon.client.call(op.IMAGE_VERIFY, m.ImageVerify(["third"]))


def test_prune(daemon: DaemonProcess, tmp_path: Path, stage: Path) -> None:
    install_kernel(daemon.layout.kernels)
    for name in ("whole", "used", "broken"):
        daemon.client.call(op.IMAGE_IMPORT, m.ImageImport(name, str(tmp_path / "root"), kernel_ref="mine"))
    daemon.client.call(op.IMAGE_REGISTER, request(stage, "gone"))
    create(daemon, "one", "used")
    for file in ("broken", "used"):
        (daemon.layout.images / file / "manifest.json").write_text("{}")
    (stage / "seed.ext4").unlink()
    assert "add --force" in banger(daemon, "image", "prune", status=2)
    preview = daemon.client.call(op.IMAGE_PRUNE, m.ImagePrune(dry_run=True))
    assert preview.names == ["broken", "gone"]
    assert preview.freed_bytes > 0
    assert banger(daemon, "image", "prune", "--force").startswith("removed broken, gone, freed ")
    assert banger(daemon, "image", "prune", "--force") == "there is no broken image\n"
    assert (stage / "rootfs.squashfs").exists()
    removed = json.loads(banger(daemon, "image", "prune", "--all", "--force", "--json"))
    assert removed["names"] == ["whole"]
    assert [path.name for path in daemon.layout.images.iterdir()] == ["used"]


def test_registration_says_which_kernel_before_a_daemon_starts(tmp_path: Path, stage: Path) -> None:
    daemon = DaemonProcess(tmp_path / "daemon", {})
    register = ("image", "register", "new", "--rootfs", str(stage / "rootfs.squashfs"))
    kernel = ("--kernel", str(stage / "initrd"))
    for options, message in (
        ((), "the image needs a kernel"),
        (("--initrd", str(stage / "initrd")), "--initrd and --modules belong to --kernel"),
        (("--kernel-ref", "mine", *kernel), "--kernel-ref excludes --kernel, --initrd and --modules"),
        (("--kernel-ref", "mine", "--modules", str(stage)), "--kernel-ref excludes --kernel, --initrd and --modules"),
    ):
        assert message in banger(daemon, *register, *options, status=2)
    assert not daemon.layout.socket.exists()
    assert not daemon.layout.state.exists()


def test_the_api_refuses_two_kernels_and_none(daemon: DaemonProcess, stage: Path) -> None:
    whole = request(stage)
    for bad, message in (
        (dataclasses.replace(whole, kernel_ref="mine"), "kernel_ref excludes kernel, initrd and modules"),
        (dataclasses.replace(whole, kernel_ref="mine", kernel="", initrd=""), "kernel_ref excludes"),
        (dataclasses.replace(whole, kernel=""), "needs a kernel"),
        (dataclasses.replace(whole, kernel="", initrd="", modules=""), "needs a kernel"),
        (dataclasses.replace(whole, modules="lib"), "is not an absolute path"),
    ):
        with pytest.raises(BangerError, match=message) as caught:
            daemon.client.call(op.IMAGE_REGISTER, bad)
        assert caught.value.code is Code.INVALID
    assert list(daemon.layout.images.iterdir()) == []


def test_an_image_that_names_a_kernel_keeps_its_copy_when_promoted_and_tagged(
    daemon: DaemonProcess, stage: Path
) -> None:
    install_kernel(daemon.layout.kernels)
    daemon.client.call(op.IMAGE_REGISTER, m.ImageRegister("tiny", str(stage / "rootfs.squashfs"), "mine"))
    daemon.client.call(op.IMAGE_PROMOTE, m.NameRequest("tiny"))
    daemon.client.call(op.IMAGE_TAG, m.ImageTag("tiny", "other"))
    daemon.client.call(op.KERNEL_DELETE, m.KernelDelete("mine", force=True))
    for name in ("tiny", "other"):
        assert boots(create(daemon, f"vm-{name}", name)) == ["old", "old"]


def test_an_import_has_no_trace_of_a_kernel_of_its_own(tmp_path: Path, stage: Path) -> None:
    registered(tmp_path / "images", stage)
    manifest = import_image(tmp_path / "images", "tiny", tmp_path / "root", Job(), replace=True)
    assert not manifest.own_kernel
    assert images.kernel_of(tmp_path / "images", tmp_path / "kernels", manifest) is None
