"""The guests' network on the host: user-mode networks and published ports."""

from __future__ import annotations

import secrets
import shutil
from pathlib import Path

from banger.api.errors import BangerError, Code
from banger.api.models import PublishedPort
from banger.net import passt
from banger.vmm.machine import Machine, Nic


class HostNetwork:
    """Plans NICs when a VM is created and connects them when it starts."""

    def plan(self, net: str, ports: list[PublishedPort], slot: int) -> list[Nic]:
        """The NICs of a new VM: one for `user`, none for `none`."""
        if net == "none":
            if ports:
                raise BangerError(
                    Code.INVALID, "ports cannot be published without a network", hint="leave out --net none or -p"
                )
            return []
        if net != "user":
            raise BangerError(Code.INVALID, f"{net!r} is not a network", hint="use --net user or --net none")
        if shutil.which("passt") is None:
            from banger.job import missing_tool

            raise missing_tool("passt")
        mac = "52:54:00:" + ":".join(f"{byte:02x}" for byte in secrets.token_bytes(3))
        cidr = f"{passt.GUEST_ADDRESS}/{passt.PREFIX}"
        return [Nic("net0", mac, [cidr], passt.GATEWAY, [passt.NAMESERVER], "user", slot)]

    async def connect(self, machine: Machine, ports: list[PublishedPort], directory: Path) -> passt.UserNetwork | None:
        """Start what carries the VM's NIC; None when it has none. Raises when a published port is in use."""
        if not machine.nics:
            return None
        return await passt.start(machine.nics[0], ports, directory / "passt.log", machine.uid)
