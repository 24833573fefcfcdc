"""The kernel in a directory and what belongs to it, in every layout that distributions and people use."""

import itertools
import json
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from banger.api.errors import BangerError, Code
from banger.kernelcat.staged import discover_paths, newest


def lay_out(root: Path, *paths: str) -> Path:
    """Make files, which hold their own path, and directories, whose path ends in a slash."""
    for path in paths:
        file = root / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.mkdir(parents=True, exist_ok=True) if path.endswith("/") else file.write_text(path)
    return root


def found(root: Path, kernel_version: str = "") -> tuple[str, str, str, str]:
    """Kernel, initrd, modules and config, relative to the directory, '' for none."""
    parts = discover_paths(root, kernel_version)
    return tuple(  # type: ignore[return-value]
        path.relative_to(root.resolve()).as_posix() if path else ""
        for path in (parts.kernel, parts.initrd, parts.modules, parts.config)
    )


V, OLD = "6.1.0-10-amd64", "6.1.0-9-amd64"


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        # Debian, Ubuntu
        (
            [
                f"boot/vmlinuz-{V}",
                f"boot/initrd.img-{V}",
                f"boot/config-{V}",
                f"boot/System.map-{V}",
                f"lib/modules/{V}/kernel/",
            ],
            (f"boot/vmlinuz-{V}", f"boot/initrd.img-{V}", "lib/modules", f"boot/config-{V}"),
        ),
        # Fedora, in boot and in the package
        (
            [f"boot/vmlinuz-{V}", f"boot/initramfs-{V}.img", f"lib/modules/{V}/config", f"lib/modules/{V}/vmlinuz"],
            (f"boot/vmlinuz-{V}", f"boot/initramfs-{V}.img", "lib/modules", f"lib/modules/{V}/config"),
        ),
        (
            [f"usr/lib/modules/{V}/vmlinuz", f"usr/lib/modules/{V}/config", f"usr/lib/modules/{V}/kernel/"],
            (f"usr/lib/modules/{V}/vmlinuz", "", "usr/lib/modules", f"usr/lib/modules/{V}/config"),
        ),
        # Arch
        (
            [
                "boot/vmlinuz-linux",
                "boot/initramfs-linux.img",
                "boot/initramfs-linux-fallback.img",
                "usr/lib/modules/6.9.1-arch1-1/pkgbase",
            ],
            ("boot/vmlinuz-linux", "boot/initramfs-linux.img", "usr/lib/modules", ""),
        ),
        (
            ["usr/lib/modules/6.9.1-arch1-1/vmlinuz"],
            ("usr/lib/modules/6.9.1-arch1-1/vmlinuz", "", "usr/lib/modules", ""),
        ),
        # Alpine
        (
            [
                "boot/vmlinuz-virt",
                "boot/initramfs-virt",
                "boot/config-6.6.9-0-virt",
                "lib/modules/6.6.9-0-virt/kernel/",
            ],
            ("boot/vmlinuz-virt", "boot/initramfs-virt", "lib/modules", "boot/config-6.6.9-0-virt"),
        ),
        (
            ["boot/vmlinuz-virt", "boot/config-virt-6.6.9-0", "lib/modules/6.6.9-0-virt/kernel/"],
            ("boot/vmlinuz-virt", "", "lib/modules", "boot/config-virt-6.6.9-0"),
        ),
        # SUSE
        (
            [f"boot/Image-{V}", f"boot/initrd-{V}", f"lib/modules/{V}/kernel/"],
            (f"boot/Image-{V}", f"boot/initrd-{V}", "lib/modules", ""),
        ),
        # Void
        (
            ["boot/vmlinuz-6.6.9_1", "boot/config-6.6.9_1", "usr/lib/modules/6.6.9_1/kernel/"],
            ("boot/vmlinuz-6.6.9_1", "", "usr/lib/modules", "boot/config-6.6.9_1"),
        ),
        # by hand, and container images
        (["boot/vmlinuz", "boot/initrd.img", "boot/config"], ("boot/vmlinuz", "boot/initrd.img", "", "boot/config")),
        (["boot/vmlinux", "boot/initramfs.img"], ("boot/vmlinux", "boot/initramfs.img", "", "")),
        (["kernel", f"lib/modules/{V}/kernel/"], ("kernel", "", "lib/modules", "")),
        (["boot/vmlinux-6.1.0", "boot/vmlinuz-6.1.0"], ("boot/vmlinux-6.1.0", "", "", "")),
        # an entry of the catalog, or a bundle
        (
            ["vmlinux", "initrd.img", "config", "modules/modules.dep", "modules/kernel/"],
            ("vmlinux", "initrd.img", "modules", "config"),
        ),
        (["bzImage", "modules/kernel/"], ("bzImage", "", "modules", "")),
        (["Image", f"modules/{V}/kernel/"], ("Image", "", "modules", "")),
        (["vmlinuz", "initrd.img"], ("vmlinuz", "initrd.img", "", "")),
        # one lib/modules/<version>, with and without a kernel in it
        (["vmlinuz", "config", "modules.dep", "kernel/fs/"], ("vmlinuz", "", ".", "config")),
        (["modules.dep", "kernel/fs/"], ("", "", ".", "")),
        # halves, which other sources complete
        ([f"lib/modules/{V}/kernel/"], ("", "", "lib/modules", "")),
        ([f"boot/vmlinuz-{V}", "lib/modules/"], (f"boot/vmlinuz-{V}", "", "", "")),
        ([], ("", "", "", "")),
        # no kernels
        ([f"boot/System.map-{V}", f"boot/config-{V}", "boot/.vmlinuz-6.1.hmac", "boot/vmlinuz-9/"], ("", "", "", "")),
    ],
)
def test_layouts(tmp_path: Path, files: list[str], expected: tuple[str, ...]) -> None:
    assert found(lay_out(tmp_path / "staged", *files, "README")) == expected


def test_newest_kernel_with_modules_is_taken_and_version_chooses(tmp_path: Path) -> None:
    root = lay_out(
        tmp_path,
        *(
            f"boot/{kind}-{version}"
            for kind in ("vmlinuz", "initrd.img", "config")
            for version in (OLD, V, "6.9.0-1-amd64")
        ),
        f"lib/modules/{OLD}/kernel/",
        f"lib/modules/{V}/kernel/",
    )
    assert found(root) == (f"boot/vmlinuz-{V}", f"boot/initrd.img-{V}", "lib/modules", f"boot/config-{V}")
    assert found(root, OLD) == (f"boot/vmlinuz-{OLD}", f"boot/initrd.img-{OLD}", "lib/modules", f"boot/config-{OLD}")
    assert found(root, "6.9.0-1-amd64")[0] == "boot/vmlinuz-6.9.0-1-amd64"
    # the importer compares it with what the kernel says, and knows what to tell
    assert found(root, "5.0")[0] == f"boot/vmlinuz-{V}"


def test_flavours_find_their_own_modules(tmp_path: Path) -> None:
    root = lay_out(
        tmp_path,
        *(
            f"boot/{name}"
            for name in ("vmlinuz-linux", "vmlinuz-linux-lts", "initramfs-linux.img", "initramfs-linux-lts.img")
        ),
        "usr/lib/modules/6.9.1-arch1-1/kernel/",
        "usr/lib/modules/6.6.30-1-lts/kernel/",
        "usr/lib/modules/6.9.2-arch1-1/kernel/",
    )
    for version, package in (("6.9.1-arch1-1", "linux"), ("6.6.30-1-lts", "linux-lts"), ("6.9.2-arch1-1", "other")):
        (root / "usr/lib/modules" / version / "pkgbase").write_text(f"{package}\n")
    assert found(root)[:2] == ("boot/vmlinuz-linux", "boot/initramfs-linux.img")
    assert found(root, "6.6.30-1-lts")[:2] == ("boot/vmlinuz-linux-lts", "boot/initramfs-linux-lts.img")


def test_root_of_an_installed_system(tmp_path: Path) -> None:
    """With the links that distributions keep at the top, and a rescue kernel without modules."""
    root = lay_out(
        tmp_path, f"boot/vmlinuz-{V}", "boot/vmlinuz-0-rescue-0123456789abcdef", f"usr/lib/modules/{V}/kernel/"
    )
    (root / "lib").symlink_to("usr/lib")
    (root / "vmlinuz").symlink_to(f"boot/vmlinuz-{V}")
    (root / "vmlinuz.old").symlink_to("boot/vmlinuz-gone")
    (root / "boot/vmlinuz").symlink_to(f"vmlinuz-{V}")
    assert found(root)[0] == f"boot/vmlinuz-{V}"
    assert found(root)[2] == "usr/lib/modules"


def test_metadata_comes_first(tmp_path: Path) -> None:
    root = lay_out(tmp_path / "staged", "out/vmlinux", "out/tree/kernel/", "out/initrd", "boot/vmlinuz-9.9")
    fields = {
        "kernel": "out/vmlinux",
        "initrd": "out/initrd",
        "modules": "out/tree",
        "distro": "void",
        "arch": "aarch64",
    }
    (root / "metadata.json").write_text(json.dumps({**fields, "kernel_version": "6.1"}))
    assert found(root) == ("out/vmlinux", "out/initrd", "out/tree", "")
    parts = discover_paths(root, "")
    assert (parts.distro, parts.arch, parts.kernel_version) == ("void", "arm64", "6.1")


@pytest.mark.parametrize("kernel", ["boot/vmlinuz-6.1", "boot/vmlinuz", "out/vmlinux"])
def test_metadata_leaves_the_configuration_to_be_found(tmp_path: Path, kernel: str) -> None:
    lay_out(tmp_path, kernel, "boot/config-6.1", "boot/config-9.9")
    (tmp_path / "metadata.json").write_text(json.dumps({"kernel": kernel, "kernel_version": "6.1"}))
    assert found(tmp_path) == (kernel, "", "", "boot/config-6.1")


@pytest.mark.parametrize(
    "part", [f"boot/vmlinuz-{V}", "boot", "lib", "lib/modules", f"boot/config-{V}", f"boot/initrd.img-{V}"]
)
def test_links_do_not_lead_out(tmp_path: Path, part: str) -> None:
    root = lay_out(
        tmp_path / "staged",
        *(f"boot/{kind}-{V}" for kind in ("vmlinuz", "config", "initrd.img")),
        f"lib/modules/{V}/kernel/",
    )
    (root / part).rename(tmp_path / "outside")
    (root / part).symlink_to(tmp_path / "outside")
    with pytest.raises(BangerError) as caught:
        discover_paths(root, "")
    assert caught.value.code is Code.CORRUPT
    assert "inside" in caught.value.message


def test_odd_files_are_not_read(tmp_path: Path) -> None:
    """A fifo, a loop and names that are not UTF-8 or full of digits."""
    root = lay_out(tmp_path, f"boot/vmlinuz-{V}")
    os.mkfifo(root / "boot/vmlinuz-9.9")
    (root / "boot/vmlinuz-8.8").symlink_to("vmlinuz-8.8")
    (root / os.fsdecode(b"boot/vmlinuz-\xff\xfe")).write_bytes(b"")
    (root / ("boot/vmlinuz-0" + "1" * 200)).symlink_to("nowhere")
    assert found(root, V)[0] == f"boot/vmlinuz-{V}"


def test_versions_order_by_number() -> None:
    names = ["6.1~rc1", "6.1-rc1", "6.1-rc2", "6.1", "6.1.0-9-a", "6.1.0-10-a", "6.2", "6.12"]
    for first, second in itertools.pairwise(f"vmlinux-{name}" for name in names[1:]):
        assert newest([first, second]) == newest([second, first]) == second
    assert newest(names[:1] + names[3:4]) == "6.1"
    assert newest([]) == ""


@given(st.lists(st.text(max_size=30), min_size=1, max_size=5))
def test_any_names_have_one_newest(names: list[str]) -> None:
    assert newest(names) in names
    assert newest(sorted(names)) == newest(sorted(names, reverse=True))
