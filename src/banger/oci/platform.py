"""Platforms that images are built for, named as in the OCI Image Specification 1.1, "Image Index", and by Go."""

from __future__ import annotations

import re
from dataclasses import dataclass

from banger.api.errors import BangerError, Code
from banger.vmm.detect import host_arch

_ARCHITECTURES = ("386", "amd64", "arm", "arm64", "loong64", "mips64le", "ppc64le", "riscv64", "s390x")
_ALIASES = {  # what uname and distributions call them
    "x86_64": ("amd64", ""),
    "x86-64": ("amd64", ""),
    "aarch64": ("arm64", ""),
    "armhf": ("arm", "v7"),
    "armv7l": ("arm", "v7"),
    "armel": ("arm", "v6"),
    "armv6l": ("arm", "v6"),
    "i386": ("386", ""),
    "i686": ("386", ""),
    "ppc64el": ("ppc64le", ""),
    "loongarch64": ("loong64", ""),
}
_BASELINES = {"amd64": "v1", "arm64": "v8"}  # what the architecture alone means


@dataclass(frozen=True)
class Platform:
    """What an image runs on; `variant` is of the instruction set ("v7"), '' for none in particular."""

    os: str
    architecture: str
    variant: str = ""

    @classmethod
    def of(cls, os: str, architecture: str, variant: str = "") -> Platform:
        """With the usual names of the parts instead of others for them."""
        architecture, implied = _ALIASES.get(architecture.lower(), (architecture.lower(), ""))
        variant = variant.lower() or implied
        if variant.isdigit():
            variant = f"v{variant}"
        return cls(os.lower(), architecture, "" if variant == _BASELINES.get(architecture) else variant)

    @classmethod
    def parse(cls, text: str) -> Platform:
        """Read [linux/]ARCHITECTURE[/VARIANT]; raises INVALID."""
        parts = text.split("/")
        if len(parts) > 1 and parts[0].lower() == "linux":
            del parts[0]
        platform = cls.of("linux", *parts) if len(parts) in (1, 2) else cls("", "")
        well_formed = re.fullmatch(r"(v[0-9]+(\.[0-9]+)?)?", platform.variant) and all(parts)
        if platform.architecture not in _ARCHITECTURES or not well_formed:
            raise BangerError(
                Code.INVALID,
                f"{text[:100]!r} is not a platform that an image can be for",
                hint=f"say linux/ARCHITECTURE[/VARIANT], the architecture being one of {', '.join(_ARCHITECTURES)}",
            )
        return platform

    @classmethod
    def host(cls) -> Platform:
        """What guests run by default; raises UNSUPPORTED on other hosts."""
        return cls("linux", host_arch())

    def rank(self, offered: Platform) -> float | None:
        """How well an image for another platform runs on this one: 0 is best, None not at all."""
        if (offered.os or self.os, offered.architecture) != (self.os, self.architecture):
            return None
        if offered.variant == self.variant:
            return 0
        if not offered.variant:
            return 1
        version = _version(offered.variant)
        if version is None:
            return None
        if self.variant:  # newer processors run what was made for older ones
            own = _version(self.variant)
            return None if own is None or version > own else 2 + own - version
        # images for arm say what they need nearly always; elsewhere most processors have the lowest
        return 1000 - version if self.architecture == "arm" else 2 + version

    def __str__(self) -> str:
        return f"{self.os}/{self.architecture}" + (f"/{self.variant}" if self.variant else "")


def _version(variant: str) -> float | None:
    return float(variant[1:]) if re.fullmatch(r"v[0-9]{1,2}(\.[0-9])?", variant) else None
