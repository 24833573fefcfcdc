"""Locks: work on one VM holds up no other, and what many clients do to the same VMs at once is neither lost nor left.

A failure is repeated with the seed that the test prints (BANGER_SOAK_SEED).
"""

import os
import random
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from banger.api import models as m
from banger.api import operations as op
from banger.api.client import Client
from banger.api.errors import BangerError, Code
from tests.daemons import TIMEOUT, running_daemon
from tests.leaks import LeakChecker
from tests.vm.host import Host

CLIENTS, RECORDS, BOOTED = 8, 20, 3
NAMES = [f"vm{number:02}" for number in range(RECORDS)]
ALIASES = [f"alias{number:02}" for number in range(RECORDS)]
# what a client may hear when another one was faster; anything else is a bug
EXPECTED = {Code.NOT_FOUND, Code.EXISTS, Code.WRONG_STATE, Code.GUEST, Code.CANCELLED}


@pytest.fixture
def busy(tmp_path: Path, kernel: Path, image: Path) -> Iterator[Host]:
    """A host whose VMs are small."""
    config = f'default_image = "{image.name}"\nvcpu = 1\nmemory = {192 << 20}\ndisk_size = {256 << 20}\n'
    config += f"home_size = {64 << 20}\n"
    with running_daemon(tmp_path, entries=[kernel, image], config=config) as daemon:
        yield Host(daemon)


def test_a_vm_that_hangs_holds_up_no_other(busy: Host) -> None:
    checker = LeakChecker(busy.daemon)
    client = busy.daemon.client
    client.call(op.VM_CREATE, m.VmCreate(name="stuck"))
    starting = busy.spawn("vm", "start", "stuck")
    vmm = busy.hold_start("stuck")  # the daemon now waits for the guest
    _whole_life(client, "one")
    assert busy.vm("stuck").state == "starting"
    os.kill(vmm.pid, signal.SIGCONT)
    assert starting.wait(TIMEOUT) == 0
    os.kill(vmm.pid, signal.SIGSTOP)
    stopping = busy.spawn("vm", "stop", "--grace", "600", "stuck")
    busy.wait_state("stuck", "stopping")
    _whole_life(client, "two")
    assert busy.vm("stuck").state == "stopping"
    os.kill(vmm.pid, signal.SIGCONT)
    assert stopping.wait(TIMEOUT) == 0
    client.call(op.VM_DELETE, m.VmRemove("stuck"))
    assert checker.find() == []


def _whole_life(client: Client, name: str) -> None:
    client.call(op.VM_CREATE, m.VmCreate(name=name))
    client.call(op.VM_SET, m.VmSet(name, labels={"seen": "yes"}))
    client.call(op.VM_START, m.VmRef(name))
    client.call(op.VM_STOP, m.VmStop(name))
    client.call(op.VM_DELETE, m.VmRemove(name))


def test_many_clients_at_once(busy: Host) -> None:
    _stress(busy, seed=5, operations=200)


@pytest.mark.soak
@pytest.mark.timeout(3600)
def test_many_clients_for_long(busy: Host) -> None:
    _stress(busy, seed=int(os.environ.get("BANGER_SOAK_SEED", "1")), operations=2000)


def _stress(host: Host, seed: int, operations: int) -> None:
    print(f"seed {seed}")
    checker = LeakChecker(host.daemon)
    for name in NAMES:
        host.daemon.client.call(op.VM_CREATE, m.VmCreate(name=name))
    chance = random.Random(seed)
    clients = [
        StressClient(host.daemon.client, f"client{number}", random.Random(chance.random()), operations // CLIENTS)
        for number in range(CLIENTS)
    ]
    for client in clients:
        client.thread.start()
    for client in clients:
        client.thread.join(operations * TIMEOUT / CLIENTS)
        assert not client.thread.is_alive(), f"{client.name} hangs in {client.doing}"
    assert not [problem for client in clients for problem in client.unexpected]
    left = {vm.id: vm for vm in host.daemon.client.call(op.VM_LIST, m.Empty()).vms}
    for client in clients:
        for vm_id, value in client.labels.items():
            assert vm_id not in left or left[vm_id].labels[client.name] == value, "an update was lost"
    assert {vm.name for vm in left.values()} <= {*NAMES, *ALIASES}
    assert checker.find() == []
    for vm_id in left:
        host.daemon.client.call(op.VM_DELETE, m.VmRemove(vm_id, force=True))
    assert not host.directories()
    assert checker.find() == []


class StressClient:
    """Does so many random things to VMs, and remembers what it was told was done."""

    def __init__(self, client: Client, name: str, chance: random.Random, operations: int) -> None:
        self.name = name
        self.thread = threading.Thread(target=self._run, daemon=True)
        self._client = client
        self._chance = chance
        self._operations = operations
        self.labels: dict[str, str] = {}
        self.unexpected: list[str] = []
        self.doing = ""

    def _run(self) -> None:
        actions: list[Callable[[], None]] = [
            *[self._label] * 8, *[self._create] * 4, *[self._rename] * 3, *[self._start] * 3, *[self._look] * 2,
            *[self._resize] * 2, self._delete, self._delete, self._stop, self._stop, self._kill, self._restart,
        ]  # fmt: skip
        for number in range(self._operations):
            action = self._chance.choice(actions)
            self.doing = f"operation {number}, {action.__name__}"
            try:
                action()
            except BangerError as error:
                if error.code not in EXPECTED:
                    self.unexpected.append(f"{self.doing}: {error}")

    def _any(self) -> str:
        return self._chance.choice([*NAMES, *NAMES, *ALIASES])

    def _bootable(self) -> str:
        return self._chance.choice(NAMES[:BOOTED])

    def _look(self) -> None:
        self._client.call(op.VM_LIST, m.Empty())
        self._client.call(op.VM_SHOW, m.VmRef(self._any()))

    def _create(self) -> None:
        self._client.call(op.VM_CREATE, m.VmCreate(name=self._any()))

    def _label(self) -> None:
        value = str(self._chance.random())
        changed = self._client.call(op.VM_SET, m.VmSet(self._any(), labels={self.name: value}))
        self.labels[changed.vm.id] = value

    def _resize(self) -> None:
        memory = self._chance.choice((192, 200, 256)) << 20
        self._client.call(op.VM_SET, m.VmSet(self._any(), memory_bytes=memory))

    def _rename(self) -> None:
        self._client.call(op.VM_SET, m.VmSet(self._any(), name=self._any()))

    def _start(self) -> None:
        self._client.call(op.VM_START, m.VmRef(self._bootable()))

    def _stop(self) -> None:
        self._client.call(op.VM_STOP, m.VmStop(self._bootable(), grace=self._chance.uniform(0, 2)))

    def _kill(self) -> None:
        self._client.call(op.VM_KILL, m.VmRef(self._bootable()))

    def _restart(self) -> None:
        self._client.call(op.VM_RESTART, m.VmStop(self._bootable(), grace=1))

    def _delete(self) -> None:
        self._client.call(op.VM_DELETE, m.VmRemove(self._any(), force=True))
