"""What is kept of a VM: the same record in the database and in `vms/<id>/vm.json`."""

from __future__ import annotations

from dataclasses import dataclass, field

from banger.api.models import PublishedPort
from banger.signals import TERM
from banger.vmm.machine import Machine


@dataclass(frozen=True)
class VmRecord:
    """A VM as created, and its state.

    `state` is created, running or stopped; while it is starting or stopping that is known to the daemon only.
    `command` runs detached at each start. `image_env` comes from the image, `env` from the user. `attached`: the VM
    belongs to a `vm run --rm` whose client waits for it. `volumes` and `exposed_ports` (8080/tcp) are the image's;
    `stop_signal`, a name or a number, is what its main command gets first when the VM is stopped; `home` is where
    the home disk is mounted.
    """

    id: str
    name: str
    state: str
    reason: str
    image: str
    image_sha256: str
    kernel: str
    created_at: str
    started_at: str
    init: str
    net: str
    ports: list[PublishedPort]
    image_env: list[str]
    env: list[str]
    user: str
    workdir: str
    command: list[str]
    auto_remove: bool
    attached: bool
    machine: Machine
    # what older records lack
    volumes: list[str] = field(default_factory=list)
    exposed_ports: list[str] = field(default_factory=list)
    stop_signal: str = TERM
    home: str = "/root"
