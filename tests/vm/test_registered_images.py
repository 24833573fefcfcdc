"""Root filesystems and kernels given by path boot, also once they are promoted, tagged, and exported and imported."""

import subprocess
from pathlib import Path

import pytest

from banger import system
from banger.kernelcat.manifest import read_at
from tests.vm.host import KERNEL, Host


@pytest.fixture
def files(tmp_path: Path, kernel: Path, image: Path) -> Path:
    """The files of the kernel debian-cloud and of the minimal image as somebody may have them."""
    version = read_at(kernel, KERNEL).kernel_version
    modules = tmp_path / "lib/modules" / version
    modules.mkdir(parents=True)
    unpack = f"rdsquashfs --unpack-path=/ --unpack-root={modules} --quiet {kernel}/modules.squashfs"
    subprocess.run(unpack.split(), check=True)
    system.copy_file_prefer_clone(kernel / "vmlinux", tmp_path / "vmlinux")
    system.copy_file_prefer_clone(image / "rootfs.squashfs", tmp_path / "rootfs.squashfs")
    return tmp_path


def boots(host: Host, image: str, version: str) -> None:
    """Look in a new VM for the image's kernel and its modules."""
    script = "uname -r && ls /lib/modules/*/modules.dep && head -n 1 /etc/os-release"
    said = host.ok("vm", "run", "--rm", "--image", image, "--", "sh", "-c", script)
    assert said.splitlines() == [
        version,
        f"/lib/modules/{version}/modules.dep",
        'PRETTY_NAME="Debian GNU/Linux 12 (bookworm)"',
    ]


def test_from_registration_to_export(host: Host, files: Path) -> None:
    (modules,) = (files / "lib/modules").iterdir()
    host.ok(
        *("image", "register", "mine", "--rootfs", str(files / "rootfs.squashfs")),
        *("--kernel", str(files / "vmlinux"), "--modules", str(modules)),
    )
    boots(host, "mine", modules.name)
    host.ok("image", "promote", "mine")
    for path in (files / "rootfs.squashfs", files / "vmlinux", files / "lib"):
        system.remove_tree(path)
    host.ok("image", "tag", "mine", "other")
    host.ok("image", "rm", "mine")
    boots(host, "other", modules.name)
    host.ok("image", "export", "other", "--oci", "-o", str(files / "layout"))
    unpack = f"umoci unpack --rootless --image {files}/layout {files}/bundle"
    subprocess.run(unpack.split(), check=True, capture_output=True)
    host.ok("image", "import", "again", "--from", str(files / "bundle/rootfs"))
    boots(host, "again", modules.name)
    host.ok("image", "rm", "other", "again")
