"""Root filesystems are registered where they are, and images outlive the kernels that they were made with."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import re
import shutil
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from banger import hostpackages, system
from banger.api import models as m
from banger.api import operations as op
from banger.api.errors import BangerError, Code
from banger.guest.binary import agent_binary
from banger.imagecat.importer import import_image
from banger.imagecat.manifest import image_paths, list_local, read_local
from banger.imagecat.register import register_image
from banger.job import Job, Progress
from banger.kernelcat import manifest as kernels
from banger.kernelcat.manifest import KernelManifest
from banger.vmm.detect import host_arch
from tests.daemons import DaemonProcess, running_daemon

MIB = 1 << 20
OS_RELEASE = 'ID=tiny\nPRETTY_NAME="Tiny 1"\n'
OTHER_ARCH = {"amd64": ("arm64", 183), "arm64": ("amd64", 62)}[host_arch()]


def root_directory(path: Path, program: bytes | None = None) -> Path:
    """A root filesystem as distributions have it: /bin and /etc/os-release are symbolic links."""
    (path / "usr/bin").mkdir(parents=True)
    (path / "usr/lib").mkdir()
    (path / "etc").mkdir()
    (path / "usr/lib/os-release").write_text(OS_RELEASE)
    (path / "etc/os-release").symlink_to("../usr/lib/os-release")
    (path / "bin").symlink_to("usr/bin")
    (path / "usr/bin/a script").write_text("#!/bin/sh\n")
    (path / "usr/bin/tool").write_bytes(program or agent_binary(host_arch()).read_bytes())
    (path / "usr/bin/a script").chmod(0o755)
    (path / "usr/bin/tool").chmod(0o755)
    return path


def ext4(path: Path, directory: Path, size: int = 64 * MIB) -> Path:
    path.touch()
    os.truncate(path, size)
    subprocess.run(["mke2fs", "-q", "-F", "-t", "ext4", "-d", directory, path], check=True, capture_output=True)
    return path


def squashfs(path: Path, directory: Path) -> Path:
    tar = subprocess.run(["tar", "-cC", directory, "."], check=True, capture_output=True).stdout
    subprocess.run(["tar2sqfs", "--quiet", "--force", path], input=tar, check=True, capture_output=True)
    return path


MAKERS = {"ext4": ext4, "squashfs": squashfs}


def install_kernel(kernels_dir: Path, content: str = "old", arch: str = host_arch()) -> Path:
    """A kernel `mine` that boots nothing but has all that an entry has."""
    entry = kernels_dir / "mine"
    if entry.exists():
        kernels.delete_local(kernels_dir, "mine")
    entry.mkdir(parents=True)
    for file in ("vmlinux", "modules.squashfs", "boot-modules.cpio"):
        (entry / file).write_text(f"{content} {file}")
    kernels.write_local(
        entry,
        KernelManifest(
            name="mine",
            distro="debian",
            arch=arch,
            kernel_version="6.1",
            sha256=hashlib.sha256((entry / "vmlinux").read_bytes()).hexdigest(),
            source="import:/x",
            imported_at="2026-01-31T12:00:00Z",
            modules=True,
            boot_modules=("kernel/a.ko",),
        ),
    )
    return entry


@pytest.fixture
def images(tmp_path: Path) -> Path:
    return tmp_path / "images"


@pytest.fixture
def kernel(tmp_path: Path) -> Path:
    return install_kernel(tmp_path / "kernels")


@pytest.mark.parametrize("filesystem", MAKERS)
def test_a_filesystem_is_registered_where_it_is(tmp_path: Path, images: Path, kernel: Path, filesystem: str) -> None:
    rootfs = MAKERS[filesystem](tmp_path / "rootfs.img", root_directory(tmp_path / "root"))
    seen: list[Progress] = []
    manifest = register_image(images, "tiny", rootfs, kernel, Job(seen.append))
    assert manifest == read_local(images, "tiny")
    assert (manifest.name, manifest.arch, manifest.kernel_ref) == ("tiny", host_arch(), "mine")
    assert (manifest.distro, manifest.pretty_name) == ("tiny", "Tiny 1")
    assert (manifest.managed, manifest.filesystem, manifest.init) == (False, filesystem, "agent")
    assert (manifest.rootfs, manifest.source, manifest.work_seed) == (str(rootfs), str(rootfs), "")
    assert manifest.rootfs_sha256 == hashlib.sha256(rootfs.read_bytes()).hexdigest()
    assert (manifest.size_bytes, manifest.rootfs_mtime_ns) == (rootfs.stat().st_size, rootfs.stat().st_mtime_ns)
    assert image_paths(images, manifest).rootfs == rootfs
    assert rootfs.stat().st_nlink == 1
    assert {str(path.relative_to(images)) for path in images.rglob("*")} == {
        "tiny", "tiny/manifest.json", "tiny/kernel", "tiny/kernel/manifest.json", "tiny/kernel/vmlinux",
        "tiny/kernel/modules.squashfs", "tiny/kernel/boot-modules.cpio",
    }  # fmt: skip
    assert {"digest", "publish"} <= {progress.stage for progress in seen}


@pytest.mark.parametrize("filesystem", MAKERS)
def test_what_a_tree_does_not_tell_is_the_kernels(
    tmp_path: Path, images: Path, filesystem: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "empty").mkdir()
    rootfs = MAKERS[filesystem](tmp_path / "rootfs.img", tmp_path / "empty")
    kernel = install_kernel(tmp_path / "kernels", arch=OTHER_ARCH[0])
    manifest = register_image(images, "empty", rootfs, kernel, Job())
    assert (manifest.arch, manifest.distro, manifest.pretty_name) == (OTHER_ARCH[0], "", "")
    # without the tools that look into it any tree is like that
    rootfs = MAKERS[filesystem](tmp_path / "full.img", root_directory(tmp_path / "root"))
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(hostpackages, "_ADMIN_DIRECTORIES", str(tmp_path))
    assert register_image(images, "full", rootfs, kernel, Job()).arch == OTHER_ARCH[0]


@pytest.mark.parametrize("filesystem", MAKERS)
def test_programs_for_another_machine(tmp_path: Path, images: Path, kernel: Path, filesystem: str) -> None:
    def program(machine: int) -> bytes:
        return b"\x7fELF\2\1\1".ljust(16, b"\0") + struct.pack("<HH", 2, machine) + bytes(44)

    rootfs = MAKERS[filesystem](tmp_path / "other", root_directory(tmp_path / "root", program(OTHER_ARCH[1])))
    with pytest.raises(BangerError) as caught:
        register_image(images, "other", rootfs, kernel, Job())
    expected = f"the image 'other' is for {OTHER_ARCH[0]}, the kernel 'mine' for {host_arch()}"
    assert (caught.value.code, caught.value.message) == (Code.INVALID, expected)
    rootfs = MAKERS[filesystem](tmp_path / "strange", root_directory(tmp_path / "root2", program(243)))
    with pytest.raises(BangerError, match="are for machine-243, which banger cannot run"):
        register_image(images, "strange", rootfs, kernel, Job())
    assert list(images.iterdir()) == []


def test_what_cannot_be_registered(tmp_path: Path, images: Path, kernel: Path) -> None:
    rootfs = ext4(tmp_path / "rootfs", root_directory(tmp_path / "root"))
    register_image(images, "there", rootfs, kernel, Job())
    own = images / "there/own.ext4"
    shutil.copy(rootfs, own)
    seed = squashfs(tmp_path / "seed", tmp_path / "root")
    before = {path: path.read_bytes() for path in images.rglob("*") if path.is_file()}
    cases: list[tuple[str, Path, Path | None, Code, str]] = [
        ("there", rootfs, None, Code.EXISTS, "there already is an image 'there'"),
        ("../up", rootfs, None, Code.INVALID, "'../up' is not a valid image name"),
        ("new", tmp_path / "missing", None, Code.NOT_FOUND, "there is no file or directory"),
        ("new", tmp_path / "root", None, Code.INVALID, f"{tmp_path / 'root'} is not a regular file"),
        ("new", kernel / "vmlinux", None, Code.INVALID, "neither an ext4 nor a squashfs filesystem"),
        ("new", own, None, Code.INVALID, f"{own} belongs to banger"),
        ("new", rootfs, seed, Code.INVALID, f"the work-seed {seed} is a squashfs, not an ext4 filesystem"),
        ("new", rootfs, own, Code.INVALID, f"{own} belongs to banger"),
        ("new", rootfs, tmp_path / "gone", Code.NOT_FOUND, f"there is no file or directory '{tmp_path / 'gone'}'"),
    ]
    for name, file, work_seed, code, message in cases:
        with pytest.raises(BangerError, match=re.escape(message)) as caught:
            register_image(images, name, file, kernel, Job(), work_seed=work_seed)
        assert caught.value.code is code
    for missing in (kernel.parent / "other", kernel.parent / "../kernels"):
        with pytest.raises(BangerError, match="kernel"):
            register_image(images, "new", rootfs, missing, Job())
    assert {path: path.read_bytes() for path in images.rglob("*") if path.is_file()} == before


def test_a_file_that_is_written_while_it_is_read(tmp_path: Path, images: Path, kernel: Path) -> None:
    rootfs = ext4(tmp_path / "rootfs", root_directory(tmp_path / "root"))

    def write(progress: Progress) -> None:
        if progress.stage == "digest":
            os.utime(rootfs)

    with pytest.raises(BangerError, match="was written while it was read"):
        register_image(images, "tiny", rootfs, kernel, Job(write))
    assert not images.exists()


def test_registered_again(tmp_path: Path, images: Path, kernel: Path) -> None:
    rootfs = ext4(tmp_path / "rootfs", root_directory(tmp_path / "root"))
    first = register_image(images, "tiny", rootfs, kernel, Job())
    os.utime(rootfs, ns=(0, 0))
    assert list_local(images)[0] == []
    second = register_image(images, "tiny", rootfs, kernel, Job(), replace=True)
    assert (second.rootfs_sha256, second.rootfs_mtime_ns) == (first.rootfs_sha256, 0)
    managed = import_image(images, "tiny", tmp_path / "root", Job(), replace=True)
    assert read_local(images, "tiny") == managed
    assert not (images / "tiny/kernel").exists()
    assert rootfs.exists()


# With a daemon -------------------------------------------------------------------------------------------------------


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[DaemonProcess]:
    with running_daemon(tmp_path / "daemon") as daemon:
        install_kernel(daemon.layout.kernels)
        yield daemon


@pytest.fixture
def rootfs(tmp_path: Path) -> Path:
    return ext4(tmp_path / "rootfs.img", root_directory(tmp_path / "root"))


def banger(daemon: DaemonProcess, *argv: str, status: int = 0, cwd: Path | None = None) -> str:
    """What a banger command prints, or says of its failure when that is what it must end with."""
    ended = subprocess.run(
        [sys.executable, "-m", "banger.cli", *argv], env=daemon.environment, capture_output=True, text=True, cwd=cwd
    )
    assert ended.returncode == status, ended.stderr
    assert "Traceback" not in ended.stderr
    return ended.stderr if status else ended.stdout


def create(daemon: DaemonProcess, name: str, image: str = "tiny", kernel: str = "") -> Path:
    """The directory of a new VM."""
    vm = daemon.client.call(op.VM_CREATE, m.VmCreate(image=image, kernel=kernel, name=name, home_bytes=1 << 30))
    assert vm.kernel == "mine"
    return Path(vm.directory)


def boots(directory: Path) -> list[str]:
    """What the kernel and the modules of a VM are made of."""
    return [(directory / name).read_text().split()[0] for name in ("kernel", "modules.squashfs")]


def filesystems(directory: Path) -> list[str]:
    """The filesystems of a VM's disks: image, overlay, home, modules."""
    record = json.loads((directory / "vm.json").read_text())
    return [disk["filesystem"] for disk in record["machine"]["disks"]]


def test_register_by_command(daemon: DaemonProcess, rootfs: Path, tmp_path: Path) -> None:
    (tmp_path / "home").mkdir()
    (tmp_path / "home/notes").write_text("mine\n")
    ext4(tmp_path / "seed.img", tmp_path / "home")
    said = banger(
        daemon,
        *("image", "register", "tiny", "--rootfs", "rootfs.img", "--work-seed", "seed.img", "--kernel-ref", "mine"),
        cwd=tmp_path,
    )
    assert said == f"registered tiny: Tiny 1 {host_arch()}, 64 MiB\n"
    image = json.loads(banger(daemon, "image", "show", "tiny", "--json"))
    assert (image["managed"], image["source"]) == (False, str(rootfs))
    assert image["work_seed"] == str(tmp_path / "seed.img")
    assert "managed" in banger(daemon, "image", "show", "tiny")
    assert "'tiny'" in banger(
        daemon, "image", "register", "tiny", "--rootfs", str(rootfs), "--kernel-ref", "mine", status=1
    )

    vm = create(daemon, "one")
    notes = subprocess.run(["debugfs", "-R", "cat /notes", vm / "work.ext4"], check=True, capture_output=True)
    assert notes.stdout == b"mine\n"
    assert (vm / "work.ext4").stat().st_size == 1 << 30
    assert (vm / "rootfs").read_bytes() == rootfs.read_bytes()
    assert rootfs.stat().st_nlink == 1
    assert system.allocated_bytes(vm / "rootfs") <= system.allocated_bytes(rootfs) + MIB
    assert filesystems(vm) == ["ext4", "ext4", "ext4", "squashfs"]
    packed = squashfs(tmp_path / "packed.ext4", tmp_path / "root")
    banger(daemon, "image", "register", "packed", "--rootfs", str(packed), "--kernel-ref", "mine")
    assert filesystems(create(daemon, "two", "packed")) == ["squashfs", "ext4", "ext4", "squashfs"]

    banger(daemon, "vm", "rm", "one", "two")
    banger(daemon, "image", "rm", "tiny", "packed")
    assert rootfs.exists()
    assert (tmp_path / "seed.img").exists()
    assert list(daemon.layout.images.iterdir()) == []


def test_a_registered_file_that_changes_or_vanishes(daemon: DaemonProcess, rootfs: Path) -> None:
    request = m.ImageRegister("tiny", str(rootfs), "mine")
    daemon.client.call(op.IMAGE_REGISTER, request)
    vm = create(daemon, "one")
    before = rootfs.read_bytes()
    with open(rootfs, "r+b") as stream:
        stream.write(b"changed")
    problem = f"{rootfs} has changed since it was registered"
    assert problem in banger(daemon, "image", "list")
    assert problem in banger(daemon, "image", "show", "tiny", status=1)
    refusal = banger(daemon, "vm", "create", "--image", "tiny", status=1)
    assert problem in refusal
    assert "--force" in refusal
    assert (vm / "rootfs").read_bytes() == before
    daemon.client.call(op.IMAGE_REGISTER, dataclasses.replace(request, force=True))
    assert (create(daemon, "two") / "rootfs").read_bytes() == rootfs.read_bytes()
    rootfs.unlink()
    assert f"{rootfs} is gone" in banger(daemon, "image", "list")
    assert f"{rootfs} is gone" in banger(daemon, "vm", "run", "--image", "tiny", "--", "tool", status=125)
    banger(daemon, "vm", "rm", "one", "two")
    banger(daemon, "image", "rm", "tiny")


def test_an_image_and_its_vms_outlive_their_kernel(daemon: DaemonProcess, rootfs: Path, tmp_path: Path) -> None:
    banger(daemon, "image", "register", "tiny", "--rootfs", str(rootfs), "--kernel-ref", "mine")
    banger(daemon, "image", "import", "packed", "--from", str(tmp_path / "root"), "--kernel-ref", "mine")
    before = create(daemon, "before")
    refusal = banger(daemon, "kernel", "rm", "mine", status=1)
    assert all(name in refusal for name in ("tiny", "packed", "before"))
    daemon.client.call(op.KERNEL_DELETE, m.KernelDelete("mine", force=True))
    assert daemon.client.call(op.KERNEL_LIST, m.Empty()).kernels == []

    for image in ("tiny", "packed"):
        held = create(daemon, f"held-{image}", image)
        assert boots(held) == ["old", "old"]
        assert (held / "kernel").samefile(daemon.layout.images / image / "kernel/vmlinux")
    install_kernel(daemon.layout.kernels, "new")
    after = create(daemon, "after")
    assert boots(after) == ["new", "new"]
    assert boots(before) == ["old", "old"]

    # an entry that cannot be used is as good as none
    (daemon.layout.kernels / "mine/modules.squashfs").unlink()
    assert boots(create(daemon, "again")) == ["old", "old"]
    daemon.restart()
    assert boots(create(daemon, "restarted")) == ["old", "old"]
    assert "broken" in banger(daemon, "vm", "create", "--image", "tiny", "--kernel", "mine", status=1)


def test_requests_that_cannot_be_met(daemon: DaemonProcess, rootfs: Path, tmp_path: Path) -> None:
    register = ("image", "register", "new")
    for command in (
        (*register, "--rootfs", str(rootfs)),
        ("image", "import", "new", "--from", str(tmp_path / "root")),
    ):
        refusal = banger(daemon, *command, "--kernel-ref", "mein", status=1)
        assert "there is no kernel 'mein'" in refusal
        assert "did you mean 'mine'? run 'banger kernel list'" in refusal
        assert "run 'banger kernel list'" in banger(daemon, *command, "--kernel-ref", "zzz", status=1)
    assert "there is no" in banger(daemon, *register, "--rootfs", "missing", "--kernel-ref", "mine", status=2)
    assert "--kernel-ref" in banger(daemon, *register, "--rootfs", str(rootfs), status=2)
    for rootfs_path, seed in (("rootfs.img", ""), (str(rootfs), "seed.img")):
        with pytest.raises(BangerError, match="is not an absolute path"):
            daemon.client.call(op.IMAGE_REGISTER, m.ImageRegister("new", rootfs_path, "mine", seed))
    assert list(daemon.layout.images.iterdir()) == []
