"""The guests' network on the host: user-mode networks and published ports."""

from __future__ import annotations

import secrets
from pathlib import Path

from banger.api.errors import BangerError, Code
from banger.api.models import PublishedPort
from banger.net import passt, publish, tap
from banger.net.tap import TapNetwork
from banger.process import Watched
from banger.vmm.machine import Machine, Nic

_LOG = "passt.log"


class HostNetwork:
    """Plans NICs when a VM is created and has them carried while it runs."""

    def plan(self, net: str, ports: list[PublishedPort], slot: int) -> list[Nic]:
        """The NICs of a new VM: none for `none`; for `user` one, and another when ports are published."""
        if net == "none":
            if ports:
                raise BangerError(
                    Code.INVALID, "ports cannot be published without a network", hint="leave out --net none or -p"
                )
            return []
        if net != "user":
            raise BangerError(Code.INVALID, f"{net!r} is not a network", hint="use --net user or --net none")
        cidr = f"{passt.GUEST_ADDRESS}/{passt.PREFIX}"
        nics = [Nic("net0", _mac(), [cidr], passt.GATEWAY, [passt.NAMESERVER], "user", slot)]
        if ports:
            cidr = f"{publish.GUEST_ADDRESS}/{publish.PREFIX}"
            nics.append(Nic("net1", _mac(), [cidr], "", [], "publish", slot + 1))
        return nics

    async def carry(self, machine: Machine, directory: Path, end: int) -> list[Watched]:
        """Start what carries the VM's NIC, which is at the other end of a connected stream; it ends together."""
        return await passt.start(directory / _LOG, machine.uid, end)

    async def taps(self, machine: Machine, directory: Path) -> TapNetwork:
        """Start a network for the VM's NICs in a namespace of its own, which carries published ports, too."""
        return await tap.start(directory / _LOG, machine.uid, machine.forwards)


def _mac() -> str:
    """A random address with QEMU's prefix."""
    return "52:54:00:" + ":".join(f"{byte:02x}" for byte in secrets.token_bytes(3))
