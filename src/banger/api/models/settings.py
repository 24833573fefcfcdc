"""Requests and responses for changing VMs, waiting for them and following what happens to them."""

from __future__ import annotations

from dataclasses import field

from banger.api.models.base import Model
from banger.api.models.vms import VmInfo


class VmSet(Model):
    """What is to change of a VM; what is zero, '', empty or None stays as it is.

    Disks grow only. `labels` and `env` (NAME=VALUE) replace what has the same name, `unset_labels` and `unset_env` are
    names. `publish` is as for vm.create; `unpublish` names ports of the guest, or [ADDR:]HOST:GUEST. `auto_stop` is
    seconds, 0 for never. `restart` is no, on-failure, on-failure:N or always. `balloon`: its guest gives back memory
    that it leaves idle.
    """

    vm: str
    name: str = ""
    vcpu: int = 0
    memory_bytes: int = 0
    disk_bytes: int = 0
    home_bytes: int = 0
    labels: dict[str, str] = field(default_factory=dict)
    unset_labels: list[str] = field(default_factory=list)
    env: list[str] = field(default_factory=list)
    unset_env: list[str] = field(default_factory=list)
    publish: list[str] = field(default_factory=list)
    unpublish: list[str] = field(default_factory=list)
    auto_stop: float | None = None
    restart: str = ""
    balloon: bool | None = None


class VmChanged(Model):
    """`at_once` names the settings that apply already, `at_next_start` those that a running VM takes up later.

    Ports may be in both, when some of them wait; `why_ports_wait` says why, for people.
    """

    vm: VmInfo
    at_once: list[str]
    at_next_start: list[str]
    why_ports_wait: str = ""


class VmWait(Model):
    """Wait until a VM is `state`: running, stopped, removed, or exited (its main command has ended).

    Or until its guest is ready, as vm.run has it in `wait_for`: that fails when the VM or its main command ends first.
    After `timeout` seconds (None: never, 0: at once) the answer is that it is not.
    """

    vm: str
    state: str = "stopped"
    timeout: float | None = None


class VmWaited(Model):
    """What a VM is; `reached`: what was waited for, and within the time given.

    `status` is how the main command ended, 128 and the signal for one that was killed; None when it did not.
    """

    name: str
    state: str
    reason: str
    status: int | None
    reached: bool = True


class VmFile(Model):
    """A file of a VM; `used_bytes` is what it takes on disk, `shared` with its image, its kernel and other VMs."""

    name: str
    size_bytes: int
    used_bytes: int
    shared: bool


class VmDetails(Model):
    """All that is known of a VM: `record` is what its vm.json holds."""

    vm: VmInfo
    record: dict[str, object]
    files: list[VmFile]


class VmEvent(Model):
    """Something that happened to a VM. `sequence` counts on over restarts of the daemon; `time` is RFC 3339 in UTC."""

    sequence: int
    time: str
    kind: str
    id: str
    name: str
    image: str
    labels: dict[str, str]
    details: dict[str, str]


class VmEvents(Model):
    """The events of these VMs (none: of all) that pass the filters: those of the last `since` seconds, and if `follow`
    all that come.
    """

    vms: list[str] = field(default_factory=list)
    filters: list[str] = field(default_factory=list)
    since: float = 0.0
    follow: bool = True
