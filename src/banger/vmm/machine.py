"""The virtual hardware of one VM: decided at creation, stored whole, never recomputed."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Disk:
    """A virtio block device. `path` is relative to the VM's directory; `serial` is what the guest finds it by.

    `role` is image, overlay, home or modules; `format` of the file for the VMM (raw), `filesystem` inside it.
    """

    id: str
    path: str
    format: str
    backing: str
    readonly: bool
    serial: str
    role: str
    filesystem: str
    slot: int


@dataclass(frozen=True)
class Nic:
    """A virtio network device. `addresses` in CIDR notation; `gateway` '' when no route leads through it.

    `network` is user (passt carries it) or publish (the VMM's own restricted network, for published ports alone).
    """

    id: str
    mac: str
    addresses: list[str]
    gateway: str
    nameservers: list[str]
    network: str
    slot: int


@dataclass(frozen=True)
class Forward:
    """TCP `address`:`host_port` on the host leads to `guest_port` at the publish NIC."""

    address: str
    host_port: int
    guest_port: int


@dataclass(frozen=True)
class Machine:
    """What a VMM needs to know. `kernel` and `initrd` are relative to the VM's directory.

    `uid` is the unprivileged user that the VMM runs as when banger is root, else -1.
    """

    driver: str
    accelerator: str
    arch: str
    type: str
    cpu: str
    firmware: str
    vcpu: int
    memory_bytes: int
    memory_backend: str
    kernel: str
    initrd: str
    command_line: str
    disks: list[Disk]
    nics: list[Nic]
    forwards: list[Forward]
    uid: int
