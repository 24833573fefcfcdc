"""The running host's kernel, where each distribution keeps it."""

import os
import struct
import subprocess
import sys
from pathlib import Path

import pytest

from banger.api.errors import BangerError, Code
from banger.kernelcat.host import host_kernel

V = "6.1.0-10-amd64"


def host(root: Path, *paths: str) -> Path:
    """A root filesystem with these files, which hold their own path, and directories, whose path ends in a slash."""
    for path in ("etc/os-release", *paths):
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).mkdir(parents=True, exist_ok=True) if path.endswith("/") else (root / path).write_text(path)
    (root / "etc/os-release").write_text("NAME=x\nVERSION_ID=12\nID='debian'\nID_LIKE=other\n")
    return root


def bzimage(version: str) -> bytes:
    """The start of a bzImage: kernel_version points at the text, less 0x200 (Documentation/arch/x86/boot.rst)."""
    setup = bytearray(0x800)
    setup[0x202:0x206] = b"HdrS"
    struct.pack_into("<H", setup, 0x20E, 0x300)
    text = f"{version} (builder@host) #1 SMP\0".encode()
    setup[0x500 : 0x500 + len(text)] = text
    return bytes(setup)


@pytest.mark.parametrize(
    ("files", "release", "kernel", "initrd", "modules", "config"),
    [
        (
            [f"boot/vmlinuz-{V}", f"boot/initrd.img-{V}", f"boot/config-{V}", f"usr/lib/modules/{V}/"],
            *(V, f"boot/vmlinuz-{V}", f"boot/initrd.img-{V}", f"usr/lib/modules/{V}", f"boot/config-{V}"),
        ),
        (
            [f"lib/modules/{V}/vmlinuz", f"lib/modules/{V}/config", f"boot/initramfs-{V}.img", "boot/vmlinuz-9.9"],
            *(V, f"lib/modules/{V}/vmlinuz", f"boot/initramfs-{V}.img", f"lib/modules/{V}", f"lib/modules/{V}/config"),
        ),
        ([f"boot/vmlinux-{V}", "proc/config.gz"], V, f"boot/vmlinux-{V}", None, None, "proc/config.gz"),
        (
            [
                "boot/vmlinuz-lts",
                "boot/initramfs-lts",
                "boot/config-6.6.9-0-lts",
                "lib/modules/6.6.9-0-lts/",
                "boot/vmlinuz-virt",
            ],
            *(
                "6.6.9-0-lts",
                "boot/vmlinuz-lts",
                "boot/initramfs-lts",
                "lib/modules/6.6.9-0-lts",
                "boot/config-6.6.9-0-lts",
            ),
        ),
    ],
)
def test_layouts(
    tmp_path: Path,
    files: list[str],
    release: str,
    kernel: str,
    initrd: str | None,
    modules: str | None,
    config: str | None,
) -> None:
    root = host(tmp_path, *files)
    found = host_kernel(root, release)
    assert found.kernel == root / kernel
    for part, expected in ((found.initrd, initrd), (found.modules, modules), (found.config, config)):
        assert part == (root / expected if expected else None)
    assert (found.distro, found.kernel_version) == ("debian", release)


def test_kernel_with_a_fixed_name_must_be_of_the_running_version(tmp_path: Path) -> None:
    """Arch Linux replaces it on every update."""
    root = host(tmp_path, "boot/vmlinuz-linux", "boot/vmlinuz-linux-lts", "boot/initramfs-linux-lts.img")
    (root / "boot/vmlinuz-linux").write_bytes(bzimage("6.9.2-arch1-1"))
    (root / "boot/vmlinuz-linux-lts").write_bytes(bzimage("6.6.30-1-lts"))
    assert host_kernel(root, "6.9.2-arch1-1").kernel == root / "boot/vmlinuz-linux"
    found = host_kernel(root, "6.6.30-1-lts")
    assert found.kernel == root / "boot/vmlinuz-linux-lts"
    assert found.initrd == root / "boot/initramfs-linux-lts.img"
    with pytest.raises(BangerError, match="another version") as caught:
        host_kernel(root, "6.9.1-arch1-1")
    assert caught.value.code is Code.NOT_FOUND
    assert "reboot" in caught.value.hint


def test_host_without_its_kernel_is_told_so(tmp_path: Path) -> None:
    for root in (tmp_path, host(tmp_path, "boot/", f"lib/modules/{V}/", "boot/vmlinuz-9.9")):
        with pytest.raises(BangerError) as caught:
            host_kernel(root, V)
        assert caught.value.code is Code.NOT_FOUND
        assert repr(V) in caught.value.message
        assert "kernel list --available" in caught.value.hint


def test_os_release_is_optional(tmp_path: Path) -> None:
    root = host(tmp_path, f"boot/vmlinuz-{V}")
    (root / "etc/os-release").unlink()
    assert host_kernel(root, V).distro == ""


def test_kernel_that_only_root_can_read_says_how_to_copy_it(tmp_path: Path) -> None:
    """Ubuntu's vmlinuz has mode 0600. In a process that is nobody's, when the tests run as root."""
    root = host(tmp_path / "root", f"boot/vmlinuz-{V}", f"boot/initrd.img-{V}", f"lib/modules/{V}/")
    for name in (f"vmlinuz-{V}", f"initrd.img-{V}"):
        (root / "boot" / name).chmod(0 if os.getuid() else 0o600)
    script = (
        "import os, sys; from pathlib import Path; from banger.kernelcat.host import host_kernel\n"
        "from banger.api.errors import BangerError\n"
        "os.chdir(sys.argv[1])\n"
        "if os.getuid() == 0: os.setresuid(65534, 65534, 65534)\n"
        "try: host_kernel(Path('.'), sys.argv[2])\n"
        "except BangerError as error: print(error.code, error)\n"
    )
    output = subprocess.run(
        [sys.executable, "-c", script, str(root), V], check=True, capture_output=True, text=True
    ).stdout
    assert output.startswith("invalid ")
    assert f"sudo install -m 644 boot/vmlinuz-{V}" in output
    assert f"--from lib/modules/{V}" in output
