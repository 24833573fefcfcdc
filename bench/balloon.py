"""Ballooning: the host memory of an idle guest that has read much, with `--balloon` and without."""

from __future__ import annotations

import time
from pathlib import Path

from common import IMAGE, Host, load, scratch_host

from banger.api import models as m
from banger.api import operations as op

MEMORY = 1 << 30
READ_MIB = 640
SETTLED = 60.0  # seconds without a change by more than a hundredth: a dozen looks of the daemon
LONGEST = 300.0
# off a disk that is mounted, so that the cache outlives the reading; then its main command waits, and nothing else runs
READ = f"head -c {READ_MIB}M $(findmnt -no SOURCE /root) > /dev/null; touch /run/read; sleep infinity"


def resident(pid: int) -> int:
    """The bytes of memory that a process holds, VmRSS of proc(5)."""
    return int(Path(f"/proc/{pid}/status").read_text().partition("VmRSS:")[2].split()[0]) * 1024


def started(host: Host, name: str, balloon: bool) -> int:
    """A VM that begins to read; the pid of its VMM."""
    create = m.VmCreate(
        name=name, image=IMAGE, memory_bytes=MEMORY, balloon=balloon, net="none", command=["sh", "-c", READ]
    )
    host.client.call(op.VM_CREATE, create)
    host.client.call(op.VM_START, m.VmRef(name))
    return host.client.call(op.VM_SHOW, m.VmRef(name)).pid


def settled(pids: list[int]) -> list[int]:
    """What these processes hold once that changes no more."""
    since, before = time.monotonic(), [resident(pid) for pid in pids]
    end = since + LONGEST
    while time.monotonic() < min(since + SETTLED, end):
        time.sleep(1)
        now = [resident(pid) for pid in pids]
        if any(abs(new - old) > old / 100 for new, old in zip(now, before, strict=True)):
            since, before = time.monotonic(), now
    return before


def main() -> None:
    with scratch_host() as host:
        pids = [started(host, name, name == "with") for name in ("without", "with")]
        for name in ("without", "with"):
            host.banger("vm", "exec", name, "--", "sh", "-c", "until [ -e /run/read ]; do sleep 1; done")
        print(f"an idle guest of {MEMORY >> 20} MiB that has read {READ_MIB} MiB of a disk; its VMM holds, in MiB,")
        without, with_ = (size >> 20 for size in settled(pids))
        print(f"with --balloon                   {with_:7}")
        print(f"  without                        {without:7}")
        print(f"  ratio                          {with_ / without:7.2f}")
        print(load())


if __name__ == "__main__":
    main()
