"""`vm console` from the terminal to a real recorder, whose other end is the test instead of a VMM."""

import contextlib
import dataclasses
import os
import signal
import socket
import subprocess
import sys
import termios
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from banger.api import models as m
from banger.daemon.console import Console
from banger.daemon.streams import ClientGone, Peer, carry, finish
from banger.daemon.vm import Vm
from banger.system import bind_unix
from banger.vmm import recorder
from tests.process.api_server import serve
from tests.process.commands import TIMEOUT, Banger, Screen
from tests.unit.store.test_database import RECORD

ESCAPE = b"\x1d"  # ctrl-]


class Machine:
    """A VM as its console is concerned: the recorder, and the serial port."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.vm = Vm(dataclasses.replace(RECORD, name="web", state="created"))
        self._cleanup = contextlib.ExitStack()

    def start(self) -> None:
        self.serial, console = socket.socketpair()
        self._log, log = socket.socketpair()
        with console, log, bind_unix(self.directory / recorder.CONSOLE_SOCKET) as listener:
            inherited: list[int] = [console.fileno(), log.fileno(), listener.fileno()]
            argv = [sys.executable, "-I", "-S", recorder.__file__, str(self.directory), *map(str, inherited)]
            self._recorder = subprocess.Popen(argv, pass_fds=inherited)
        self._cleanup.callback(self.stop)
        self.serial.settimeout(TIMEOUT)
        self.vm.record = dataclasses.replace(self.vm.record, state="running")

    def stop(self) -> None:
        """End it as a VMM that dies does."""
        self.serial.close()
        self._log.close()
        assert self._recorder.wait(TIMEOUT) == 0

    def close(self) -> None:
        self._cleanup.close()

    def read(self, wanted: bytes) -> bytes:
        """What is typed, up to these bytes."""
        data = b""
        while not data.endswith(wanted):
            more = self.serial.recv(100)
            assert more, data
            data += more
        return data


@pytest.fixture
def machine(tmp_path: Path) -> Iterator[Machine]:
    machine = Machine(tmp_path)
    yield machine
    machine.close()


@pytest.fixture
def banger(tmp_path: Path, machine: Machine) -> Iterator[Banger]:
    async def attach(request: m.VmRef, peer: Peer) -> None:
        console = await Console.connect(machine.vm, machine.directory)
        await peer.send_event("started", result={})
        with contextlib.suppress(ClientGone):
            await finish(peer, await carry(peer, console))

    (tmp_path / "banger").mkdir(mode=0o700)
    with serve(tmp_path / "banger/bangerd.sock", {}, {"vm.console": attach}) as server:
        yield Banger(tmp_path, server)


@contextlib.contextmanager
def screen(banger: Banger, *arguments: str) -> Iterator[Screen]:
    running = Screen(banger, ["vm", "console", *arguments, "web"])
    try:
        yield running
    finally:
        running.close()


def attached(screen: Screen, wanted: bytes = b"leaves") -> None:
    """Wait until a command tells that it is attached and has the terminal to itself."""
    screen.expect(wanted)
    deadline = time.monotonic() + TIMEOUT
    while termios.tcgetattr(screen.slave) == screen.before:
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_what_is_typed_reaches_the_guest_as_it_is(banger: Banger, machine: Machine) -> None:
    machine.start()
    with screen(banger) as one:
        attached(one, b"this is the serial console of web, where its kernel and its init write; ctrl-] leaves it")
        one.expect(b"a login prompt comes only where the image runs a getty; 'banger vm shell web' gives a shell")
        os.write(one.terminal, b"\x03\x1a\x04\x00\r")  # no signal, no end, no echo, no translation
        assert machine.read(b"\r") == b"\x03\x1a\x04\x00\r"
        machine.serial.sendall(b"\x1b[1mlogin:\x1b[m \xff")
        one.expect(b"\x1b[1mlogin:\x1b[m \xff")
        os.write(one.terminal, b"last" + ESCAPE + b"never sent")
        assert one.process.wait(TIMEOUT) == 0
        assert machine.read(b"last") == b"last"
        assert termios.tcgetattr(one.slave) == one.before
        one.expect(b"left the console of web")
    with screen(banger) as again:
        attached(again)
        os.write(again.terminal, b"x")
        assert machine.read(b"x") == b"x"


def test_another_key_leaves(banger: Banger, machine: Machine) -> None:
    machine.start()
    with screen(banger, "--escape", "^a") as one:
        attached(one, b"ctrl-a leaves")
        os.write(one.terminal, ESCAPE)
        assert machine.read(ESCAPE) == ESCAPE
        os.write(one.terminal, b"\x01")
        assert one.process.wait(TIMEOUT) == 0
    with screen(banger, "--escape", "none") as other:
        attached(other, b"only its end leaves it")
        os.write(other.terminal, bytes(range(1, 32)))
        assert machine.read(b"\x1f") == bytes(range(1, 32))
        machine.stop()
        assert other.process.wait(TIMEOUT) == 0
        assert termios.tcgetattr(other.slave) == other.before


def test_the_terminal_is_restored_whatever_ends_it(banger: Banger, machine: Machine) -> None:
    machine.start()
    for number in (signal.SIGTERM, signal.SIGHUP):
        with screen(banger) as one:
            attached(one)
            os.write(one.terminal, b"x")  # typed in raw mode
            machine.read(b"x")
            one.process.send_signal(number)
            assert one.process.wait(TIMEOUT) == 128 + number
            assert termios.tcgetattr(one.slave) == one.before


def test_pipes_work_and_ctrl_c_leaves(banger: Banger, machine: Machine) -> None:
    machine.start()
    with banger.popen(["vm", "console", "web"]) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(b"reboot\n" + ESCAPE)
        process.stdin.close()
        assert machine.read(ESCAPE) == b"reboot\n" + ESCAPE
        machine.serial.sendall(b"restarting\n")
        assert process.stdout.readline() == b"restarting\n"
        process.send_signal(signal.SIGINT)
        assert process.wait(TIMEOUT) == 130


def test_it_ends_with_the_vm(banger: Banger, machine: Machine) -> None:
    machine.start()
    with screen(banger) as one:
        attached(one)
        machine.serial.sendall(b"Power down.")
        one.expect(b"Power down.")
        machine.stop()
        assert one.process.wait(TIMEOUT) == 0


def test_consoles_that_are_not_there(banger: Banger, machine: Machine) -> None:
    stopped = banger("vm", "console", "web")
    assert stopped.returncode == 1
    assert stopped.stderr == b"error: the VM 'web' is created, not running\nhint: banger vm start web\n"
    machine.vm.record = dataclasses.replace(machine.vm.record, state="running")
    assert b"was started by an older banger" in banger("vm", "console", "web").stderr
    bind_unix(machine.directory / recorder.CONSOLE_SOCKET).close()
    assert b"has ended" in banger("vm", "console", "web").stderr
    for key in ("x", "^", "^1", "^xx", ""):
        result = banger("vm", "console", "--escape", key, "web")
        assert (result.returncode, result.stderr.partition(b"\n")[0]) == (
            2,
            f"error: {key!r} is not a key to leave with".encode(),
        )
