"""Which kernel modules a guest needs to boot, in load order, and which drivers a kernel lacks."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from banger.api.errors import BangerError, Code
from banger.kernelcat.confine import confined, read_bounded
from banger.kernelcat.decompress import compression, decompress

_INDEX_LIMIT = 64 << 20  # bytes of modules.dep or modules.builtin
_MODULE_LIMIT = 64 << 20  # bytes of one module, also when decompressed


@dataclass(frozen=True)
class Driver:
    """A part of the kernel that guests use.

    `module` is the name with underscores, '' for what can only be built in. A kernel without a `needed` one is refused
    unless it has `instead`.
    """

    module: str
    option: str
    needed: bool = True
    instead: str = ""

    def __str__(self) -> str:
        return f"{self.module} ({self.option})" if self.module else self.option


# in load order: the transports first, then the channel to the host, disks and filesystems; crc32c before ext4, which
# asks for it by a soft dependency that modules.dep does not list
DRIVERS = (
    Driver("", "CONFIG_BLK_DEV_INITRD"),
    Driver("", "CONFIG_DEVTMPFS"),
    Driver("virtio_pci", "CONFIG_VIRTIO_PCI", instead="virtio_mmio"),  # QEMU's pc, q35 and virt
    Driver("virtio_mmio", "CONFIG_VIRTIO_MMIO", needed=False),  # Firecracker, QEMU's microvm
    Driver("virtio_console", "CONFIG_VIRTIO_CONSOLE", instead="vmw_vsock_virtio_transport"),
    Driver("virtio_blk", "CONFIG_VIRTIO_BLK"),
    Driver("virtio_rng", "CONFIG_HW_RANDOM_VIRTIO", needed=False),
    Driver("squashfs", "CONFIG_SQUASHFS"),
    Driver("", "CONFIG_SQUASHFS_LZ4"),
    Driver("crc32c_generic", "CONFIG_CRYPTO_CRC32C", needed=False),
    Driver("ext4", "CONFIG_EXT4_FS"),
    Driver("overlay", "CONFIG_OVERLAY_FS"),
    Driver("virtio_net", "CONFIG_VIRTIO_NET"),
    Driver("vmw_vsock_virtio_transport", "CONFIG_VIRTIO_VSOCKETS", needed=False),
    Driver("virtio_balloon", "CONFIG_VIRTIO_BALLOON", needed=False),
    Driver("pvpanic_pci", "CONFIG_PVPANIC_PCI", needed=False),
)


@dataclass(frozen=True)
class BootPlan:
    """`load`: paths below the module directory in load order; `missing`: drivers that some machine type would need;
    `fatal`: those of them without which no guest boots."""

    load: tuple[str, ...]
    missing: tuple[str, ...]
    fatal: tuple[str, ...]


def boot_plan(modules: Path | None, config: str | None) -> BootPlan:
    """Find every driver of a kernel: built in, as a module, missing, or (without an index) unknown and taken for given.

    `modules` is the lib/modules/<version> directory with modules.dep and modules.builtin, `config` the text of the
    build configuration. Raises CORRUPT when modules.dep leads out of the directory or to a file that is not there.
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
                    confined(modules, path, "modules.dep")
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
    fatal = [driver for driver in absent if not driver.instead or found[driver.instead] is False]
    return BootPlan(tuple(load), tuple(map(str, absent)), tuple(map(str, fatal)))


def read_module(modules: Path, path: str) -> bytes:
    """The decompressed content of a module (.ko, .ko.gz, .ko.xz, .ko.zst)."""
    data = read_bounded(modules / path, _MODULE_LIMIT)
    if compression(data) is not None:
        data = decompress(data, _MODULE_LIMIT)
    if not data.startswith(b"\x7fELF"):
        raise BangerError(Code.CORRUPT, f"the module {path!r} is not an ELF file")
    return data


def _read_dependencies(modules: Path) -> dict[str, list[str]]:
    """modules.dep: module name -> paths in load order, itself last (depmod(8) lists what is needed first last)."""
    table: dict[str, list[str]] = {}
    for line in _read_index(modules / "modules.dep"):
        path, colon, needs = line.partition(":")
        if colon:
            table[_module_name(path)] = [*reversed(needs.split()), path]
    return table


def _read_builtin(modules: Path) -> set[str] | None:
    if not (modules / "modules.builtin").is_file():
        return None
    return {_module_name(line) for line in _read_index(modules / "modules.builtin")}


def _read_index(file: Path) -> list[str]:
    try:
        return read_bounded(file, _INDEX_LIMIT).decode("utf-8", "surrogateescape").splitlines()
    except OSError as error:
        raise BangerError(Code.CORRUPT, f"the module index {file.name} cannot be read: {error.strerror}") from error


def _read_config(text: str) -> dict[str, str]:
    pairs = (line.partition("=") for line in text.splitlines() if line.startswith("CONFIG_"))
    return {option: value for option, _, value in pairs}


def _module_name(path: str) -> str:
    return PurePosixPath(path.strip()).name.split(".ko")[0].replace("-", "_")
