"""Ending a VM while it starts: the start is cancelled and not awaited, and nothing is left of it."""

import os
import signal
import time
from pathlib import Path

import pytest

from tests.daemons import TIMEOUT
from tests.leaks import LeakChecker
from tests.vm.host import Host


@pytest.mark.parametrize(
    ("command", "state", "how"),
    [
        (("rm", "--force"), "", "removed"),
        (("kill",), "stopped", "killed"),
        (("stop",), "stopped", "stopped"),
    ],
)
def test_a_start_under_way_is_cancelled(host: Host, command: tuple[str, ...], state: str, how: str) -> None:
    checker = LeakChecker(host.daemon)
    host.ok("vm", "create", "--name", "brief")
    starting = host.spawn("vm", "start", "brief")
    host.hold_start("brief")
    waiting = host.spawn("vm", "start", "brief")
    began = time.monotonic()
    host.ok("vm", *command, "brief")
    # far below the time limit of a boot
    assert time.monotonic() - began < TIMEOUT
    _, error = starting.communicate(timeout=TIMEOUT)
    assert starting.returncode == 1
    assert f"the start of 'brief' was cancelled, since the VM was {how} meanwhile" in error.decode()
    waiting.communicate(timeout=TIMEOUT)
    assert checker.find() == []
    if state:
        host.ok("vm", "rm", "--force", "brief")
    else:
        assert "brief" not in host.names()


def test_removal_without_force_does_not_wait_for_a_start(host: Host) -> None:
    host.ok("vm", "create", "--name", "kept")
    starting = host.spawn("vm", "start", "kept")
    vmm = host.hold_start("kept")
    assert "the VM 'kept' is starting" in host.fails(1, "vm", "rm", "kept")
    os.kill(vmm.pid, signal.SIGCONT)
    starting.communicate(timeout=2 * TIMEOUT)
    assert starting.returncode == 0
    host.ok("vm", "rm", "--force", "kept")


def test_memory_that_was_promised_is_not_promised_again(host: Host) -> None:
    available = next(
        int(line.split()[1]) << 10
        for line in Path("/proc/meminfo").read_text().splitlines()
        if line.startswith("MemAvailable:")
    )
    size = f"{(available * 2 // 3) >> 20}M"
    for name in ("first", "second"):
        host.ok("vm", "create", "--name", name, "--memory", size)
    starting = host.spawn("vm", "start", "first")
    host.hold_start("first")
    error = host.fails(1, "vm", "start", "second")
    assert "of which" in error
    assert "go to VMs that are being started" in error
    assert host.vm("second").state == "created"
    host.ok("vm", "rm", "--force", "first")
    starting.communicate(timeout=TIMEOUT)
    host.ok("vm", "rm", "second")
