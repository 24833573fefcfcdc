"""Finds what a daemon has left over: everything on the host that belongs to its state directory and to no VM that runs.

checker = LeakChecker(daemon)
...                         # VMs come and go, the daemon is killed and started again
assert checker.find() == []
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator
from pathlib import Path

from banger.api import models as m
from banger.api import operations as op
from banger.daemon import vm_disk
from banger.process import ProcessId, identify
from banger.store.database import Store
from banger.system import STAGING_PREFIX
from banger.vmm import cgroups
from banger.vmm.firecracker import FirecrackerDriver
from tests.daemons import TIMEOUT, DaemonProcess, wait_ended

_SETTLED = {"created", "running", "stopped"}


class LeakChecker:
    """Looks for processes, mounts, control groups, directories, records and sockets that should have gone."""

    def __init__(self, daemon: DaemonProcess) -> None:
        self._daemon = daemon
        self._seen: set[str] = set()

    def look(self) -> None:
        """Remember which VMs there are; called now and then, so that those that come and go are known later."""
        self._seen |= {path.name for path in self._daemon.layout.vms.iterdir()}

    def find(self) -> list[str]:
        """What is left over while the daemon runs and nobody works with it, in words."""
        self.look()
        vms = self._daemon.client.call(op.VM_LIST, m.Empty()).vms
        return [*self._records(vms), *self._files(vms), *self._processes(vms), *self._mounts(), *self._cgroups(vms)]

    def _records(self, vms: list[m.VmInfo]) -> Iterator[str]:
        with contextlib.closing(Store(self._daemon.layout.database)) as store:
            rows = {row.id: row for row in store.rows()}
        for vm in vms:
            row = rows.pop(vm.id, None)
            states = [vm.state, row.record.state if row and row.record else "none"]
            with contextlib.suppress(OSError, ValueError):
                states.append(vm_disk.read_record(self._daemon.layout.vm(vm.id)).state)
            if states != [vm.state] * 3 or vm.state not in _SETTLED:
                yield f"{vm.name} is {' and '.join(states)}"
        for row in rows.values():
            yield f"a row without a VM: {row}"

    def _files(self, vms: list[m.VmInfo]) -> Iterator[str]:
        layout = self._daemon.layout
        known = {vm.id for vm in vms}
        yield from (f"a directory without a VM: {path}" for path in layout.vms.iterdir() if path.name not in known)
        for top in (layout.state, layout.cache):
            yield from (f"half-done: {path}" for path in _staged(top))
        for vm in vms:
            if vm.state != "running":
                for path in Path(vm.directory).iterdir():
                    if path.is_socket() or path.name in (vm_disk.PROCESSES, *FirecrackerDriver.traces):
                        yield f"{vm.name} does not run, and has {path.name}"

    def _processes(self, vms: list[m.VmInfo]) -> Iterator[str]:
        running: set[ProcessId] = set()
        for vm in vms:
            if vm.state == "running":
                processes = vm_disk.read_processes(Path(vm.directory))
                if processes is None or identify(processes.vmm.pid) != processes.vmm:
                    yield f"{vm.name} is said to run, but {processes} do not"
                else:
                    running |= {processes.vmm, *processes.helpers}
        # helpers end by themselves, a moment after their VMM
        if not wait_ended(self._owned() - running, TIMEOUT):
            for process in self._owned() - running:
                with contextlib.suppress(OSError):
                    words = Path(f"/proc/{process.pid}/cmdline").read_bytes().split(b"\0")
                    yield f"still running: {process.pid} {b' '.join(words).decode(errors='replace')[:300]}"

    def _owned(self) -> set[ProcessId]:
        """The processes that have this daemon's directories in their environment or arguments, or open files there."""
        own = {identify(self._daemon.pid), identify(os.getpid())}
        found = self._daemon.processes()
        for directory in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                if self._has_files(directory):
                    process = identify(int(directory.name))
                    if process is not None:
                        found.add(process)
        return {process for process in found if process not in own}

    def _has_files(self, process: Path) -> bool:
        vms = f"{self._daemon.layout.vms}/"
        return any(str(link.readlink()).startswith(vms) for link in (process / "fd").iterdir() if link.is_symlink())

    def _mounts(self) -> Iterator[str]:
        for line in Path("/proc/self/mountinfo").read_text().splitlines():
            if f"{self._daemon.layout.state}/" in line:
                yield f"still mounted: {line}"

    def _cgroups(self, vms: list[m.VmInfo]) -> Iterator[str]:
        # those of other tests are none of ours
        gone = self._seen - {vm.id for vm in vms if vm.state == "running"}
        yield from (f"a control group without processes: {name}" for name in _empty_groups() & gone)


def _staged(top: Path) -> list[Path]:
    """What is still half done after a while; some of it is removed in the background."""
    deadline = time.monotonic() + TIMEOUT
    while (found := list(top.rglob(f"{STAGING_PREFIX}*"))) and time.monotonic() < deadline:
        time.sleep(0.05)
    return found


def _empty_groups() -> set[str]:
    """The control groups of VMs, of whatever daemon, in which nothing runs."""
    tree = cgroups.find_tree()
    if tree is None:
        return set()
    found = set()
    for base in set(tree.bases.values()):
        for directory in (base / cgroups.PARENT).glob("*/"):
            with contextlib.suppress(OSError):
                if not (directory / "cgroup.procs").read_text():
                    found.add(directory.name)
    return found
