"""The host tools that banger needs, and the packages that bring them.

Uses the standard library alone and nothing of banger: scripts/setup-host runs it before anything is installed.
"""

from __future__ import annotations

import glob
import importlib.util
import os
import shlex
import shutil
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path


class Purpose(StrEnum):
    """What a tool is needed for; each purpose includes those before it."""

    RUN = "run"
    BUILD = "build"
    TEST = "test"


class Need(StrEnum):
    """Whether banger can do without a tool."""

    REQUIRED = "required"
    UNPRIVILEGED = "unprivileged"  # required of everybody but root


class Use(StrEnum):
    """Work of banger's that takes tools of the host; what several kinds of it take together is asked for at once."""

    VM = "vm"  # to start VMs
    NETWORK = "network"  # of VMs
    DISK = "disk"  # to make the disks of VMs
    IMAGE = "image"  # to pull images
    DEBIAN_IMAGE = "debian-image"  # to build them of Debian's packages, besides
    KERNEL = "kernel"
    DEBIAN_KERNEL = "debian-kernel"


# values of ID and ID_LIKE in os-release(5)
_MANAGERS = {
    "debian": "apt",
    "ubuntu": "apt",
    "fedora": "dnf",
    "rhel": "dnf",
    "arch": "pacman",
}
_INSTALL = {
    "apt": "apt-get install --no-install-recommends",
    "dnf": "dnf install",
    "pacman": "pacman -S --needed",
}
_AUR = "aur/"
_ARCHES = {"x86_64": "amd64", "aarch64": "arm64"}
# where Debian keeps mke2fs, which an ordinary user's PATH does not contain
_ADMIN_DIRECTORIES = "/usr/local/sbin:/usr/sbin:/sbin"


@dataclass(frozen=True)
class HostTool:
    """One tool: how to find it and, by package manager (apt, dnf, pacman), the package that contains it.

    `also` are other commands that come in the same packages.
    """

    name: str
    why: str
    purpose: Purpose
    need: Need
    packages: Mapping[str, str]
    files: tuple[str, ...] = ()
    module: str = ""
    arch: str = ""
    vmm: str = ""
    uses: tuple[Use, ...] = ()
    also: tuple[str, ...] = ()

    def present(self) -> bool:
        """Whether this host has it."""
        if self.files:
            return any(glob.glob(pattern) for pattern in self.files)
        if self.module:
            return importlib.util.find_spec(self.module) is not None
        return find_command(self.name) is not None


def find_command(command: str, path: str | None = None) -> str | None:
    """The file that a command name stands for, in `path` (default: PATH) or the administrator's directories."""
    if path is None:
        path = os.environ.get("PATH", os.defpath)
    return shutil.which(command, path=f"{path}:{_ADMIN_DIRECTORIES}")


def load() -> list[HostTool]:
    """Every tool of hostpackages.toml, in its order; ValueError or KeyError says what is wrong with the file."""
    import tomllib

    tables = tomllib.loads(Path(__file__).with_suffix(".toml").read_text())
    return [
        HostTool(
            name=name,
            why=table["why"],
            purpose=Purpose(table["purpose"]),
            need=Need(table.get("need", Need.REQUIRED)),
            packages={manager: table[manager] for manager in _INSTALL},
            files=tuple(table.get("files", ())),
            module=table.get("module", ""),
            arch=table.get("arch", ""),
            vmm=table.get("vmm", ""),
            uses=tuple(Use(use) for use in table.get("uses", ())),
            also=tuple(table.get("also", ())),
        )
        for name, table in tables.items()
    ]


def tools(purpose: Purpose) -> list[HostTool]:
    """What this architecture uses for a purpose and those before it, optional tools as well."""
    purposes = list(Purpose)
    wanted = purposes[: purposes.index(purpose) + 1]
    arch = _ARCHES.get(os.uname().machine, "")
    return [tool for tool in load() if tool.purpose in wanted and tool.arch in ("", arch)]


def required(purpose: Purpose) -> list[HostTool]:
    """What this user cannot do without for a purpose and those before it."""
    needs = {Need.REQUIRED} if os.geteuid() == 0 else {Need.REQUIRED, Need.UNPRIVILEGED}
    return [tool for tool in tools(purpose) if tool.need in needs]


def needed(uses: Collection[Use], vmm: str = "") -> list[HostTool]:
    """What this user cannot do without for some work, with VMs that run on `vmm` ('': whichever)."""
    return [
        tool
        for tool in required(Purpose.RUN)
        if any(use in uses for use in tool.uses) and (not vmm or tool.vmm in ("", vmm))
    ]


def missing(wanted: Iterable[HostTool]) -> list[HostTool]:
    """Those of the tools that this host lacks."""
    return [tool for tool in wanted if not tool.present()]


def read_os_release() -> dict[str, str]:
    """The fields of this host's os-release(5), none when it has no such file."""
    import platform

    try:
        return platform.freedesktop_os_release()
    except OSError:
        return {}


def package_manager(os_release: Mapping[str, str]) -> str:
    """apt, dnf or pacman, or '' for a distribution that banger does not know."""
    ids = [os_release.get("ID", ""), *os_release.get("ID_LIKE", "").split()]
    return next((_MANAGERS[name] for name in ids if name in _MANAGERS), "")


def package_names(wanted: Iterable[HostTool], manager: str) -> list[str]:
    """The packages that bring some tools, each once, in order."""
    return list(dict.fromkeys(tool.packages[manager] for tool in wanted))


def install_command(wanted: Iterable[HostTool], os_release: Mapping[str, str]) -> str:
    """The shell line that installs some tools, or '' for a distribution that banger does not know.

    What Arch Linux has in the AUR only, where pacman cannot fetch it, is named in a comment at its end.
    """
    manager = package_manager(os_release)
    if not manager:
        return ""
    names = package_names(wanted, manager)
    official = [name for name in names if not name.startswith(_AUR)]
    aur = [name.removeprefix(_AUR) for name in names if name.startswith(_AUR)]
    sudo = "" if os.geteuid() == 0 else "sudo "
    line = f"{sudo}{_INSTALL[manager]} {shlex.join(official)}" if official else ""
    return f"{line}  # and from the AUR: {shlex.join(aur)}".lstrip() if aur else line


def find_tool(name: str) -> HostTool | None:
    """The tool of that name, or the one that it comes with; None when banger lists no such tool."""
    return next((tool for tool in load() if name in (tool.name, *tool.also)), None)


def package_of(tool: HostTool) -> str:
    """The package of this distribution that brings a tool, '' for a distribution that banger does not know."""
    manager = package_manager(read_os_release())
    return tool.packages[manager].removeprefix(_AUR) if manager else ""
