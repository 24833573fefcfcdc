"""The boot plan of a kernel: load order, built-in and missing drivers, hostile indexes."""

import gzip
import lzma
from collections.abc import Callable
from pathlib import Path

import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from banger.api.errors import BangerError, Code
from banger.kernelcat.modules import DRIVERS, BootPlan, ModuleDirectory, boot_plan, read_module
from tests.unit.kernelcat import builders

ALL_YES = "".join(f"{driver.option}=y\n" for driver in DRIVERS)


def plan_of(tree: Path) -> BootPlan:
    return boot_plan(ModuleDirectory(tree), None)


def without(option: str, config: str = ALL_YES) -> str:
    return config.replace(f"{option}=y\n", f"# {option} is not set\n")


def test_modules_load_after_what_they_depend_on(tmp_path: Path) -> None:
    plan = plan_of(builders.module_tree(tmp_path, builders.VIRTIO, builders.BUILTIN))
    assert plan.missing == ()
    # all of them, each once; virtio-rng counts as virtio_rng
    assert sorted(plan.load) == sorted(builders.VIRTIO)
    for path, needs in builders.VIRTIO.items():
        assert all(plan.load.index(need) < plan.load.index(path) for need in needs)


def test_longest_dependency_comes_first(tmp_path: Path) -> None:
    # depmod writes what is needed first at the end of the line
    tree = {"net/virtio_net.ko": ["net/net_failover.ko", "net/failover.ko"], "net/net_failover.ko": ["net/failover.ko"]}
    builders.module_tree(tmp_path, {**tree, "net/failover.ko": []})
    assert plan_of(tmp_path).load == ("net/failover.ko", "net/net_failover.ko", "net/virtio_net.ko")


def test_missing_driver_is_named_with_its_option(tmp_path: Path) -> None:
    tree = {path: needs for path, needs in builders.VIRTIO.items() if "overlay" not in path}
    plan = plan_of(builders.module_tree(tmp_path, tree, builders.BUILTIN))
    assert plan.fatal == plan.missing == ("overlay (CONFIG_OVERLAY_FS)",)


def test_without_any_index_nothing_is_known_to_be_missing() -> None:
    plan = boot_plan(None, None)
    assert plan.missing == ()
    assert "squashfs (CONFIG_SQUASHFS)" in plan.unknown
    assert "CONFIG_DEVTMPFS" in plan.unknown


def test_what_no_module_tells_is_unknown_without_a_configuration(tmp_path: Path) -> None:
    tree = builders.module_tree(tmp_path, builders.VIRTIO, builders.BUILTIN)
    options = ("CONFIG_BLK_DEV_INITRD", "CONFIG_DEVTMPFS", "CONFIG_SQUASHFS_LZ4")
    assert plan_of(tree).unknown == options
    config = "".join(f"{option}=y\n" for option in options)
    assert boot_plan(ModuleDirectory(tree), config).unknown == ()


def test_modules_without_an_index_are_refused(tmp_path: Path) -> None:
    with pytest.raises(BangerError, match=r"no modules\.dep"):
        plan_of(tmp_path)


def test_configuration_decides_for_a_bare_kernel() -> None:
    assert boot_plan(None, ALL_YES).missing == ()
    assert boot_plan(None, without("CONFIG_EXT4_FS")).fatal == ("ext4 (CONFIG_EXT4_FS)",)
    # a module, but there are no modules
    assert boot_plan(None, ALL_YES.replace("OVERLAY_FS=y", "OVERLAY_FS=m")).fatal == ("overlay (CONFIG_OVERLAY_FS)",)
    assert boot_plan(None, without("CONFIG_DEVTMPFS")).fatal == ("CONFIG_DEVTMPFS",)


def test_optional_drivers_are_not_missed() -> None:
    config = ALL_YES
    for option in ("CONFIG_VIRTIO_BALLOON", "CONFIG_CRYPTO_CRC32C", "CONFIG_PVPANIC_PCI"):
        config = without(option, config)
    assert boot_plan(None, config).missing == ()


def test_entropy_is_missed_but_not_insisted_on() -> None:
    plan = boot_plan(None, without("CONFIG_HW_RANDOM_VIRTIO"))
    assert (plan.missing, plan.fatal) == (("virtio_rng (CONFIG_HW_RANDOM_VIRTIO)",), ())


def test_firecracker_kernel_lacks_what_qemu_needs_but_is_usable() -> None:
    config = without("CONFIG_VIRTIO_PCI", without("CONFIG_VIRTIO_CONSOLE"))
    plan = boot_plan(None, config)
    assert plan.missing == ("virtio_pci (CONFIG_VIRTIO_PCI)", "virtio_console (CONFIG_VIRTIO_CONSOLE)")
    assert plan.fatal == ()
    transports = ("virtio_pci (CONFIG_VIRTIO_PCI)", "virtio_mmio (CONFIG_VIRTIO_MMIO)")
    assert boot_plan(None, without("CONFIG_VIRTIO_MMIO", config)).fatal == transports


@pytest.mark.parametrize("path", ["../outside.ko", "/outside.ko", "kernel/../../outside.ko", "link.ko", "gone.ko"])
def test_modules_dep_cannot_lead_outside(tmp_path: Path, path: str) -> None:
    (tmp_path / "outside.ko").write_bytes(builders.module("outside"))
    tree = builders.module_tree(tmp_path / "tree", builders.VIRTIO, builders.BUILTIN)
    (tree / "link.ko").symlink_to(tmp_path / "outside.ko")
    for line in (f"kernel/fs/overlay.ko: {path}\n", f"{path.replace('.ko', '/overlay.ko')}:\n"):
        (tree / "modules.dep").write_text(line)
        with pytest.raises(BangerError, match="not among the modules") as caught:
            plan_of(tree)
        assert caught.value.code is Code.CORRUPT


@pytest.mark.parametrize(
    ("suffix", "compress"),
    [
        ("", bytes),
        (".gz", gzip.compress),
        (".xz", lzma.compress),
        (".zst", zstandard.ZstdCompressor().compress),
    ],
)
def test_modules_are_decompressed(tmp_path: Path, suffix: str, compress: Callable[[bytes], bytes]) -> None:
    content = builders.module("a")
    (tmp_path / f"a.ko{suffix}").write_bytes(compress(content))
    assert read_module(ModuleDirectory(tmp_path), f"a.ko{suffix}", builders.VERSION) == content


def test_modules_of_another_kernel_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a.ko").write_bytes(builders.module("a") + b"\0vermagic=5.10.0-1 SMP mod_unload \0")
    assert read_module(ModuleDirectory(tmp_path), "a.ko", "5.10.0-1")
    with pytest.raises(BangerError, match=r"'a.ko' is for '5.10.0-1'") as caught:
        read_module(ModuleDirectory(tmp_path), "a.ko", "5.10.0-11")
    assert caught.value.code is Code.INVALID


def test_damaged_modules_are_refused(tmp_path: Path) -> None:
    (tmp_path / "text.ko").write_bytes(b"no module")
    (tmp_path / "cut.ko.xz").write_bytes(lzma.compress(builders.module("a"))[:-9])
    for path in ("text.ko", "cut.ko.xz"):
        with pytest.raises(BangerError) as caught:
            read_module(ModuleDirectory(tmp_path), path, builders.VERSION)
        assert caught.value.code is Code.CORRUPT


@given(st.text(alphabet=st.sampled_from("abcko./: \nextvirtio_blk4-\0"), max_size=120))
def test_any_modules_dep_is_read_or_refused(tmp_path_factory: pytest.TempPathFactory, text: str) -> None:
    root = tmp_path_factory.mktemp("tree")
    tree = builders.module_tree(root / "modules", {"ext4.ko": [], "virtio_blk.ko": []})
    (tree / "modules.dep").write_text(text)
    try:
        plan = plan_of(tree)
    except BangerError:
        return
    assert all((tree / path).resolve().is_relative_to(tree) for path in plan.load)
