"""One VM as the daemon holds it: its record, its link to the guest, and what clients are told of it."""

from __future__ import annotations

import asyncio
import contextlib
import math
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from banger.api import models as m
from banger.api.errors import BangerError, Code
from banger.daemon import vm_changes, vm_disk, vm_plan
from banger.daemon.guest_link import GuestLink
from banger.daemon.jobs import Report
from banger.job import Progress
from banger.store.records import INTENTS, STOPPED, VmRecord
from banger.vmm.machine import Forward

if TYPE_CHECKING:
    from banger.daemon.vm_helpers import Helpers

RESTARTING = "restarting"
DISK_FULL = "paused: the disk of the host is full"


class Vm:
    """One VM: its record, and while it runs the link to its guest.

    `lock` is held by whatever changes it. `starting` is its start while one is under way, `ends` (stopped, killed,
    removed) what is being done to it that no start may outlast, `warnings`, by what they are about, what it has lost,
    `restarting` whether it is about to be started by its policy, `reserved` the published ports that are kept for it
    until something in its guest listens there. Times are of a clock that nobody sets and that goes on
    while the host sleeps.
    """

    def __init__(self, record: VmRecord) -> None:
        self.record = record
        self.lock = asyncio.Lock()
        self.starting: asyncio.Task[None] | None = None
        self.ends: list[str] = []
        self.restarting = False
        self.helpers: Helpers | None = None
        self.warnings: dict[str, str] = {}
        self.link: GuestLink | None = None
        self.watcher: asyncio.Task[None] | None = None
        self.reserved: dict[Forward, socket.socket] = {}
        self._began = self._touched = _elapsed()
        self._users = 0
        self._seen: tuple[int, dict[str, int]] | None = None
        self._seen_with: VmRecord | None = None

    @property
    def name(self) -> str:
        return self.record.name

    @property
    def state(self) -> str:
        """The record's, or RESTARTING."""
        return RESTARTING if self.restarting and self.record.state == STOPPED else self.record.state

    @property
    def goes_on(self) -> bool:
        """Whether it runs, or may in a moment: its policy will start it, or something is being done to it."""
        return self.link is not None or self.restarting or self.lock.locked()

    def look(self, directory: Path) -> tuple[int, dict[str, int]]:
        """What it takes on disk, as `vm_disk.look` has it: looked at anew only while it runs and when it has changed.

        Lists are long, and of most of their VMs the files stay as they are.
        """
        if self._seen is None or self.link is not None or self._seen_with is not self.record:
            self._seen, self._seen_with = vm_disk.look(directory), self.record
        return self._seen

    def began(self) -> None:
        """Note that it runs from now on, or is seen to."""
        self._began = self._touched = _elapsed()

    @property
    def ran_for(self) -> float:
        """Seconds since it began to run."""
        return _elapsed() - self._began

    def refuse_paused(self) -> None:
        """Raise EXHAUSTED while its guest stands still, since the host's disk is full."""
        if self.link is not None and self.link.vmm.paused:
            raise BangerError(
                Code.EXHAUSTED, f"the VM {self.name!r} is {DISK_FULL}", "free some space: then it goes on by itself"
            )

    @contextlib.contextmanager
    def in_use(self) -> Iterator[None]:
        """Count as touched during the block, and from its end on as left alone."""
        self._users += 1
        try:
            yield
        finally:
            self._users -= 1
            self.touch()

    def touch(self) -> None:
        """Note that somebody has just used it."""
        self._touched = _elapsed()

    @property
    def time_left(self) -> float:
        """Seconds after which it will have been left alone for long enough to be stopped; infinite when it never is."""
        limit = self.record.auto_stop
        if not limit or self.state != "running":
            return math.inf
        return limit if self._users else limit - (_elapsed() - self._touched)

    @property
    def left_alone(self) -> bool:
        return self.time_left <= 0


def _elapsed() -> float:
    return time.clock_gettime(time.CLOCK_BOOTTIME)


class Stages:
    """Measures the stages of a start and reports each as progress."""

    def __init__(self, report: Report) -> None:
        self.timings: list[m.Timing] = []
        self._report = report
        self._since = time.monotonic()

    def done(self, stage: str) -> None:
        """Note that `stage` has just ended."""
        now = time.monotonic()
        self.timings.append(m.Timing(stage, now - self._since))
        self._since = now
        self._report(Progress(stage, ended=True))


def describe(vm: Vm, directory: Path) -> m.VmInfo:
    """What clients are told of a VM whose files lie in `directory`."""
    record, machine = vm.record, vm.record.machine
    reason = "" if record.state in INTENTS else record.reason
    used, sizes = vm.look(directory)
    pending = vm_changes.pending(record)
    later = vm_changes.settled(record)
    return m.VmInfo(
        id=record.id,
        name=record.name,
        state=vm.state,
        reason=DISK_FULL if vm.link is not None and vm.link.vmm.paused else reason,
        warnings=list(vm.warnings.values()),
        image=record.image,
        kernel=record.kernel,
        arch=machine.arch,
        driver=machine.driver,
        driver_reason=record.driver_reason,
        accelerator=machine.accelerator,
        machine=machine.type,
        vcpu=machine.vcpu,
        memory_bytes=machine.memory_bytes,
        disk_bytes=sizes.get(vm_plan.OVERLAY, 0),
        home_bytes=sizes.get(vm_plan.HOME, 0),
        used_bytes=used,
        init=record.init,
        pid1=record.pid1,
        net=record.net,
        ports=record.ports,
        exposed_ports=record.exposed_ports,
        volumes=record.volumes,
        env=record.env,
        user=record.user,
        workdir=record.workdir,
        command=record.command,
        stop_signal=record.stop_signal,
        auto_remove=record.auto_remove,
        created_at=record.created_at,
        started_at=record.started_at,
        pid=vm.link.vmm.process.identity.pid if vm.link is not None else 0,
        directory=str(directory),
        labels=record.labels,
        auto_stop=record.auto_stop,
        restart=record.restart,
        restarts=record.restarts,
        status=record.status,
        pending=pending,
        balloon=record.balloon,
        next_vcpu=later.machine.vcpu if "vcpu" in pending else 0,
        next_memory_bytes=later.machine.memory_bytes if "memory" in pending else 0,
        next_ports=later.ports if "ports" in pending else None,
    )
