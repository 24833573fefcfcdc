"""Long operations of a real daemon, seen and cancelled from a second client: what was done is undone."""

import hashlib
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from banger.api import models as m
from banger.api import operations as op
from banger.api.errors import BangerError, Code
from banger.job import Progress
from tests.daemons import TIMEOUT, DaemonProcess, running_daemon
from tests.process.bundle_server import BundleServer, bundle, bundle_server
from tests.process.test_daemon_vms import entries

__all__ = ["entries"]


class Client(threading.Thread):
    """A client that waits for its long call."""

    def __init__(self, call: Callable[[], object]) -> None:
        super().__init__()
        self._call = call
        self.result: object = None
        self.error: BangerError | None = None
        self.start()

    def run(self) -> None:
        try:
            self.result = self._call()
        except BangerError as error:
            self.error = error

    def failed(self) -> BangerError:
        self.join(TIMEOUT)
        assert self.error is not None, self.result
        return self.error


@pytest.fixture
def server() -> Iterator[BundleServer]:
    with bundle_server() as server:
        yield server


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[DaemonProcess]:
    with running_daemon(tmp_path / "daemon") as daemon:
        yield daemon


def under_way(daemon: DaemonProcess, count: int = 1) -> list[m.OperationInfo]:
    """What is under way, once that is so much."""
    deadline = time.monotonic() + TIMEOUT
    while len(found := daemon.client.call(op.OPERATION_LIST, m.Empty()).operations) != count:
        assert time.monotonic() < deadline, found
        time.sleep(0.02)
    return found


def hold(server: BundleServer) -> m.KernelPull:
    """The request for a kernel of which half arrives."""
    data = bundle(padding=1 << 20)
    server.content["edge.tar.zst"] = data
    server.hold = True
    return m.KernelPull(f"{server.address}/edge.tar.zst", sha256=hashlib.sha256(data).hexdigest())


def banger(daemon: DaemonProcess, *argv: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "banger.cli", *argv], env=daemon.environment, capture_output=True, text=True
    )


def test_a_pull_is_watched_and_cancelled(daemon: DaemonProcess, server: BundleServer) -> None:
    request = hold(server)
    first = Client(lambda: daemon.client.call(op.KERNEL_PULL, request, lambda step: None))
    assert server.half_sent.wait(TIMEOUT)
    (pull,) = under_way(daemon)
    assert (pull.name, pull.subject, pull.state) == ("kernel.pull", request.name, "running")
    seen: list[Progress] = []
    arrived = threading.Event()

    def see(step: Progress) -> None:
        seen.append(step)
        arrived.set()

    watcher = Client(lambda: daemon.client.call(op.OPERATION_WATCH, m.OperationRef(pull.id), see))
    assert arrived.wait(TIMEOUT)
    shown = banger(daemon, "operation", "list")
    assert pull.id in shown.stdout
    ended = banger(daemon, "op", "cancel", pull.id[:4])
    assert (ended.returncode, ended.stdout) == (0, f"cancelled kernel.pull {request.name}\n")
    error = first.failed()
    assert error.code is Code.CANCELLED
    assert error.message == f"kernel.pull {request.name} was cancelled by another client"
    assert server.abandoned.wait(TIMEOUT)
    watcher.join(TIMEOUT)
    assert isinstance(watcher.result, m.OperationInfo)
    assert (watcher.result.state, watcher.result.error) == ("cancelled", "")
    assert watcher.result.timings[-1].stage == seen[-1].stage
    assert under_way(daemon, 0) == []
    assert list(daemon.layout.kernels.iterdir()) == []
    again = banger(daemon, "operation", "cancel", pull.id)
    assert again.returncode == 1
    assert again.stderr.startswith(f"error: there is no operation {pull.id!r} under way; it may have ended\n")


def test_others_who_wait_for_the_same_are_not_cancelled(daemon: DaemonProcess, server: BundleServer) -> None:
    request = hold(server)
    first = Client(lambda: daemon.client.call(op.KERNEL_PULL, request))
    (wanted,) = under_way(daemon)
    second = Client(lambda: daemon.client.call(op.KERNEL_PULL, request))
    assert server.half_sent.wait(TIMEOUT)
    # before that the second may not have joined the download of the first
    deadline = time.monotonic() + TIMEOUT
    while {operation.stage for operation in under_way(daemon, 2)} != {"download"}:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    assert daemon.client.call(op.OPERATION_CANCEL, m.OperationRef(wanted.id)).state == "cancelled"
    assert first.failed().code is Code.CANCELLED
    assert not server.abandoned.is_set()
    server.gate.set()
    second.join(TIMEOUT)
    assert isinstance(second.result, m.KernelInfo)


def test_watching_from_the_command_line(daemon: DaemonProcess, server: BundleServer) -> None:
    request = hold(server)
    first = Client(lambda: daemon.client.call(op.KERNEL_PULL, request))
    assert server.half_sent.wait(TIMEOUT)
    (pull,) = under_way(daemon)
    texts = Client(lambda: banger(daemon, "operation", "watch", pull.id))
    lines = Client(lambda: banger(daemon, "operation", "watch", "--json", pull.id))
    deadline = time.monotonic() + TIMEOUT
    while daemon.client.call(op.DAEMON_STATUS, m.Empty()).busy < 3:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    server.gate.set()
    for client in (first, texts, lines):
        client.join(TIMEOUT)
    assert isinstance(texts.result, subprocess.CompletedProcess)
    assert isinstance(lines.result, subprocess.CompletedProcess)
    assert texts.result.returncode == lines.result.returncode == 0, texts.result.stderr
    assert texts.result.stdout.splitlines()[-1].startswith(f"kernel.pull {request.name}: done after ")
    *steps, last = map(json.loads, lines.result.stdout.splitlines())
    assert {step["stage"] for step in steps} <= {timing["stage"] for timing in last["timings"]}
    assert last["state"] == "done"


def test_a_create_is_cancelled_while_its_disks_are_made(tmp_path: Path, entries: list[Path]) -> None:
    tools, reached = tmp_path / "tools", tmp_path / "reached"
    tools.mkdir()
    os.mkfifo(reached)
    (tools / "mke2fs").write_text(f"#!/bin/sh\necho x >{reached}\nexec sleep 1000\n")
    (tools / "mke2fs").chmod(0o755)
    path = f"{tools}:{os.environ['PATH']}"
    with running_daemon(tmp_path / "d", entries=entries, variables={"PATH": path}) as daemon:
        first = Client(lambda: daemon.client.call(op.VM_CREATE, m.VmCreate(image="tiny", name="one")))
        reached.read_text()
        (create,) = under_way(daemon)
        assert (create.name, create.subject) == ("vm.create", "one")
        daemon.client.call(op.OPERATION_CANCEL, m.OperationRef(create.id))
        assert list(daemon.layout.vms.iterdir()) == []
        assert daemon.processes() == set()
        assert daemon.client.call(op.VM_LIST, m.Empty()).vms == []
        assert first.failed().message == "vm.create one was cancelled by another client"
        (tools / "mke2fs").unlink()
        assert daemon.client.call(op.VM_CREATE, m.VmCreate(image="tiny", name="one")).name == "one"
