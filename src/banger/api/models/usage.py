"""Requests and responses for what VMs take: of their host, and inside of their guests.

CPU times are counters; what is used of a processor is the difference of two of them, see banger.api.rates.
"""

from __future__ import annotations

from dataclasses import field

from banger.api.models.base import Model


class VmStatsRequest(Model):
    """Measure these VMs; without any all that run."""

    vms: list[str] = field(default_factory=list)


class HostUsage(Model):
    """What a VM takes of the host.

    CPU time, since each process began, and resident memory are those of its VMM and of the helpers beside that, its
    network and its recorder. `group_` is what the VMM's control group counts; None where it has none. `disk_bytes` is
    what its own disks and logs have allocated, without what it shares with its image. `balloon_bytes` of its memory
    were given back by the guest; None where the VMM does not say.
    """

    pid: int
    vmm_cpu_seconds: float
    vmm_memory_bytes: int
    helpers_cpu_seconds: float
    helpers_memory_bytes: int
    group_cpu_seconds: float | None
    group_memory_bytes: int | None
    group_processes: int | None
    disk_bytes: int
    balloon_bytes: int | None = None


class FilesystemUsage(Model):
    target: str
    size_bytes: int
    used_bytes: int


class NetworkUsage(Model):
    """Bytes since the guest booted, over one interface."""

    name: str
    received_bytes: int
    sent_bytes: int


class DiskUsage(Model):
    """Bytes since the guest booted, of one disk."""

    name: str
    read_bytes: int
    written_bytes: int


class GuestUsage(Model):
    """What a guest says of itself: nothing but its word vouches for it.

    CPU time of all its processors together since it booted; `load` over 1, 5 and 15 minutes; `processes` without
    threads of its kernel.
    """

    cpu_total_seconds: float
    cpu_busy_seconds: float
    cpus: int
    memory_bytes: int
    memory_available_bytes: int
    load: list[float]
    processes: int
    filesystems: list[FilesystemUsage]
    networks: list[NetworkUsage]
    disks: list[DiskUsage]


class VmUsage(Model):
    """One VM: `time` is in seconds of a clock that only differences mean something of.

    `host` is None unless its VMM runs; `guest` is None where `guest_error` says why the guest tells nothing.
    """

    id: str
    name: str
    state: str
    time: float
    vcpu: int
    memory_bytes: int
    host: HostUsage | None
    guest: GuestUsage | None
    guest_error: str


class VmStats(Model):
    vms: list[VmUsage]


class GuestProcess(Model):
    """A process as the guest tells of it.

    `state` is a letter of proc(5), `started` is seconds after the guest booted, `memory_bytes` resident. `kernel`: it
    is a thread of the guest's kernel. `command` is its command line as far as it is told, '' when it has none.
    """

    pid: int
    parent: int
    user: str
    state: str
    cpu_seconds: float
    memory_bytes: int
    threads: int
    started: float
    name: str
    kernel: bool
    command: str


class VmProcesses(Model):
    """The processes of a guest that was up for `uptime` seconds; `truncated` when there were too many to tell all."""

    name: str
    vcpu: int
    uptime: float
    processes: list[GuestProcess]
    truncated: bool
