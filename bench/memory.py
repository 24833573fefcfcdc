"""Memory: the daemon idle and with 20 running VMs, and what the processes of each VM add."""

from __future__ import annotations

import contextlib
import re
import statistics
from pathlib import Path

from common import Host, load, scratch_host

from banger.api import models as m
from banger.api import operations as op
from banger.daemon import vm_disk

VMS = 20
GUEST_MEMORY = 192 << 20


def resident(pid: int) -> float:
    """VmRSS in MiB (proc(5))."""
    return _field(Path(f"/proc/{pid}/status"), "VmRSS")


def proportional(pid: int) -> float:
    """Pss in MiB (proc(5), smaps_rollup): shared pages count as a share."""
    return _field(Path(f"/proc/{pid}/smaps_rollup"), "Pss")


def _field(file: Path, name: str) -> float:
    match = re.search(rf"^{name}:\s+(\d+) kB", file.read_text(), re.MULTILINE)
    assert match is not None
    return int(match[1]) / 1024


def daemon_pid(host: Host) -> int:
    return host.client.call(op.DAEMON_STATUS, m.Empty()).pid


def main() -> None:
    with scratch_host() as host, contextlib.ExitStack() as stack:
        pid = daemon_pid(host)
        idle = resident(pid)
        print(f"daemon, idle                     {idle:7.1f} MiB resident")
        for index in range(VMS):
            stack.enter_context(host.running(f"bench-{index}", memory=GUEST_MEMORY))
        busy = resident(pid)
        print(f"daemon, {VMS} VMs run               {busy:7.1f} MiB resident, {(busy - idle) / VMS:.2f} MiB for each")
        processes: dict[str, list[float]] = {}
        for vm in host.client.call(op.VM_LIST, m.Empty()).vms:
            running = vm_disk.read_processes(Path(vm.directory))
            assert running is not None
            for process in (running.vmm, *running.helpers):
                argv = Path(f"/proc/{process.pid}/cmdline").read_text().split("\0")
                name = "recorder" if any("recorder.py" in word for word in argv) else argv[0]
                processes.setdefault(name, []).append(proportional(process.pid))
        for name, sizes in processes.items():
            print(f"{name:<32} {statistics.median(sizes):7.1f} MiB proportional, for each of {len(sizes)}")
        print(f"guests have {GUEST_MEMORY >> 20} MiB and run sleep; {load()}")


if __name__ == "__main__":
    main()
