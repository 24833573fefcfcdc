"""Runs and starts cancelled by a second client at each of their stages, and what a daemon that stops says."""

import time

import pytest

from banger.api import models as m
from banger.api import operations as op
from tests.daemons import TIMEOUT
from tests.vm.host import Host


def wait_stage(host: Host, stage: str) -> m.OperationInfo:
    """The one operation under way, once this stage is behind it."""
    deadline = time.monotonic() + TIMEOUT
    while True:
        found = host.daemon.client.call(op.OPERATION_LIST, m.Empty()).operations
        if found and (not stage or stage in {timing.stage for timing in found[0].timings}):
            return found[0]
        assert time.monotonic() < deadline, found
        time.sleep(0.005)


@pytest.mark.parametrize("stage", ["", "create", "network", "vmm", "boot"])
def test_a_run_is_cancelled(host: Host, stage: str) -> None:
    process = host.spawn("vm", "run", "--name", "cancelled", "--", "sleep", "1000")
    running = wait_stage(host, stage)
    assert (running.name, running.subject) == ("vm.run", "cancelled")
    host.ok("operation", "cancel", running.id)
    _, error = process.communicate(timeout=TIMEOUT)
    assert error.decode().splitlines()[0] == "error: vm.run cancelled was cancelled by another client"
    assert process.returncode == 125
    assert host.names() == []
    assert host.directories() == []
    assert host.daemon.processes() == set()


@pytest.mark.parametrize("stage", ["network", "vmm"])
def test_a_start_is_cancelled(host: Host, stage: str) -> None:
    host.ok("vm", "create", "--name", "again")
    process = host.spawn("vm", "start", "again")
    running = wait_stage(host, stage)
    assert host.daemon.client.call(op.OPERATION_CANCEL, m.OperationRef(running.id)).state == "cancelled"
    assert host.vm("again").state != "running"
    _, error = process.communicate(timeout=TIMEOUT)
    assert host.daemon.processes() == set()
    assert b"vm.start again was cancelled by another client" in error
    assert process.returncode == 1
    host.ok("vm", "start", "again")
    host.ok("vm", "rm", "-f", "again")


def test_a_run_is_no_operation_once_its_command_runs(host: Host) -> None:
    process = host.spawn("vm", "run", "--rm", "--name", "attached", "--", "sh", "-c", "echo up; sleep 1000")
    assert process.stdout is not None
    assert process.stdout.readline() == b"up\n"
    assert host.daemon.client.call(op.OPERATION_LIST, m.Empty()).operations == []
    host.daemon.stop()
    _, error = process.communicate(timeout=TIMEOUT)
    assert error.decode().splitlines()[0] == "error: the daemon was stopped"
    assert process.returncode == 125
    host.daemon.start()
    host.wait_gone("attached")
