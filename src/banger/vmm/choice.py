"""Which VMM a new VM gets: the first that really works here, or the one that was asked for."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from banger.api.errors import BangerError, Code
from banger.config import Config
from banger.net import tap
from banger.vmm import detect, programs

FIRECRACKER, QEMU = "firecracker", "qemu"
NAMES = (FIRECRACKER, QEMU)
KVM = Path("/dev/kvm")
MOST_VCPU = 32  # of Firecracker (MAX_SUPPORTED_VCPUS)
# what a kernel that Firecracker can enter begins with: an ELF header, or the magic number of an arm64 Image at 56
# (Documentation/arch/arm64/booting.rst)
_ENTRIES = {"amd64": ("ELF file", 0, b"\x7fELF"), "arm64": ("arm64 Image", 56, b"ARM\x64")}


@dataclass(frozen=True)
class Choice:
    """A VMM, its accelerator (kvm or tcg), and one sentence on why."""

    driver: str
    accelerator: str
    reason: str


def choose(config: Config, wanted: str = "", kernel: Path | None = None, net: str = "none", vcpu: int = 1) -> Choice:
    """The VMM for a VM that boots `kernel` with the network `net`; `wanted` '' means the configured one. Blocks.

    Raises BangerError when the one that is asked for cannot be had.
    """
    wanted = wanted or config.vmm
    if wanted not in ("auto", *NAMES):
        raise BangerError(Code.INVALID, f"{wanted!r} is not a VMM", hint="use auto, firecracker or qemu")
    if wanted == FIRECRACKER:
        require_firecracker(config, kernel, net, vcpu)
        return Choice(FIRECRACKER, "kvm", "it was asked for")
    acceleration = detect.detect()
    accelerator = acceleration.name if config.accelerator == "auto" else config.accelerator
    if wanted == QEMU:
        return Choice(QEMU, accelerator, f"it was asked for; {acceleration.reason}")
    if accelerator != "kvm":
        reason = acceleration.reason if config.accelerator == "auto" else "config.toml sets the accelerator to tcg"
        return Choice(QEMU, accelerator, reason)
    try:
        require_firecracker(config, kernel, net, vcpu)
    except BangerError as error:
        return Choice(QEMU, accelerator, f"Firecracker is not used: {error.message}")
    if os.geteuid() == 0 and not programs.wants_jailer(
        config
    ):  # while QEMU gives up root, and what else it does not need
        return Choice(QEMU, accelerator, "Firecracker is not used as root without its jailer")
    return Choice(FIRECRACKER, "kvm", f"{acceleration.reason}, and so does {programs.firecracker(config)}")


def require_firecracker(
    config: Config, kernel: Path | None = None, net: str = "none", vcpu: int = 1, kvm: Path = KVM
) -> None:
    """Raise a BangerError that says what keeps Firecracker from running a VM that boots `kernel` with a network."""
    require_vcpu(vcpu)
    arch = detect.host_arch()
    require_kvm(kvm)
    programs.firecracker(config)
    if programs.wants_jailer(config):
        programs.jailer(config)
    if net != "none" and (why := tap.reason_unusable()):
        raise BangerError(
            Code.UNSUPPORTED,
            f"VMs on Firecracker cannot have the network {net!r} here: {why}",
            hint="use --net none, or --vmm qemu",
        )
    if kernel is not None:
        kind, offset, magic = _ENTRIES[arch]
        with open(kernel, "rb") as stream:
            stream.seek(offset)
            if stream.read(len(magic)) != magic:
                raise BangerError(
                    Code.UNSUPPORTED,
                    f"Firecracker cannot boot the kernel {kernel.parent.name!r}: it is no {kind}",
                    hint="use another kernel, or --vmm qemu",
                )


def require_vcpu(vcpu: int) -> None:
    """Raise a BangerError when these are more virtual CPUs than Firecracker has."""
    if vcpu > MOST_VCPU:
        raise BangerError(
            Code.UNSUPPORTED,
            f"Firecracker has no more than {MOST_VCPU} virtual CPUs, not {vcpu}",
            hint=f"use up to {MOST_VCPU}, or a VM with --vmm qemu",
        )


def require_kvm(kvm: Path = KVM) -> None:
    """Raise a BangerError that says why KVM cannot be opened."""
    if not kvm.exists():
        raise BangerError(
            Code.UNSUPPORTED,
            f"Firecracker needs KVM, and {kvm} does not exist",
            hint=f"{detect.kvm_fix()}; or use --vmm qemu",
        )
    if not os.access(kvm, os.R_OK | os.W_OK):
        group = detect.group_of(kvm)
        raise BangerError(
            Code.UNSUPPORTED,
            f"Firecracker needs KVM, and {kvm} may not be opened by this user (it belongs to group {group})",
            hint=f"sudo usermod -aG {group} $USER, then log in again; or use --vmm qemu",
        )
