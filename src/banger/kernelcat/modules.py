"""Which kernel modules a guest needs to boot, in load order, and which drivers a kernel lacks."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Protocol

from banger.api.errors import BangerError, Code
from banger.decompress import decompress
from banger.kernelcat.confine import confined, read_bounded

INDEX_LIMIT = 16 << 20  # bytes of modules.dep or modules.builtin
MODULE_LIMIT = 64 << 20  # bytes of one module, also when decompressed


class ModuleTree(Protocol):
    """The content of a lib/modules/<version>, wherever it is; paths are relative to it."""

    def index(self, name: str) -> bytes | None:
        """A file directly in it, as modules.dep; None when there is none."""

    def has(self, path: str) -> bool:
        """Whether there is a regular file at this path, which may be anything that modules.dep says."""

    def read(self, path: str) -> bytes:
        """What `has` found there, at most MODULE_LIMIT bytes, perhaps compressed."""


class ModuleDirectory:
    """A lib/modules/<version> on disk."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def index(self, name: str) -> bytes | None:
        file = self._directory / name
        return read_bounded(file, INDEX_LIMIT) if file.is_file() else None

    def has(self, path: str) -> bool:
        try:
            confined(self._directory, path, "modules.dep")
        except BangerError:
            return False
        return True

    def read(self, path: str) -> bytes:
        return read_bounded(confined(self._directory, path, "modules.dep"), MODULE_LIMIT)


@dataclass(frozen=True)
class Driver:
    """A part of the kernel that guests use.

    `module` is the name with underscores, '' for what can only be built in. That a kernel lacks a `needed` one is told,
    and without an `essential` one it is refused unless it has `instead`.
    """

    module: str
    option: str
    needed: bool = True
    essential: bool = True
    instead: str = ""

    def __str__(self) -> str:
        return f"{self.module} ({self.option})" if self.module else self.option


# in load order: the transports first, then the channel to the host, disks and filesystems; crc32c before ext4, which
# asks for it by a soft dependency that modules.dep does not list
DRIVERS = (
    Driver("", "CONFIG_BLK_DEV_INITRD"),
    Driver("", "CONFIG_DEVTMPFS"),
    Driver("virtio_pci", "CONFIG_VIRTIO_PCI", instead="virtio_mmio"),  # QEMU's pc, q35 and virt
    Driver("virtio_mmio", "CONFIG_VIRTIO_MMIO", instead="virtio_pci"),  # Firecracker, QEMU's microvm
    Driver("virtio_console", "CONFIG_VIRTIO_CONSOLE", instead="vmw_vsock_virtio_transport"),
    Driver("virtio_blk", "CONFIG_VIRTIO_BLK"),
    Driver("virtio_rng", "CONFIG_HW_RANDOM_VIRTIO", essential=False),
    Driver("squashfs", "CONFIG_SQUASHFS"),
    Driver("", "CONFIG_SQUASHFS_LZ4"),
    Driver("crc32c_generic", "CONFIG_CRYPTO_CRC32C", needed=False),
    Driver("ext4", "CONFIG_EXT4_FS"),
    Driver("overlay", "CONFIG_OVERLAY_FS"),
    Driver("virtio_net", "CONFIG_VIRTIO_NET"),
    Driver("vmw_vsock_virtio_transport", "CONFIG_VIRTIO_VSOCKETS", instead="virtio_console"),
    Driver("virtio_balloon", "CONFIG_VIRTIO_BALLOON", needed=False),
    Driver("pvpanic_pci", "CONFIG_PVPANIC_PCI", needed=False),
)


@dataclass(frozen=True)
class BootPlan:
    """`load`: paths below the module directory in load order; `missing`: drivers that some machine type would need;
    `fatal`: those of them without which no guest boots; `unknown`: drivers that nothing tells about."""

    load: tuple[str, ...]
    missing: tuple[str, ...]
    fatal: tuple[str, ...]
    unknown: tuple[str, ...]


def boot_plan(modules: ModuleTree | None, config: str | None) -> BootPlan:
    """Find every driver of a kernel: built in, as a module, missing, or (without an index) unknown and taken for given.

    `config` is the text of the build configuration. Raises CORRUPT when there are modules without modules.dep, or when
    that names a file that is not among them.
    """
    dependencies = _read_dependencies(modules) if modules else {}
    builtin = _read_builtin(modules) if modules else None
    options = _read_config(config) if config is not None else None
    load: list[str] = []
    found: dict[str, bool | None] = {}
    for driver in DRIVERS:
        if modules and driver.module in dependencies:
            for path in dependencies[driver.module]:
                if path not in load:
                    if not modules.has(path):
                        message = f"modules.dep names {path[:200]!r}, which is not among the modules"
                        raise BangerError(Code.CORRUPT, message)
                    load.append(path)
            present: bool | None = True
        elif builtin is not None and driver.module in builtin:
            present = True
        elif options is not None:
            present = options.get(driver.option) == "y"
        else:
            present = False if builtin is not None and driver.module else None
        found[driver.module or driver.option] = present
    absent = [driver for driver in DRIVERS if driver.needed and found[driver.module or driver.option] is False]
    essential = [driver for driver in absent if driver.essential]
    fatal = [driver for driver in essential if not driver.instead or found[driver.instead] is False]
    unknown = [driver for driver in DRIVERS if driver.needed and found[driver.module or driver.option] is None]
    return BootPlan(tuple(load), tuple(map(str, absent)), tuple(map(str, fatal)), tuple(map(str, unknown)))


def read_module(modules: ModuleTree, path: str, kernel_version: str) -> bytes:
    """The decompressed content of a module (.ko[.gz|.xz|.zst]); raises INVALID for one of another kernel."""
    data = decompress(modules.read(path), MODULE_LIMIT)
    if not data.startswith(b"\x7fELF"):
        raise BangerError(Code.CORRUPT, f"the module {path!r} is not an ELF file")
    # '\0vermagic=6.1.0-49-cloud-amd64 SMP preempt mod_unload modversions\0', include/linux/vermagic.h
    magic = re.search(rb"\0vermagic=([^ \0]{1,128})", data)
    if magic and magic[1].decode(errors="replace") != kernel_version:
        raise BangerError(
            Code.INVALID,
            f"the kernel is {kernel_version!r}, but the module {path!r} is for {magic[1].decode(errors='replace')!r}",
            hint="give the kernel and the modules of one version",
        )
    return data


def _read_dependencies(modules: ModuleTree) -> dict[str, list[str]]:
    """modules.dep: module name -> paths in load order, itself last (depmod(8) lists what is needed first last)."""
    index = modules.index("modules.dep")
    if index is None:
        raise BangerError(Code.CORRUPT, "the modules have no modules.dep")
    table: dict[str, list[str]] = {}
    for line in _lines(index):
        path, colon, needs = line.partition(":")
        if colon:
            table[_module_name(path)] = [*reversed(needs.split()), path]
    return table


def _read_builtin(modules: ModuleTree) -> set[str] | None:
    index = modules.index("modules.builtin")
    return None if index is None else {_module_name(line) for line in _lines(index)}


def _lines(index: bytes) -> list[str]:
    return index.decode("utf-8", "surrogateescape").splitlines()


def _read_config(text: str) -> dict[str, str]:
    pairs = (line.partition("=") for line in text.splitlines() if line.startswith("CONFIG_"))
    return {option: value for option, _, value in pairs}


def _module_name(path: str) -> str:
    return PurePosixPath(path.strip()).name.split(".ko")[0].replace("-", "_")
