"""Whether the host's side of published ports is free, and which VM has it otherwise."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterable, Sequence

from banger.api.models import PublishedPort
from banger.daemon.vm import Vm
from banger.net.publish import PortTaken, check_ports_free

_ANY = "0.0.0.0"


def check_ports(vm: Vm, ports: Sequence[PublishedPort], vms: Iterable[Vm], is_new: bool) -> None:
    """Raise PortTaken when one of the ports that a VM is to publish is in use, with the running VM that has it.

    The hint is for who can still give other ports (`is_new`), or for who starts a VM that has them.
    """
    others = [other for other in vms if other is not vm]
    try:
        for port in ports:
            # what is kept for a guest that does not listen yet can be bound by others
            if any(_publishes(other, port) for other in others):
                raise PortTaken(port, OSError(errno.EADDRINUSE, os.strerror(errno.EADDRINUSE)))
        check_ports_free(ports)
    except PortTaken as error:
        holder = next((other for other in others if _publishes(other, error.port)), None)
        if holder is not None:
            error.message += f": the VM {holder.name!r} publishes it"
        if not is_new:
            given_up = f"{error.port.host_port}:{error.port.guest_port}"
            error.hint = f"publish another one: banger vm set {vm.name} --unpublish {given_up} -p {error.another}"
        raise


def _publishes(vm: Vm, port: PublishedPort) -> bool:
    return (vm.link is not None or bool(vm.reserved)) and any(
        other.host_port == port.host_port and (other.address == port.address or _ANY in (other.address, port.address))
        for other in vm.record.ports
    )
