"""Which accelerator really works on this host."""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

from banger.api.errors import BangerError, Code
from banger.job import missing_tool
from banger.reasons import in_words
from banger.vmm.ask import ask

_ARCHITECTURES = {"x86_64": "amd64", "amd64": "amd64", "aarch64": "arm64", "arm64": "arm64"}
_EMULATORS = {"amd64": "qemu-system-x86_64", "arm64": "qemu-system-aarch64"}
_MODULES = {"vmx": "kvm_intel", "svm": "kvm_amd"}  # flags of x86 CPUs, and what makes a /dev/kvm of them


@dataclass(frozen=True)
class Acceleration:
    """`name` is kvm or tcg, `reason` one sentence on why."""

    name: str
    reason: str


def host_arch() -> str:
    """amd64 or arm64; BangerError(UNSUPPORTED) elsewhere."""
    machine = platform.machine()
    if machine not in _ARCHITECTURES:
        raise BangerError(Code.UNSUPPORTED, f"banger does not run on {machine} hosts, only on x86_64 and aarch64")
    return _ARCHITECTURES[machine]


def detect(kvm: Path = Path("/dev/kvm"), cpuinfo: Path = Path("/proc/cpuinfo")) -> Acceleration:
    """KVM when it can run ordinary guests, else TCG.

    On x86 a /dev/kvm without vmx or svm among the CPU flags is an emulation that stops ordinary kernels at boot.
    """
    if not kvm.exists():
        return Acceleration("tcg", f"{kvm} does not exist, so guests are emulated")
    if host_arch() == "amd64" and not _MODULES.keys() & _cpu_flags(cpuinfo):
        return Acceleration(
            "tcg",
            f"{kvm} is here but cannot run ordinary guests: the CPU shows neither vmx nor svm; guests are emulated",
        )
    if not os.access(kvm, os.R_OK | os.W_OK):
        return Acceleration("tcg", f"{kvm} may not be opened by this user (it belongs to group {group_of(kvm)})")
    return Acceleration("kvm", f"{kvm} works")


def kvm_fix(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """What to do on a host without a KVM that works.

    The kernel shows neither vmx nor svm where the firmware has switched virtualization off.
    """
    modules = [module for flag, module in _MODULES.items() if flag in _cpu_flags(cpuinfo)]
    if modules:
        return f"load KVM as root: modprobe {modules[0]}"
    return "enable hardware virtualization (in the firmware, or nested virtualization in the VM that this host is)"


def _cpu_flags(cpuinfo: Path) -> set[str]:
    flags = re.search(r"^flags\s*:(.*)$", cpuinfo.read_text(), re.MULTILINE)
    return set(flags[1].split()) if flags else set()


def group_of(path: Path) -> str:
    """The group of a file: its name, or its number where it has none, as in many containers."""
    try:
        return path.group()
    except KeyError:
        return str(path.stat().st_gid)


def emulator(arch: str) -> str:
    """The QEMU program for guests of an architecture."""
    return _EMULATORS[arch]


def versioned_machine(arch: str, alias: str) -> str:
    """The versioned name behind a QEMU machine alias: q35 is pc-q35-7.2. Blocks when QEMU was not asked before.

    Raises BangerError: MISSING_TOOL without QEMU, UNSUPPORTED when it cannot be run.
    """
    match = re.search(rf"^{re.escape(alias)}\s.*\(alias of (\S+)\)$", _ask_emulator(arch, "-machine"), re.MULTILINE)
    return match[1] if match else alias


def cpu_flags(arch: str) -> set[str]:
    """The CPUID flags that QEMU can switch on and off. Blocks and raises as versioned_machine does."""
    _, _, flags = _ask_emulator(arch, "-cpu").partition("\nRecognized CPUID flags:\n")
    return set(flags.split())


def _ask_emulator(arch: str, option: str) -> str:
    """QEMU's list of what it takes for an option."""
    path = shutil.which(emulator(arch))
    if path is None:
        raise missing_tool(emulator(arch))
    try:
        return ask(path, option, "help")
    except (OSError, subprocess.SubprocessError) as error:
        raise BangerError(
            Code.UNSUPPORTED, f"{path} cannot be run: {in_words(error)}", hint="run 'banger doctor'"
        ) from error
