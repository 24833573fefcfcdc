"""The user's configuration: `config.toml`, every key with its default."""

from __future__ import annotations

import math
import tomllib
from dataclasses import dataclass, fields
from pathlib import Path

from banger.api.errors import BangerError, Code

_TYPE_NAMES = {tuple: "list of strings"}


@dataclass(frozen=True)
class Config:
    """Defaults for new VMs and limits of the host. Sizes are in bytes, times in seconds.

    `vcpu` 0 means one where guests are emulated, else two. `debian_mirror` '' means the one in the host's own apt
    configuration. `accelerator` is auto, kvm or tcg. `insecure_registries` (host or host:port) are spoken to
    without TLS, as those on loopback always are.
    """

    default_image: str = "debian-bookworm"
    default_kernel: str = "debian-cloud"
    vcpu: int = 0
    memory: int = 1 << 30
    disk_size: int = 16 << 30
    home_size: int = 8 << 30
    stop_grace: float = 10.0
    boot_timeout: float = 120.0
    reserve_memory: int = 256 << 20
    reserve_disk: int = 512 << 20
    debian_mirror: str = ""
    accelerator: str = "auto"
    insecure_registries: tuple[str, ...] = ()


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
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise BangerError(Code.INVALID, f"{path} is not valid TOML: {error}", hint="correct or remove it") from error
    known = {entry.name: type(getattr(Config, entry.name)) for entry in fields(Config)}
    for key, value in values.items():
        if key not in known:
            raise BangerError(Code.INVALID, f"{path}: unknown key {key!r}", hint=f"known: {', '.join(known)}")
        if known[key] is float and type(value) is int:
            values[key] = float(value)
        elif known[key] is tuple and type(value) is list and all(type(item) is str for item in value):
            values[key] = tuple(value)
        elif type(value) is not known[key]:
            raise BangerError(
                Code.INVALID,
                f"{path}: {key} must be of type {_TYPE_NAMES.get(known[key], known[key].__name__)}, not {value!r}",
                hint="sizes are numbers of bytes, times numbers of seconds",
            )
        if type(value) in (int, float) and not 0 <= value < math.inf:
            raise BangerError(Code.INVALID, f"{path}: {key} cannot be {value!r}")
    config = Config(**values)
    if config.accelerator not in ("auto", "kvm", "tcg"):
        raise BangerError(Code.INVALID, f"{path}: accelerator must be auto, kvm or tcg, not {config.accelerator!r}")
    return config
