"""The daemon is killed at random moments while clients use it; the next one finds everything in order.

A failure is repeated with the seed that the test prints (BANGER_SOAK_SEED, BANGER_SOAK_ROUNDS).
"""

import contextlib
import io
import os
import random
import signal
import tarfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

import pytest

from banger.api import models as m
from banger.api import operations as op
from banger.api.client import Client
from banger.api.codec import decode_error
from banger.api.errors import BangerError, Code
from banger.api.operations import Stream
from banger.daemon import vm_disk
from banger.process import find_by_arguments
from tests.daemons import TIMEOUT, DaemonProcess, end, running_daemon
from tests.leaks import LeakChecker
from tests.vm.host import Host

Request = TypeVar("Request")
Response = TypeVar("Response")

CLIENTS = 4
NAMES = ("red", "green", "blue", "white", "black")
THROWAWAY = "throwaway"
# what clients may hear while others work on the same VMs and the daemon dies; anything else is a bug
EXPECTED = {Code.NOT_FOUND, Code.EXISTS, Code.WRONG_STATE, Code.DAEMON, Code.GUEST, Code.CANCELLED, Code.IN_USE}


@pytest.fixture
def crashing(tmp_path: Path, kernel: Path, image: Path) -> Iterator[Host]:
    """A host whose daemon may be killed at any time."""
    config = f'default_image = "{image.name}"\nvcpu = 1\nmemory = {192 << 20}\ndisk_size = {1 << 30}\n'
    with running_daemon(tmp_path, entries=[kernel, image], config=config) as daemon:
        yield Host(daemon)


def test_killed_before_the_vmm_is_written_down(crashing: Host) -> None:
    daemon, checker = crashing.daemon, LeakChecker(crashing.daemon)
    vm = daemon.client.call(op.VM_CREATE, m.VmCreate(name="half"))
    while True:
        starting = crashing.spawn("vm", "start", "half")
        deadline = time.monotonic() + TIMEOUT
        while (vmm := find_by_arguments("-name", vm.id, "-nodefaults")) is None:
            assert time.monotonic() < deadline, "no VMM was started"
        os.kill(vmm.pid, signal.SIGSTOP)  # the daemon now waits for its first answer
        time.sleep(0.1)  # for an answer that it may just have got to be written down
        if not (daemon.layout.vm(vm.id) / vm_disk.PROCESSES).exists():
            break
        # this VMM was faster: another attempt
        crashing.ok("vm", "kill", "half")
        starting.communicate(timeout=TIMEOUT)
    daemon.kill()
    starting.communicate(timeout=TIMEOUT)
    daemon.start()
    _check(crashing, checker)
    half = crashing.vm("half")
    assert (half.state, half.reason) == ("created", "the daemon ended while it started this VM")
    crashing.ok("vm", "start", "half")
    crashing.ok("vm", "rm", "--force", "half")


def test_killed_a_few_times(crashing: Host) -> None:
    _crash(crashing, seed=20, rounds=6, longest=5.0)


@pytest.mark.soak
@pytest.mark.timeout(6 * 3600)
def test_killed_many_times(crashing: Host) -> None:
    seed = int(os.environ.get("BANGER_SOAK_SEED", "1"))
    _crash(crashing, seed, rounds=int(os.environ.get("BANGER_SOAK_ROUNDS", "300")), longest=8.0)


def _crash(host: Host, seed: int, rounds: int, longest: float) -> None:
    chance = random.Random(seed)
    checker = LeakChecker(host.daemon)
    for number in range(rounds):
        print(f"seed {seed}, round {number}", flush=True)
        stop = threading.Event()
        unexpected: list[str] = []
        clients = [
            threading.Thread(target=_use, args=(host.daemon, checker, random.Random(chance.random()), stop, unexpected))
            for _ in range(CLIENTS)
        ]
        for client in clients:
            client.start()
        stop.wait(chance.uniform(0.0, longest))
        host.daemon.kill()
        stop.set()
        for client in clients:
            client.join()
        assert not unexpected
        host.daemon.start()
        _check(host, checker)
        for name in host.names():
            if chance.random() < 0.3:
                host.daemon.client.call(op.VM_DELETE, m.VmRemove(name, force=True))


def _use(
    daemon: DaemonProcess, checker: LeakChecker, chance: random.Random, stop: threading.Event, unexpected: list[str]
) -> None:
    """Do random things until told to stop; note what nobody should ever see."""
    while not stop.is_set():
        checker.look()
        if chance.random() < 0.05:
            _kill_something(daemon, chance)
        try:
            chance.choice(ACTIONS)(daemon.client, chance)
        except BangerError as error:
            if error.code not in EXPECTED:
                unexpected.append(f"{error.code}: {error}")


def _kill_something(daemon: DaemonProcess, chance: random.Random) -> None:
    """End one of the processes of a VM: its VMM, its network or its recorder."""
    for directory in sorted(daemon.layout.vms.glob("[!.]*"), key=lambda path: chance.random()):
        processes = vm_disk.read_processes(directory)
        if processes is not None:
            end(chance.choice([processes.vmm, *processes.helpers]))
            return


def _run_once(client: Client, chance: random.Random) -> None:
    create = m.VmCreate(name=f"{THROWAWAY}-{chance.randrange(10**6)}", command=["sleep", "0.2"], auto_remove=True)
    _stream(client, op.VM_RUN, m.VmRun(create))


def _run_detached(client: Client, chance: random.Random) -> None:
    create = m.VmCreate(name=chance.choice(NAMES), command=["sleep", "1000"])
    _stream(client, op.VM_RUN, m.VmRun(create, detach=True))


def _create(client: Client, chance: random.Random) -> None:
    client.call(op.VM_CREATE, m.VmCreate(name=chance.choice(NAMES)))


def _start(client: Client, chance: random.Random) -> None:
    client.call(op.VM_START, m.VmRef(chance.choice(NAMES)))


def _stop(client: Client, chance: random.Random) -> None:
    client.call(op.VM_STOP, m.VmStop(chance.choice(NAMES), grace=chance.uniform(0, 2)))


def _restart(client: Client, chance: random.Random) -> None:
    client.call(op.VM_RESTART, m.VmStop(chance.choice(NAMES), grace=1))


def _kill(client: Client, chance: random.Random) -> None:
    client.call(op.VM_KILL, m.VmRef(chance.choice(NAMES)))


def _prune(client: Client, chance: random.Random) -> None:
    client.call(op.VM_PRUNE, m.Empty())


def _delete(client: Client, chance: random.Random) -> None:
    client.call(op.VM_DELETE, m.VmRemove(chance.choice(NAMES), force=True))


def _exec(client: Client, chance: random.Random) -> None:
    _stream(
        client, op.VM_EXEC, m.VmExec(chance.choice(NAMES), ["sh", "-c", "date >> /root/dates; head -c 1M /dev/zero"])
    )


def _copy_in(client: Client, chance: random.Random) -> None:
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w") as archive:
        member = tarfile.TarInfo("data")
        member.size = 100_000
        archive.addfile(member, io.BytesIO(bytes(member.size)))
    _stream(client, op.VM_WRITE_TREE, m.TreeWrite(chance.choice(NAMES), "/srv"), packed.getvalue())


def _copy_out(client: Client, chance: random.Random) -> None:
    _stream(client, op.VM_READ_TREE, m.TreeRead(chance.choice(NAMES), "/usr/share"))


Action = Callable[[Client, random.Random], None]
ACTIONS: tuple[Action, ...] = (
    *(_run_once, _run_detached, _create, _start, _stop),
    *(_start, _restart, _kill, _delete, _prune, _exec, _copy_in, _copy_out),
)


def _stream(client: Client, operation: Stream[Request, Response], request: Request, input: bytes = b"") -> bytes:
    """Open a stream, send all input (less than its window), and read it to its end; returns its output."""
    output = bytearray()
    with contextlib.closing(client.open(operation, request)) as stream:
        if input:
            stream.send_data(input)
        stream.send_json({"type": "end"})
        for message in stream.messages():
            if isinstance(message, bytes):
                output += message[1:]
            elif message["event"] == "error":
                raise decode_error(message["error"])
            elif message["event"] == "exit":
                return bytes(output)
    raise BangerError(Code.DAEMON, "the daemon went away")


def _check(host: Host, checker: LeakChecker) -> None:
    """Nothing is half-done, nothing is left over, and what is said to run does."""
    assert checker.find() == []
    for vm in host.daemon.client.call(op.VM_LIST, m.Empty()).vms:
        assert not vm.name.startswith(THROWAWAY)
        if vm.state == "running":
            try:
                output = _stream(
                    host.daemon.client, op.VM_EXEC, m.VmExec(vm.name, ["cat", "/proc/sys/kernel/hostname"])
                )
            except BangerError:
                host.wait_state(vm.name, "stopped")  # its guest was told to go down before the daemon was killed
            else:
                assert output.decode().strip() == vm.name
