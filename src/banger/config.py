"""The user's configuration: `config.toml`, every key with its default."""

from __future__ import annotations

import math
import tomllib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

from banger.api.errors import BangerError, Code
from banger.durations import parse_duration
from banger.oci.reference import DOCKER_HUB, Registries, canonical_registry, is_registry, split_mirror
from banger.reasons import in_words
from banger.sizes import EXAMPLES, parse_size

_SIZES = ("memory", "disk_size", "home_size", "reserve_memory", "reserve_disk", "cache_size")
_TIMES = 'write {key} = "45s", "30m" or "1h30m" in quotes, or a number of seconds without'
_UIDS = 0xFFFFFFFF  # the last one means no user, chown(2)
_TYPE_NAMES: dict[type, str] = {
    int: "integer",
    float: "number",
    bool: "boolean",
    str: "string",
    tuple: "list of strings",
    dict: "table",
}


@dataclass(frozen=True)
class Config:
    """Defaults for new VMs and limits of the host. Sizes are in bytes (the file may say "2G"), times in seconds ("1h").

    `vcpu` 0 means one where guests are emulated, else two. `debian_mirror` '' means the one in the host's own apt
    configuration. `accelerator` is auto, kvm or tcg, and `vmm` auto, firecracker or qemu. `firecracker` and `jailer`
    are the programs to use, '' for those on PATH; with the jailer "off" Firecracker stays root. `cpu_template` is a
    template of Firecracker's, such as T2, or a file that holds one, '' for none. Registries are host or host:port:
    `insecure_registries` are spoken to without TLS, as those on loopback always are; images without a registry are in
    the `default_registry`; `registry_mirrors` lists by registry the [http[s]://]host[:port][/prefix] that are asked
    before it. `ssh_key` is the private key that guests let in, '' for banger's own. `cache_size` is what the layers of
    pulled images may take. `vm run --wait-for` waits `wait_timeout` seconds. A new VM stops when untouched for
    `auto_stop` seconds, 0 for never; with `balloon` it gives back memory that it leaves idle. As root, VMMs run as
    users (and groups) of their own: those of the `vm_uids` from `first_vm_uid` on. `releases` is the directory or URL
    where `banger update` finds wheels, '' for where the tool that installed banger looks; `release_key` is the minisign
    key that must have signed them.
    """

    default_image: str = "debian-trixie"
    default_kernel: str = "debian-cloud"
    vcpu: int = 0
    memory: int = 1 << 30
    disk_size: int = 16 << 30
    home_size: int = 8 << 30
    stop_grace: float = 10.0
    boot_timeout: float = 120.0
    reserve_memory: int = 256 << 20
    reserve_disk: int = 512 << 20
    cache_size: int = 20 << 30
    debian_mirror: str = ""
    accelerator: str = "auto"
    insecure_registries: tuple[str, ...] = ()
    default_registry: str = DOCKER_HUB
    registry_mirrors: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    ssh_key: str = ""
    vmm: str = "auto"
    firecracker: str = ""
    jailer: str = ""
    cpu_template: str = ""
    auto_stop: float = 0.0
    balloon: bool = False
    wait_timeout: float = 60.0
    first_vm_uid: int = 0x70000000  # far above what user databases and subuid ranges hand out
    vm_uids: int = 1 << 20
    releases: str = ""
    release_key: str = ""

    @property
    def registries(self) -> Registries:
        return Registries(self.default_registry, self.registry_mirrors, self.insecure_registries)


def load(path: Path) -> Config:
    """Read the configuration; a missing file means all defaults.

    Raises BangerError(INVALID) naming the file and the key that is unknown or of the wrong type.
    """
    try:
        values = tomllib.loads(path.read_text())
    except FileNotFoundError:
        return Config()
    except OSError as error:
        raise BangerError(Code.INVALID, f"{path} cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        message = f"{path} is not valid TOML: {in_words(error)}"
        raise BangerError(Code.INVALID, message, hint="correct or remove it") from error
    known: dict[str, type] = {name: type(value) for name, value in asdict(Config()).items()}
    for key, value in values.items():
        if key not in known:
            raise BangerError(Code.INVALID, f"{path}: unknown key {key!r}", hint=f"known: {', '.join(known)}")
        if key in _SIZES and type(value) is not int:
            values[key] = value = _size(key, value, path)
        if known[key] is float and type(value) is str:
            values[key] = value = _time(key, value, path)
        if known[key] is float and type(value) is int:
            values[key] = float(value)
        elif known[key] is tuple and type(value) is list and all(type(item) is str for item in value):
            values[key] = tuple(value)
        elif type(value) is not known[key]:
            raise BangerError(
                Code.INVALID,
                f"{path}: {key} must be of type {_TYPE_NAMES[known[key]]}, not {_written(value)}",
                hint=_TIMES.format(key=key) if known[key] is float else "",
            )
        if type(value) in (int, float) and not 0 <= value < math.inf:
            raise BangerError(Code.INVALID, f"{path}: {key} cannot be {_written(value)}")
    if "registry_mirrors" in values:
        values["registry_mirrors"] = _mirrors(values["registry_mirrors"], path)
    config = Config(**values)
    if config.accelerator not in ("auto", "kvm", "tcg"):
        raise BangerError(Code.INVALID, f"{path}: accelerator must be auto, kvm or tcg, not {config.accelerator!r}")
    if config.vmm not in ("auto", "firecracker", "qemu"):
        raise BangerError(Code.INVALID, f"{path}: vmm must be auto, firecracker or qemu, not {config.vmm!r}")
    if config.first_vm_uid == 0 or config.vm_uids == 0 or config.first_vm_uid + config.vm_uids > _UIDS:
        raise BangerError(
            Code.INVALID,
            f"{path}: first_vm_uid {config.first_vm_uid} and vm_uids {config.vm_uids} are no range of users",
            hint=f"say a first one above 0 and a number of them that ends below {_UIDS}, none of them anybody's",
        )
    for key, registries in (
        ("default_registry", [config.default_registry]),
        ("insecure_registries", config.insecure_registries),
        ("registry_mirrors", config.registry_mirrors),
    ):
        for registry in registries:
            if not is_registry(registry):
                raise BangerError(
                    Code.INVALID,
                    f"{path}: {key} has {registry!r}, which is not a registry",
                    hint="say HOST or HOST:PORT, such as registry.example.org:5000",
                )
    return config


def _written(value: object) -> str:
    """A value as the file has it, or what kind of value it is."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str | int | float):
        return repr(value)
    return "a list" if isinstance(value, list) else "a table" if isinstance(value, dict) else "a time"


def _size(key: str, value: object, path: Path) -> int:
    try:
        if not isinstance(value, str):
            raise ValueError(f"{_written(value)} is not a size")
        return parse_size(value)
    except ValueError as error:
        hint = f'{EXAMPLES} in quotes, such as {key} = "2G", or a number of bytes without'
        raise BangerError(Code.INVALID, f"{path}: {key}: {error}", hint=hint) from error


def _time(key: str, value: str, path: Path) -> float:
    if key == "auto_stop" and value == "never":
        return 0.0
    try:
        return parse_duration(value)
    except ValueError as error:
        raise BangerError(Code.INVALID, f"{path}: {key}: {error}", hint=_TIMES.format(key=key)) from error


def _mirrors(table: Mapping[str, object], path: Path) -> dict[str, tuple[str, ...]]:
    mirrors: dict[str, tuple[str, ...]] = {}
    for registry, value in table.items():
        if not isinstance(value, list) or not all(type(item) is str for item in value):
            raise BangerError(
                Code.INVALID,
                f"{path}: the mirrors of {registry!r} must be a list of strings, not {_written(value)}",
                hint='put the registry into quotes: "docker.io" = ["https://mirror.example.org"]',
            )
        for item in value:
            try:
                split_mirror(item)
            except ValueError as error:
                raise BangerError(
                    Code.INVALID,
                    f"{path}: {item!r} is not a mirror of {registry!r}",
                    hint="say [http://|https://]HOST[:PORT][/PREFIX]",
                ) from error
        mirrors[canonical_registry(registry)] = tuple(value)
    return mirrors
