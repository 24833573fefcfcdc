"""Runs and starts cancelled by a second client at each of their stages, and what a daemon that stops says."""

import subprocess
import time

import pytest

from banger.api import models as m
from banger.api import operations as op
from banger.api.errors import BangerError, Code
from tests.daemons import TIMEOUT
from tests.vm.host import Host

NAME = "again"


def cancel(host: Host, *argv: str, stage: str) -> subprocess.Popen[bytes]:
    """Run a command whose operation is cancelled once this stage is behind it.

    It is run again where all was done before it could be cancelled: what follows the boot takes a moment only.
    """
    while True:
        process = host.spawn(*argv)
        if cancelled(host, f"vm.{argv[1]}", stage):
            return process
        host.ok("vm", "kill", NAME)
        process.communicate(timeout=TIMEOUT)
        if argv[1] == "run":
            host.ok("vm", "rm", NAME)


def cancelled(host: Host, operation: str, stage: str) -> bool:
    """Cancel the one operation under way as soon as this stage is behind it; whether that came in time."""
    call = host.daemon.client.call
    deadline = time.monotonic() + TIMEOUT
    seen: list[m.OperationInfo] = []
    while not (found := call(op.OPERATION_LIST, m.Empty()).operations) or not is_behind(found[0], stage):
        if seen and not found:
            return False
        assert time.monotonic() < deadline, seen
        seen = found
        time.sleep(0.005)
    assert (found[0].name, found[0].subject) == (operation, NAME)
    try:
        return call(op.OPERATION_CANCEL, m.OperationRef(found[0].id)).state == "cancelled"
    except BangerError as error:
        if error.code is not Code.NOT_FOUND:
            raise
        return False


def is_behind(operation: m.OperationInfo, stage: str) -> bool:
    return not stage or stage in {timing.stage for timing in operation.timings}


@pytest.mark.parametrize("stage", ["", "create", "network", "vmm", "boot"])
def test_a_run_is_cancelled(host: Host, stage: str) -> None:
    process = cancel(host, "vm", "run", "--name", NAME, "--", "sleep", "1000", stage=stage)
    _, error = process.communicate(timeout=TIMEOUT)
    assert error.decode().splitlines()[0] == f"error: vm.run {NAME} was cancelled by another client"
    assert process.returncode == 125
    assert host.names() == []
    assert host.directories() == []
    assert host.daemon.nothing_runs()


@pytest.mark.parametrize("stage", ["network", "vmm"])
def test_a_start_is_cancelled(host: Host, stage: str) -> None:
    host.ok("vm", "create", "--name", NAME)
    process = cancel(host, "vm", "start", NAME, stage=stage)
    assert host.vm(NAME).state != "running"
    _, error = process.communicate(timeout=TIMEOUT)
    assert host.daemon.nothing_runs()
    assert f"vm.start {NAME} was cancelled by another client" in error.decode()
    assert process.returncode == 1
    host.ok("vm", "start", NAME)
    host.ok("vm", "rm", "-f", NAME)


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
