"""What guest tests work with: a daemon of their own and the banger command, as a user has them."""

from __future__ import annotations

import contextlib
import fcntl
import os
import pty
import select
import signal
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from banger.api import models as m
from banger.api import operations as op
from banger.daemon import vm_disk
from banger.process import ProcessId
from tests.daemons import TIMEOUT, DaemonProcess

BANGER = [sys.executable, "-m", "banger.cli"]
IMAGE = "debian-bookworm-minimal"
KERNEL = "debian-cloud"


class Host:
    """A daemon and the command line in front of it."""

    def __init__(self, daemon: DaemonProcess) -> None:
        self.daemon = daemon

    def run(self, *argv: str, input: bytes = b"", timeout: float = TIMEOUT * 2) -> subprocess.CompletedProcess[bytes]:
        """Run a banger command to its end."""
        return subprocess.run(
            [*BANGER, *argv], input=input, capture_output=True, env=self.daemon.environment, timeout=timeout
        )

    def ok(self, *argv: str, input: bytes = b"") -> str:
        """Run a banger command that must succeed and return what it prints."""
        done = self.run(*argv, input=input)
        assert done.returncode == 0, f"{argv}: status {done.returncode}: {done.stderr.decode()}"
        return done.stdout.decode()

    def fails(self, status: int, *argv: str) -> str:
        """Run a banger command that must fail with this status, and return its one error and hint."""
        done = self.run(*argv)
        error = done.stderr.decode()
        assert done.returncode == status, f"{argv}: status {done.returncode}: {error}"
        assert "Traceback" not in error
        return error

    def spawn(self, *argv: str) -> subprocess.Popen[bytes]:
        """Start a banger command with pipes for its streams."""
        return subprocess.Popen(
            [*BANGER, *argv],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=self.daemon.environment,
        )

    @contextlib.contextmanager
    def terminal(self, *argv: str) -> Iterator[Terminal]:
        """Run a banger command on a terminal of 24 rows and 80 columns."""
        pid, master = pty.fork()
        if pid == 0:
            os.execve(BANGER[0], [*BANGER, *argv], {**self.daemon.environment, "TERM": "xterm-256color"})
        terminal = Terminal(pid, master)
        try:
            yield terminal
        finally:
            terminal.end()

    def vm(self, name: str) -> m.VmInfo:
        """What the daemon says of a VM."""
        return self.daemon.client.call(op.VM_SHOW, m.VmRef(name))

    def names(self) -> list[str]:
        """The VMs that there are."""
        return [vm.name for vm in self.daemon.client.call(op.VM_LIST, m.Empty()).vms]

    def wait_state(self, name: str, state: str) -> m.VmInfo:
        """Wait until a VM is in a state."""
        deadline = time.monotonic() + TIMEOUT
        while (vm := self.vm(name)).state != state:
            assert time.monotonic() < deadline, f"{name} is {vm.state}, not {state}"
            time.sleep(0.05)
        return vm

    def wait_reason(self, name: str, reason: str) -> None:
        """Wait until this is said about a VM."""
        deadline = time.monotonic() + TIMEOUT
        while (seen := self.vm(name).reason) != reason:
            assert time.monotonic() < deadline, f"{name}: {seen!r}, not {reason!r}"
            time.sleep(0.05)

    def wait_for(self, condition: Callable[[], bool]) -> None:
        """Wait until something is so."""
        deadline = time.monotonic() + TIMEOUT
        while not condition():
            assert time.monotonic() < deadline, "it did not become so"
            time.sleep(0.05)

    def wait_warnings(self, name: str) -> list[str]:
        """Wait until a VM has lost something; what it says of that."""
        self.wait_for(lambda: bool(self.vm(name).warnings))
        return self.vm(name).warnings

    def wait_there(self, name: str) -> None:
        """Wait until a VM has come into being."""
        deadline = time.monotonic() + TIMEOUT
        while name not in self.names():
            assert time.monotonic() < deadline, f"{name} has not come"
            time.sleep(0.02)

    def hold_start(self, name: str) -> ProcessId:
        """Stop the VMM of a VM as soon as a start has one: the start goes on once it is continued; returns it."""
        directory = self.daemon.layout.vm(self.vm(name).id)
        deadline = time.monotonic() + TIMEOUT
        while (processes := vm_disk.read_processes(directory)) is None:
            assert time.monotonic() < deadline, f"{name} has no VMM"
            time.sleep(0.005)
        os.kill(processes.vmm.pid, signal.SIGSTOP)
        if (state := self.vm(name).state) != "starting":
            os.kill(processes.vmm.pid, signal.SIGCONT)
            raise AssertionError(f"{name} is {state} already")
        return processes.vmm

    def wait_gone(self, name: str) -> None:
        """Wait until there is no such VM."""
        deadline = time.monotonic() + TIMEOUT
        while name in self.names():
            assert time.monotonic() < deadline, f"{name} is still there"
            time.sleep(0.05)

    def wait_output(self, wanted: str, *argv: str) -> None:
        """Repeat a banger command until it prints just this."""
        deadline = time.monotonic() + TIMEOUT
        while (seen := self.run(*argv).stdout.decode()) != wanted:
            assert time.monotonic() < deadline, f"{argv} prints {seen!r}, not {wanted!r}"
            time.sleep(0.05)

    def directories(self) -> list[Path]:
        """What lies in the directory of the VMs."""
        return list(self.daemon.layout.vms.iterdir())


class Terminal:
    """The other side of a command's terminal."""

    def __init__(self, pid: int, master: int) -> None:
        self._pid = pid
        self._master = master
        self._status: int | None = None
        self.seen = b""

    def type(self, text: str) -> None:
        os.write(self._master, text.encode())

    def resize(self, rows: int, columns: int) -> None:
        fcntl.ioctl(self._master, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))

    def expect(self, text: str) -> None:
        """Wait for a text to appear, and forget all up to its end."""
        wanted = text.encode()
        deadline = time.monotonic() + TIMEOUT
        while wanted not in self.seen:
            ready, _, _ = select.select([self._master], [], [], max(0, deadline - time.monotonic()))
            try:
                data = os.read(self._master, 65536) if ready else b""
            except OSError:
                data = b""
            assert data, f"{text!r} did not appear in {self.seen.decode(errors='replace')!r}"
            self.seen += data
        self.seen = self.seen.partition(wanted)[2]

    def wait(self) -> int:
        """Wait for the command's end, reading on; returns its exit status."""
        deadline = time.monotonic() + TIMEOUT
        while True:
            ready, _, _ = select.select([self._master], [], [], max(0, deadline - time.monotonic()))
            assert ready, "the command did not end"
            try:
                data = os.read(self._master, 65536)
            except OSError:
                break
            if not data:
                break
            self.seen += data
        _, status = os.waitpid(self._pid, 0)
        self._status = os.waitstatus_to_exitcode(status)
        return self._status

    def end(self) -> None:
        if self._status is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._pid, signal.SIGKILL)
            os.waitpid(self._pid, 0)
            self._status = -1
        os.close(self._master)
